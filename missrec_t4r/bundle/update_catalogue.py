"""`missrec catalogue update`: add, change and retire items of a bundle without training.

The weights do not change. Existing items keep their rows, new ones are appended; a new or changed modality embedding is
assigned to the nearest of the trained interests. For sessions of untouched items the new version must reproduce the
scores of untouched items within 1e-6, otherwise the update is refused. The previous version stays beside the bundle,
for `missrec catalogue rollback`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from missrec_t4r.arrays import Bools, Floats, Ints
from missrec_t4r.bundle.bundle import SEARCH_FROM, LoadedBundle, load_bundle, with_index, write_catalogue
from missrec_t4r.bundle.catalogue_changes import Changes, columns_of, read_items
from missrec_t4r.bundle.manifest import MODEL_FILE, WEIGHTS_FILE, catalogue_version, verify_bundle, write_manifest
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import BundleError, ParityError
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.io.atomic import exchange, recover, temporary_dir
from missrec_t4r.io.lock import locked
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.cold_start import cold_item_mask
from missrec_t4r.runs.extend import nearest_interests
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, RETIRED, SCHEMA_FILE, SESSION_TRANSFORM_FILE, TRAIN_COUNT

log = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Largest accepted difference of an untouched item's score in a session of untouched items."""
_CHECKED_SESSIONS = 64
_MOST_IN_MEMORY = 1 << 25
"""Most numbers kept in memory (128 MiB of float32): of a vector table, or of the scores of the checked sessions."""
_COPIED_FILES = (MODEL_FILE, WEIGHTS_FILE, SESSION_TRANSFORM_FILE, SCHEMA_FILE)


def update_catalogue(
    bundle: str | Path,
    items: str | Path | pa.Table,
    *,
    modalities: Mapping[str, Path | Floats] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Replace a bundle atomically by one with added, changed and retired items.

    Parameters
    ----------
    bundle : path
        Verified before anything is written.
    items : path or pyarrow.Table
        One row per item to add, change or retire: ``item_id`` and any columns. A missing column keeps its values;
        ``retired`` true or false retires an item or makes it recommendable again.
    modalities : mapping of str to path or ndarray [row, width], optional
        Vectors of the table's rows, one ``.npy`` per modality. A row of NaN is no vector: a new item then lacks the
        modality, an existing one keeps its vector.
    dry_run : bool
        Write and check the new version in a temporary folder only.

    Returns
    -------
    dict
        Previous and new version, numbers of added, changed, unchanged and retired items, of added ones without any
        vector, and the largest score difference of the check.

    Raises
    ------
    DataError, ModalityError
        Items or vectors do not fit the catalogue.
    ParityError
        An untouched item would change its score; the bundle stays as it is.
    """
    folder = Path(bundle).absolute()
    verify_bundle(folder, only=())
    table = items if isinstance(items, pa.Table) else read_items(items)
    with nullcontext() if dry_run else locked(folder):
        return _update(folder, table, modalities or {}, dry_run)


def _update(folder: Path, table: pa.Table, modalities: Mapping[str, Path | Floats], dry_run: bool) -> dict[str, Any]:
    started = time.monotonic()
    old = load_bundle(folder)
    changes = Changes.of(table, modalities, old.catalogue)
    differs = changes.differing(old.catalogue)
    unchanged = int((~differs).sum())
    if unchanged:  # an export of the whole catalogue; repeating an update must not replace the previous version
        changes = changes.only(differs)
    before = after = catalogue_version(old.manifest)
    catalogue, largest = old.catalogue, 0.0
    if len(changes.rows):
        log.info(f"writing the catalogue with {len(changes.rows)} new, changed or retired items")
        with temporary_dir(folder) as temporary:
            new = _write_version(temporary, folder, old, changes)
            catalogue, largest = new.catalogue, _compare_untouched(old, new, changes.rows)
            after = catalogue_version(new.manifest)
            if not dry_run:
                _swap(temporary, folder)
    else:
        log.info(f"{folder} holds these {unchanged:,} items as they are: nothing to do")
    is_new = changes.rows >= old.catalogue.n_rows
    added = int(is_new.sum())
    _warn(old.catalogue, changes, is_new & catalogue.retired[changes.rows])
    has_vector = np.any([modality.present[changes.rows] for modality in catalogue.modalities.values()], axis=0)
    if without_vectors := int((is_new & ~catalogue.retired[changes.rows] & ~has_vector).sum()):
        log.warning(
            f"{without_vectors} of {added} new items have no vector of {', '.join(catalogue.modalities)}: nothing says "
            "where to recommend them. Give vectors, or the texts and pictures that the data folder's encoders read"
        )
    _warn_of_modalities_left_out(old.catalogue, changes, is_new & ~catalogue.retired[changes.rows] & has_vector)
    return ({"dry_run": True} if dry_run else {}) | {
        "bundle": str(folder),
        "updated": after != before and not dry_run,
        "catalogue_version": after,
        "previous": before,
        "items": catalogue.n_items,
        "added": added,
        "without_vectors": without_vectors,
        "changed": len(changes.rows) - added,
        "unchanged": unchanged,
        "retired": int(catalogue.retired.sum()),
        "largest_difference": largest,
        "seconds": round(time.monotonic() - started, 2),
    }


def _warn(before: Catalogue, changes: Changes, new_and_retired: Bools) -> None:
    """Log what a mistyped id or column name, or a forgotten ``--data``, looks like."""
    if new_and_retired.any():
        ids = changes.table[ITEM_ID].filter(pa.array(new_and_retired)).to_pylist()
        log.warning(f"{len(ids):,} retired items are not in the catalogue, such as {ids[0]!r}: are the ids right?")
    known = {*before.items.column_names, RETIRED}
    if more := [name for name in changes.table.column_names if name not in known]:
        log.warning(f"new columns, without a value for all other items: {', '.join(more)}")
    for name, count in changes.with_old_vectors(before).items():
        log.warning(f"{count:,} items have another {name} and keep its vector: --data or --modality brings a new one")


def _warn_of_modalities_left_out(before: Catalogue, changes: Changes, new: Bools) -> None:
    """Log which modalities nobody gave for ``new`` items, [item]; a row of NaN, or an empty text, says "has none"."""
    for name, modality in before.modalities.items():
        share = float(modality.present[FIRST_ITEM_ROW:].mean())
        if name in changes.vectors or not new.any() or not share:
            continue
        read = ", ".join(columns_of(modality.encoder))
        log.warning(
            f"{int(new.sum()):,} new items get no vector of {name}, which {share:.0%} of the items have; expected: "
            f"--modality {name}=FILE.npy, or --data with a folder whose catalogue holds the encoder of {name}"
            + (f" (`missrec features`; it reads {read})" if read else "")
        )


def rollback_catalogue(bundle: str | Path) -> dict[str, Any]:
    """Exchange a bundle with its previous version atomically; a second rollback undoes the first.

    Parameters
    ----------
    bundle : path

    Returns
    -------
    dict
        ``catalogue_version`` now, and ``previous``.

    Raises
    ------
    BundleError
        There is no previous version, or it is damaged.
    """
    folder = Path(bundle).absolute()
    previous = previous_of(folder)
    if not previous.is_dir():
        raise BundleError(f"{folder} has no version before", f"{previous.name} beside it", "nothing was changed")
    with locked(folder, wait=False, error=BundleError):
        before, after = (catalogue_version(verify_bundle(version)) for version in (folder, previous))
        exchange(previous, folder)
    return {"bundle": str(folder), "catalogue_version": after, "previous": before}


def previous_of(folder: Path) -> Path:
    """Return the path of a bundle's previous version."""
    return folder.with_name(f"{folder.name}.previous")


def _write_version(out: Path, folder: Path, old: LoadedBundle, changes: Changes) -> LoadedBundle:
    """Write the bundle with the changes into the folder ``out``, and return it as it is read back."""
    out.chmod(0o755)
    for name in _COPIED_FILES:
        shutil.copyfile(folder / name, out / name)
    extended = _extend_catalogue(old.catalogue, changes, out)
    interests = {"interests.centroids": old.model.interests.centroids}
    interests["interests.assignment"] = _assignment(old, extended, changes)
    write_catalogue(out, interests, extended)
    write_manifest(out, old.manifest.get("recount"))
    new = load_bundle(out)
    return with_index(out, new) if extended.n_rows >= SEARCH_FROM else new


def _extend_catalogue(catalogue: Catalogue, changes: Changes, folder: Path) -> Catalogue:
    """Return the catalogue with the changed items and vectors, new items after the existing ones."""
    n_rows = max(int(changes.rows.max()) + 1, catalogue.n_rows)
    names = [*catalogue.items.column_names, *changes.table.column_names]
    columns = {name: _column(name, catalogue, changes, n_rows) for name in dict.fromkeys(names)}
    modalities = {}
    for name, modality in catalogue.modalities.items():
        vectors = _zeros((n_rows, modality.width), folder)
        present = np.zeros(n_rows, bool)
        vectors[: catalogue.n_rows], present[: catalogue.n_rows] = modality.vectors, modality.present
        has_vector = changes.has_vector(name)
        if has_vector.any():
            rows = changes.rows[has_vector]
            vectors[rows], present[rows] = changes.vectors[name][has_vector], True
        modalities[name] = Modality(vectors, present, modality.encoder)
    return Catalogue(pa.table(columns), modalities, checked=True)


def _zeros(shape: tuple[int, int], folder: Path) -> Floats:
    """Return zeros, a large array in an unlinked file of ``folder``, whose pages the system may write back to disk."""
    if shape[0] * shape[1] < _MOST_IN_MEMORY:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _column(name: str, catalogue: Catalogue, changes: Changes, n_rows: int) -> pa.Array:
    """Return one column of the extended item table: the catalogue's values, replaced where the changes have one."""
    exists, is_given = name in catalogue.items.column_names, name in changes.table.column_names
    dtype = catalogue.items[name].type if exists else changes.table[name].type
    old = one_array(catalogue.items[name]) if exists else pa.nulls(catalogue.n_items, dtype)
    # Both are concatenated; source [item] is the position of every item's value in the result
    source = np.arange(n_rows - FIRST_ITEM_ROW)
    if name == TRAIN_COUNT or not is_given:  # popularity is that of the training
        new = pa.array([0], dtype) if name == TRAIN_COUNT else pa.nulls(1, dtype)  # of every new item
        source = np.minimum(source, len(old))
    else:
        new = changes.column(name, dtype)
        source[changes.rows - FIRST_ITEM_ROW] = len(old) + np.arange(len(changes.rows))
    return pa.concat_arrays([old, new]).take(pa.array(source))


def _assignment(old: LoadedBundle, extended: Catalogue, changes: Changes) -> torch.Tensor:
    """Return the interests of the extended catalogue, [modality, catalogue]: the nearest ones where vectors changed."""
    interests, rows = old.model.interests, changes.rows
    assignment = torch.zeros(len(extended.modalities), extended.n_rows, dtype=torch.int64)
    assignment[:, : old.catalogue.n_rows] = interests.assignment
    embeddings, mask = _modality_embeddings(old.model, extended, rows)
    nearest = nearest_interests(interests, embeddings, mask)  # [modality, changed item]
    for index, name in enumerate(extended.modalities):
        changed = torch.from_numpy(changes.has_vector(name) | (rows >= old.catalogue.n_rows))
        assignment[index, torch.from_numpy(rows)[changed]] = nearest[index, changed]
    return assignment


@torch.inference_mode()
def _modality_embeddings(model: MISSRec, catalogue: Catalogue, rows: Ints) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the modality embeddings of some rows, [modality, row, dim], and the mask of those that count."""
    embeddings, present = [], []
    for name, modality in catalogue.modalities.items():
        vectors = torch.from_numpy(modality.vectors[rows])
        if model.config.feature_scaling == "l2":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        embeddings.append(model.item_encoder.adapters[name](vectors))
        present.append(torch.from_numpy(modality.present[rows]))
    mask = torch.stack(present)
    return torch.stack(embeddings), mask if model.config.missing_modality == "masked" else torch.ones_like(mask)


@torch.inference_mode()
def _compare_untouched(old: LoadedBundle, new: LoadedBundle, rows: Ints) -> float:
    """Return the largest score difference of untouched items in random sessions of untouched items.

    Raises
    ------
    ParityError
        It exceeds `TOLERANCE`, or an item has another row.
    """
    untouched = np.ones(old.catalogue.n_rows, bool)
    untouched[:FIRST_ITEM_ROW] = False
    untouched[rows[rows < old.catalogue.n_rows]] = False
    item_knn = terms_of(old.model).item_knn
    if item_knn is not None:  # cold items are imputed from similar items, whose content may have changed
        untouched &= ~cold_item_mask(item_knn.frequency).numpy()
    pool = np.flatnonzero(untouched)
    if not len(pool):
        return 0.0
    rng = np.random.default_rng(0)
    length = min(old.model.config.max_sequence_length, 10)
    n_sessions = min(_CHECKED_SESSIONS, max(_MOST_IN_MEMORY // new.catalogue.n_rows, 1))
    sessions = torch.from_numpy(rng.choice(pool, (n_sessions, length)))
    scores = [_scores(bundle, sessions)[:, pool] for bundle in (old, new)]  # 2 x [session, untouched item]
    largest = float(torch.nan_to_num(scores[0] - scores[1], nan=0.0).abs().max())
    ids = [bundle.transform.look_up(old.transform.wire_ids) for bundle in (old, new)]
    if largest > TOLERANCE or not np.array_equal(ids[0], ids[1]):
        raise ParityError(
            f"items that were not touched would change their scores by {largest:.2g}", f"at most {TOLERANCE}",
            "the bundle stays as it is; export it again with the installed version",
        )  # fmt: skip
    return largest


def _scores(bundle: LoadedBundle, sessions: torch.Tensor) -> torch.Tensor:
    """Return the scores of the whole catalogue, [session, catalogue]."""
    model, vectors = bundle.model, bundle.model(sessions)
    if bundle.tables is None:
        return model.score(vectors, model.candidates(), sessions)
    scores = model.terms(bundle.tables.table.scan(vectors), sessions)
    return scores.index_fill_(1, model.excluded, -torch.inf)


def _swap(new: Path, folder: Path) -> None:
    """Exchange the new version with the bundle in one step; the old one becomes the previous version.

    The new one is under the name of the previous one before: a process that is killed in between loses neither.
    """
    previous = previous_of(folder)
    recover(previous)
    had_previous = previous.exists()
    if had_previous:
        exchange(new, previous)
    else:
        new.rename(previous)
    try:
        exchange(previous, folder)
    except OSError:
        if had_previous:
            exchange(new, previous)
        else:
            previous.rename(new)
        raise
