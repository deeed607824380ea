"""Union of several data folders (domains) for pre-training: one catalogue, modalities matched by encoder fingerprint.

Item ids become ``domain-item``. Two modalities are merged if they have equal fingerprints, whatever their names: equal
names or widths are no evidence, since two encoders of one width fill different vector spaces. A domain may lack a
modality.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, ModalityError
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TRAIN_COUNT

WORD_DROP = "word_drop"
"""Variant of a text modality whose vectors come from texts with words left out (`Modality.variants`)."""


@dataclass(frozen=True)
class Domains:
    """The union of several data folders.

    Parameters
    ----------
    catalogue : Catalogue
        Items of all domains, one domain after the other, with ids ``domain-item``.
    splits : mapping of str to Sessions
        ``train`` and ``valid`` sessions of all domains on the union's rows; known items only, no event features.
    domain : ndarray [row], int64
        Index of each row's domain in ``names``; -1 in the reserved rows.
    names : tuple of str
    sources : mapping of str to mapping
        Modality of the union -> domain -> the modality's name in that domain.
    """

    catalogue: Catalogue
    splits: Mapping[str, Sessions]
    domain: Ints
    names: tuple[str, ...]
    sources: Mapping[str, Mapping[str, str]]

    def describe(self) -> list[str]:
        """Return one line of text per modality: its sources, and modalities of equal name that were not merged."""
        lines = []
        for name, by_domain in self.sources.items():
            modality = self.catalogue.modalities[name]
            fingerprint = str(modality.fingerprint)
            encoder = fingerprint if len(fingerprint) <= 40 else fingerprint[:37] + "…"
            title = f"{name} (width {modality.width}, encoder {encoder})"
            without = [domain for domain in self.names if domain not in by_domain]
            parts = ", ".join(f"{domain}.{source}" for domain, source in by_domain.items())
            line = f"modality {title}: {parts}" + (f"; not in {', '.join(without)}" if without else "")
            namesakes = [source for source in by_domain.values() if source != name and source in self.sources]
            if namesakes:
                line += f"; not merged with {namesakes[0]}, which comes from another encoder"
            lines.append(line)
        return lines


def named_folders(entries: Iterable[str | Path]) -> dict[str, Path]:
    """Return domain -> data folder; an entry is a folder, whose last part names the domain, or ``NAME=FOLDER``.

    Raises
    ------
    ConfigError
        Two domains of one name.

    Examples
    --------
    >>> named_folders(["work/beauty", "films=work/ml/data"])
    {'beauty': PosixPath('work/beauty'), 'films': PosixPath('work/ml/data')}
    """
    folders: dict[str, Path] = {}
    for entry in entries:
        name, is_named, folder = str(entry).partition("=")
        path = Path(folder if is_named else name)
        name = name if is_named else path.resolve().name
        if name in folders:
            raise ConfigError(f"two domains are called {name!r}", "a name for each", f"--data {name}2={path}")
        folders[name] = path
    return folders


def load_domains(folders: Mapping[str, Path]) -> Domains:
    """Read data folders and join them.

    Parameters
    ----------
    folders : mapping of str to Path
        Domain -> folder written by ``missrec etl``.

    Raises
    ------
    ModalityError
        A modality has no fingerprint, or one fingerprint has vectors of two widths.
    DataError
        A folder is missing or incomplete, or no domain has a modality.
    """
    catalogues = {name: Catalogue.load(folder / CATALOGUE_FOLDER) for name, folder in folders.items()}
    sizes = [catalogue.n_items for catalogue in catalogues.values()]
    starts = dict(zip(catalogues, np.cumsum([0, *sizes]).tolist(), strict=False))
    sources = _match_domains(catalogues)
    if not sources:
        raise DataError("no domain has a modality", "modality vectors in each", "run `missrec features` or --modality")
    items = pa.table(
        {
            ITEM_ID: [
                f"{name}-{item}"
                for name, catalogue in catalogues.items()
                for item in catalogue.items[ITEM_ID].to_pylist()
            ],
            TRAIN_COUNT: np.concatenate([catalogue.train_count[FIRST_ITEM_ROW:] for catalogue in catalogues.values()]),
        }
    )
    train = [(name, Sessions.load(folder / "train", ()).known()) for name, folder in folders.items()]
    valid = [(name, Sessions.load(folder / "valid", ()).with_known_target()) for name, folder in folders.items()]
    splits = {
        split: Sessions.concatenate([Sessions(part.values + starts[name], part.offsets) for name, part in parts])
        for split, parts in (("train", train), ("valid", valid))
    }
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return Domains(
        Catalogue(items, {name: _stack_modality(by_domain, catalogues) for name, by_domain in sources.items()}),
        splits,
        np.concatenate([np.full(FIRST_ITEM_ROW, -1), owner]),
        tuple(catalogues),
        sources,
    )


def match_modalities(wanted: Mapping[str, str | None], known: Mapping[str, str | None]) -> dict[str, str]:
    """Match modalities by fingerprint; return wanted name -> known name for those of the same encoder.

    Parameters
    ----------
    wanted, known : mapping of str to str or None
        Name -> fingerprint. None equals nothing. If several share a fingerprint (title and description by one
        encoder), equal names are matched first, the rest in order.

    Examples
    --------
    >>> match_modalities({"title": "minilm", "image": "clip-b"}, {"text": "minilm", "image": "clip-l"})
    {'title': 'text'}
    """
    matched: dict[str, str] = {}
    for same_name in (True, False):
        for name, fingerprint in wanted.items():
            if fingerprint is None or name in matched:
                continue
            free = [other for other, theirs in known.items() if theirs == fingerprint and other not in matched.values()]
            if same_name:
                free = [other for other in free if other == name]
            if free:
                matched[name] = free[0]
    return {name: matched[name] for name in wanted if name in matched}


def require_fingerprints(modalities: Mapping[str, Modality], where: str) -> None:
    """Raise an error for modality vectors without a fingerprint of their encoder.

    Raises
    ------
    ModalityError
        Lists them all.
    """
    unnamed = [name for name, modality in modalities.items() if modality.fingerprint is None]
    if unnamed:
        raise ModalityError(
            f"{where} has no fingerprint of the encoder of {', '.join(map(repr, unnamed))}",
            "a fingerprint, since equal names and widths do not make two encoders one",
            f"state it with `missrec etl --modality {unnamed[0]}=… --fingerprint {unnamed[0]}=ENCODER@REVISION`",
        )


def _match_domains(catalogues: Mapping[str, Catalogue]) -> dict[str, dict[str, str]]:
    """Return the union's modalities: name -> domain -> own name."""
    sources: dict[str, dict[str, str]] = {}
    fingerprints: dict[str, str | None] = {}
    widths: dict[str, int] = {}
    for domain, catalogue in catalogues.items():
        require_fingerprints(catalogue.modalities, f"domain {domain!r}")
        of_domain = {name: modality.fingerprint for name, modality in catalogue.modalities.items()}
        matched = match_modalities(of_domain, fingerprints)
        for name, modality in catalogue.modalities.items():
            joint = matched.get(name) or _free_name(name, domain, sources)
            if widths.setdefault(joint, modality.width) != modality.width:
                raise ModalityError(
                    f"{domain}.{name} has width {modality.width} and the fingerprint {modality.fingerprint!r}",
                    f"width {widths[joint]}, as the other domains have with this fingerprint",
                    "state the encoder's revision and preprocessing in the fingerprint",
                )
            fingerprints[joint] = modality.fingerprint
            sources.setdefault(joint, {})[domain] = name
    return sources


def _free_name(name: str, domain: str, taken: Mapping[str, object]) -> str:
    """Return the modality's own name, with the domain appended if vectors of another encoder have that name."""
    clean = "".join(letter if letter.isalnum() else "_" for letter in domain)
    candidates = [name, f"{name}_{clean}", *(f"{name}_{clean}_{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _stack_modality(by_domain: Mapping[str, str], catalogues: Mapping[str, Catalogue]) -> Modality:
    """Stack one modality over all domains: zeros where a domain lacks it, plain vectors where it lacks the variant."""
    parts = {domain: catalogues[domain].modalities[name] for domain, name in by_domain.items()}
    first = next(iter(parts.values()))
    n_rows = FIRST_ITEM_ROW + sum(catalogue.n_items for catalogue in catalogues.values())
    vectors, present = np.zeros((n_rows, first.width), np.float32), np.zeros(n_rows, bool)
    varied = any(WORD_DROP in part.variants for part in parts.values())
    variants = {WORD_DROP: np.zeros_like(vectors)} if varied else {}
    start = FIRST_ITEM_ROW
    for domain, catalogue in catalogues.items():
        rows = slice(start, start + catalogue.n_items)
        start += catalogue.n_items
        if (part := parts.get(domain)) is None:
            continue
        vectors[rows], present[rows] = part.vectors[FIRST_ITEM_ROW:], part.present[FIRST_ITEM_ROW:]
        for variant, stacked in variants.items():
            stacked[rows] = part.variants.get(variant, part.vectors)[FIRST_ITEM_ROW:]
    return Modality(vectors, present, first.encoder, variants)
