"""Several data folders as one: a union catalogue of `domain-item` ids, modalities matched by encoder fingerprint.

Two modalities are one if the same encoder made both: equal fingerprints, whatever their names. Equal names or widths
say nothing, since two encoders of one width fill different spaces. A domain may lack a modality (specification 8).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, ModalityError
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TRAIN_COUNT, UNKNOWN_ROW

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
        ``train`` and ``valid`` sessions of all domains on the union's rows; known items only, no side features.
    domain : ndarray [row], int64
        Index of each row's domain in ``names``; -1 in the reserved rows.
    names : tuple of str
    sources : mapping of str to mapping
        Modality of the union -> domain -> the modality's name there.
    """

    catalogue: Catalogue
    splits: Mapping[str, Sessions]
    domain: npt.NDArray[np.int64]
    names: tuple[str, ...]
    sources: Mapping[str, Mapping[str, str]]

    def describe(self) -> list[str]:
        """Return one line per modality: where it comes from, and why equal names were kept apart."""
        lines = []
        for name, by_domain in self.sources.items():
            modality = self.catalogue.modalities[name]
            made = f"{name} (width {modality.width}, encoder {_short(modality.fingerprint)})"
            lacking = [domain for domain in self.names if domain not in by_domain]
            parts = ", ".join(f"{domain}.{own}" for domain, own in by_domain.items())
            line = f"modality {made}: {parts}" + (f"; not in {', '.join(lacking)}" if lacking else "")
            apart = [own for own in by_domain.values() if own != name and own in self.sources]
            if apart:
                line += f"; kept apart from {apart[0]}, which another encoder made"
            lines.append(line)
        return lines


def named_folders(entries: Iterable[str | Path]) -> dict[str, Path]:
    """Return domain -> data folder; an entry is a folder, named by its last part, or ``NAME=FOLDER``.

    Raises
    ------
    ConfigError
        Two domains of one name.

    Examples
    --------
    >>> named_folders(["work/beauty", "films=work/ml/data"])
    {'beauty': PosixPath('work/beauty'), 'films': PosixPath('work/ml/data')}
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, is_named, folder = str(entry).partition("=")
        path = Path(folder if is_named else name)
        name = name if is_named else path.resolve().name
        if name in found:
            raise ConfigError(f"two domains are called {name!r}", "a name for each", f"--data {name}2={path}")
        found[name] = path
    return found


def load_domains(folders: Mapping[str, Path]) -> Domains:
    """Read data folders and join them.

    Parameters
    ----------
    folders : mapping of str to Path
        Domain -> folder written by ``missrec etl``.

    Raises
    ------
    ModalityError
        A modality does not say which encoder made it, or one fingerprint is claimed by two widths.
    DataError
        A folder is missing or incomplete, or no modality is there at all.
    """
    catalogues = {name: Catalogue.load(folder / CATALOGUE_FOLDER) for name, folder in folders.items()}
    sizes = np.array([0, *(catalogue.n_items for catalogue in catalogues.values())])
    starts = dict(zip(catalogues, np.cumsum(sizes).tolist(), strict=False))
    sources = _matched(catalogues)
    if not sources:
        raise DataError("no domain has a modality", "modality vectors in each", "run `missrec features` or --modality")
    items = pa.table(
        {
            ITEM_ID: [
                f"{name}-{item}" for name, shop in catalogues.items() for item in shop.items[ITEM_ID].to_pylist()
            ],
            TRAIN_COUNT: np.concatenate([shop.train_count[FIRST_ITEM_ROW:] for shop in catalogues.values()]),
        }
    )
    splits = {
        split: _joined(
            {name: Sessions.load(folder / split, features=[]).known() for name, folder in folders.items()}, starts
        )
        for split in ("train", "valid")
    }
    owner = np.repeat(np.arange(len(catalogues)), [shop.n_items for shop in catalogues.values()])
    return Domains(
        Catalogue(items, {name: _united(by_domain, catalogues) for name, by_domain in sources.items()}),
        splits,
        np.concatenate([np.full(FIRST_ITEM_ROW, -1), owner]),
        tuple(catalogues),
        sources,
    )


def match_modalities(wanted: Mapping[str, str | None], known: Mapping[str, str | None]) -> dict[str, str]:
    """Return, for the modalities that the same encoder made, wanted name -> known name.

    Parameters
    ----------
    wanted, known : mapping of str to str or None
        Name -> fingerprint. None equals nothing. Where several share a fingerprint (title and description by one
        encoder) equal names go first, then their order.

    Examples
    --------
    >>> match_modalities({"title": "minilm", "image": "clip-b"}, {"text": "minilm", "image": "clip-l"})
    {'title': 'text'}
    """
    found: dict[str, str] = {}
    for same_name in (True, False):
        for name, fingerprint in wanted.items():
            if fingerprint is None or name in found:
                continue
            free = [other for other, made in known.items() if made == fingerprint and other not in found.values()]
            if same_name:
                free = [other for other in free if other == name]
            if free:
                found[name] = free[0]
    return {name: found[name] for name in wanted if name in found}


def require_fingerprints(modalities: Mapping[str, Modality], where: str) -> None:
    """Refuse vectors that do not say which encoder made them.

    Raises
    ------
    ModalityError
        Names them all.
    """
    silent = [name for name, modality in modalities.items() if modality.fingerprint is None]
    if silent:
        raise ModalityError(
            f"{where} does not say which encoder made {', '.join(map(repr, silent))}",
            "a fingerprint, since equal names and widths do not make two encoders one",
            f"state it with `missrec etl --modality {silent[0]}=… --fingerprint {silent[0]}=ENCODER@REVISION`",
        )


def _matched(catalogues: Mapping[str, Catalogue]) -> dict[str, dict[str, str]]:
    """Return the union's modalities: name -> domain -> own name."""
    sources: dict[str, dict[str, str]] = {}
    fingerprints: dict[str, str | None] = {}
    widths: dict[str, int] = {}
    for domain, catalogue in catalogues.items():
        require_fingerprints(catalogue.modalities, f"domain {domain!r}")
        own = {name: modality.fingerprint for name, modality in catalogue.modalities.items()}
        matched = match_modalities(own, fingerprints)
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
    """Return the modality's own name, or one with its domain where another encoder's vectors are called the same."""
    clean = "".join(letter if letter.isalnum() else "_" for letter in domain)
    candidates = [name, f"{name}_{clean}", *(f"{name}_{clean}_{number}" for number in range(2, len(taken) + 3))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _united(by_domain: Mapping[str, str], catalogues: Mapping[str, Catalogue]) -> Modality:
    """Stack one modality over all domains; a domain without it gives rows of zeros, one without the variant its own."""
    parts = {domain: catalogues[domain].modalities[name] for domain, name in by_domain.items()}
    first = next(iter(parts.values()))
    blank = np.zeros((FIRST_ITEM_ROW, first.width), np.float32)

    def stack(variant: str | None) -> npt.NDArray[np.float32]:
        tables = [
            np.zeros((shop.n_items, first.width), np.float32)
            if domain not in parts
            else (parts[domain].variants.get(variant or "", parts[domain].vectors))[FIRST_ITEM_ROW:]
            for domain, shop in catalogues.items()
        ]
        return np.concatenate([blank, *tables])

    present = [
        parts[domain].present[FIRST_ITEM_ROW:] if domain in parts else np.zeros(shop.n_items, bool)
        for domain, shop in catalogues.items()
    ]
    varied = any(WORD_DROP in part.variants for part in parts.values())
    return Modality(
        stack(None),
        np.concatenate([np.zeros(FIRST_ITEM_ROW, bool), *present]),
        first.encoder,
        {WORD_DROP: stack(WORD_DROP)} if varied else {},
    )


def _joined(splits: Mapping[str, Sessions], starts: Mapping[str, int]) -> Sessions:
    """Concatenate sessions, each domain's rows shifted to where its items stand in the union."""
    shifted = [np.where(part.values > UNKNOWN_ROW, part.values + starts[name], 0) for name, part in splits.items()]
    lengths: Sequence[npt.NDArray[np.int64]] = [part.lengths for part in splits.values()]
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    return Sessions(np.concatenate(shifted), offsets)


def _short(fingerprint: str | None) -> str:
    text = str(fingerprint)
    return text if len(text) <= 40 else text[:37] + "…"
