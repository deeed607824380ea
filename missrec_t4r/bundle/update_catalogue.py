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
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from missrec_t4r.arrays import Bools, Floats, Ints
from missrec_t4r.bundle.bundle import (
    SEARCH_FROM,
    LoadedBundle,
    load_bundle,
    with_index,
    write_catalogue,
    write_features,
)
from missrec_t4r.bundle.manifest import (
    CATALOGUE_FILE,
    ITEMS_FILE,
    MODEL_FILE,
    WEIGHTS_FILE,
    catalogue_version,
    verify_bundle,
    write_manifest,
)
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import BundleError, DataError, ModalityError, ParityError
from missrec_t4r.io.arrow_files import one_array, unequal
from missrec_t4r.io.atomic import exchange, temporary_dir
from missrec_t4r.io.lock import locked
from missrec_t4r.io.npy_files import read_npy
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.cold_start import cold_item_mask
from missrec_t4r.runs.extend import nearest_interests
from missrec_t4r.schema import (
    FIRST_ITEM_ROW,
    ITEM_ID,
    RETIRED,
    SCHEMA_FILE,
    SESSION_TRANSFORM_FILE,
    TRAIN_COUNT,
    UNKNOWN_ROW,
)

log = logging.getLogger(__name__)


TOLERANCE = 1e-6
"""Largest accepted difference of an untouched item's score in a session of untouched items."""
_CHECKED_SESSIONS = 64
_MOST_IN_MEMORY = 1 << 25
"""Most numbers kept in memory (128 MiB of float32): of a vector table, or of the scores of the checked sessions."""
_INTEGER = "^(0|-?[1-9][0-9]*)$"
"""How an integer is written: without a plus, spaces or leading zeros."""
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
    table = items if isinstance(items, pa.Table) else read_items(Path(items))
    with nullcontext() if dry_run else locked(folder):
        return _update(folder, table, modalities or {}, dry_run)


def _update(folder: Path, table: pa.Table, modalities: Mapping[str, Path | Floats], dry_run: bool) -> dict[str, Any]:
    started = time.monotonic()
    before = catalogue_version(verify_bundle(folder, only=()))
    old = load_bundle(folder)
    rows = _rows_of(old.catalogue, table)
    given = {name: _vectors(name, part, old.catalogue, table.num_rows) for name, part in modalities.items()}
    differs = _differs(old.catalogue, table, rows, given)
    unchanged = int((~differs).sum())
    if unchanged:  # an export of the whole catalogue; repeating an update must not replace the previous version
        table, rows = table.filter(pa.array(differs)), rows[differs]
        given = {name: vectors[differs] for name, vectors in given.items()}
    if not len(rows):
        log.info(f"{folder} holds these {unchanged:,} items as they are: nothing to do")
        return ({"dry_run": True} if dry_run else {}) | {
            "bundle": str(folder),
            "updated": False,
            "catalogue_version": before,
            "previous": before,
            "items": old.catalogue.n_items,
            "added": 0,
            "without_vectors": 0,
            "changed": 0,
            "unchanged": unchanged,
            "retired": int(old.catalogue.retired.sum()),
            "largest_difference": 0.0,
            "seconds": round(time.monotonic() - started, 2),
        }
    log.info(f"writing the catalogue with {table.num_rows} new, changed or retired items")
    with temporary_dir(folder) as temporary:
        temporary.chmod(0o755)
        extended = _extend_catalogue(old.catalogue, table, rows, given, temporary)
        for name in _COPIED_FILES:
            shutil.copyfile(folder / name, temporary / name)
        _write(temporary, old, extended, rows, given)
        new = load_bundle(temporary)
        if extended.n_rows >= SEARCH_FROM:
            new = with_index(temporary, new)
        largest = _compare_untouched(old, new, rows)
        after = catalogue_version(verify_bundle(temporary, only=()))
        if not dry_run:
            _swap(temporary, folder)
    is_new = rows >= old.catalogue.n_rows
    added = int(is_new.sum())
    has_vector = np.zeros(len(rows), bool)
    for modality in extended.modalities.values():
        has_vector |= modality.present[rows]
    without_vectors = int((is_new & ~has_vector).sum())
    if without_vectors:
        log.warning(
            f"{without_vectors} of {added} new items have no vector of {', '.join(extended.modalities)}: nothing tells "
            "where to recommend them. Give vectors, or the texts and pictures that the data folder's encoders read"
        )
    return ({"dry_run": True} if dry_run else {}) | {
        "bundle": str(folder),
        "updated": after != before and not dry_run,
        "catalogue_version": after,
        "previous": before,
        "items": extended.n_items,
        "added": added,
        "without_vectors": without_vectors,
        "changed": len(rows) - added,
        "unchanged": unchanged,
        "retired": int(extended.retired.sum()),
        "largest_difference": largest,
        "seconds": round(time.monotonic() - started, 2),
    }


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
        before, after = (catalogue_version(verify_bundle(one)) for one in (folder, previous))
        exchange(previous, folder)
    return {"bundle": str(folder), "catalogue_version": after, "previous": before}


def previous_of(folder: Path) -> Path:
    """Return the path of a bundle's previous version."""
    return folder.with_name(f"{folder.name}.previous")


def read_items(file: Path, item_column: str = ITEM_ID) -> pa.Table:
    """Read the table of items to add, change or retire; its id column gets the name ``item_id``.

    The unnamed row index that pandas may have written is left out.

    Raises
    ------
    DataError
        The file cannot be read, has no such column or missing ids, or ``retired`` is not true or false.
    """
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read ({error})", "a parquet file with a column of item ids") from error
    if item_column not in table.column_names:
        found = f"{file} has columns {table.column_names}"
        raise DataError(found, f"a column {item_column!r}", "name yours with --item-column")
    if item_column != ITEM_ID and ITEM_ID in table.column_names:
        log.info(f"{file}: column {ITEM_ID} is left out, {item_column} holds the ids")
        table = table.drop_columns([ITEM_ID])
    if index := [name for name in table.column_names if name.startswith("__index_level_")]:
        log.info(f"{file}: {', '.join(index)}, a row index of pandas, is left out")
        table = table.drop_columns(index)
    if missing := table[item_column].null_count:
        raise DataError(f"{missing} of {table.num_rows} items without an id", "one id per row", "leave these rows out")
    if RETIRED in table.column_names and not pa.types.is_boolean(kind := table[RETIRED].type):
        raise DataError(f"column {RETIRED!r} of type {kind}", "true or false", "convert it, or leave it out")
    return table.rename_columns([ITEM_ID if name == item_column else name for name in table.column_names])


def _rows_of(catalogue: Catalogue, table: pa.Table) -> Ints:
    """Return the catalogue row of every row of the table: an existing item's own, a new item's next free one."""
    if ITEM_ID not in table.column_names or not table.num_rows:
        raise DataError(
            f"items with columns {table.column_names}, {table.num_rows} rows", "a column item_id and at least one row"
        )
    ids = table[ITEM_ID].combine_chunks()
    id_type = catalogue.items[ITEM_ID].type
    try:
        if pa.types.is_string(id_type) and not _is_text(ids.type):  # as texts, 7 and "007" would be two items
            raise pa.ArrowInvalid(f"{ids.type} are no texts")
        if pa.types.is_boolean(ids.type) or pa.types.is_temporal(ids.type):  # Arrow makes integers of them
            raise pa.ArrowInvalid(f"{ids.type} are no ids")
        if pa.types.is_integer(id_type) and _is_text(ids.type):
            _require_integers(ids.cast(pa.string()))
        ids = ids.cast(id_type)
    except pa.ArrowInvalid as error:
        raise DataError(
            f"item ids of type {ids.type}",
            f"{id_type}, as in the catalogue",
            "write the ids as the item table has them",
        ) from error
    if ids.null_count or len(ids.unique()) != len(ids):
        raise DataError("the new items hold missing or repeated ids", "one row per item")
    rows = catalogue.rows_of(pa.array(ids.to_pylist(), id_type)).copy()
    new = rows == UNKNOWN_ROW
    rows[new] = catalogue.n_rows + np.arange(new.sum())
    return rows


def _require_integers(ids: pa.Array) -> None:
    """Refuse text ids that are not written as an integer is, as `missrec etl` does: "077" is not 77."""
    others = ids.drop_null().filter(pc.invert(pc.match_substring_regex(ids.drop_null(), _INTEGER)))
    if len(others):
        raise DataError(
            f"the item id {others[0].as_py()!r}, a text",
            "integers, as in the catalogue: 77 or '77'",
            "write the ids as the item table has them",
        )
    log.info(f"{len(ids):,} item ids are texts, and integers in the catalogue: they are read as integers")


def _is_text(kind: pa.DataType) -> bool:
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return str(value) in ("string", "large_string", "string_view")


def _differs(catalogue: Catalogue, table: pa.Table, rows: Ints, given: Mapping[str, Floats]) -> Bools:
    """Return which rows of the table are new, or hold another value or vector than the catalogue, [table row]."""
    is_old = rows < catalogue.n_rows
    differs, at = ~is_old, rows[is_old]
    changed = np.zeros(len(at), bool)
    for name in table.column_names:
        if name in (ITEM_ID, TRAIN_COUNT):
            continue
        new = one_array(table[name]).filter(pa.array(is_old))
        if name in catalogue.items.column_names:
            old = one_array(catalogue.items[name]).take(pa.array(at - FIRST_ITEM_ROW))
            changed |= unequal(old, _cast(new, old.type, name))
        else:
            changed |= new.is_valid().to_numpy(zero_copy_only=False)
    for name, vectors in given.items():
        modality, own = catalogue.modalities[name], vectors[is_old]
        other = (modality.vectors[at] != own).any(1) | ~modality.present[at]
        changed |= other & ~np.isnan(own).any(1)
    differs[is_old] = changed
    return differs


def _cast(column: pa.Array, dtype: pa.DataType, name: str) -> pa.Array:
    """Return a column of the table in the catalogue's type."""
    try:
        return column.cast(dtype)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {name!r} of type {column.type}", f"{dtype}, as in the catalogue") from error


def _vectors(name: str, part: Path | Floats, catalogue: Catalogue, n_lines: int) -> Floats:
    if name not in catalogue.modalities:
        raise ModalityError(f"modality {name!r}", f"one of {', '.join(catalogue.modalities)}: the model has no other")
    try:
        vectors = read_npy(part) if isinstance(part, Path) else part
    except (OSError, ValueError) as error:
        raise ModalityError(f"{part} cannot be read ({error})", "a .npy file of numbers", "check --modality") from error
    expected = n_lines, catalogue.modalities[name].width
    if vectors.shape != expected or vectors.dtype.kind != "f":
        raise ModalityError(f"modality {name!r} has {vectors.dtype} of shape {vectors.shape}", f"numbers {expected}")
    whole = np.isnan(vectors).all(1) | np.isfinite(vectors).all(1)
    if not whole.all():
        raise ModalityError(f"modality {name!r} holds NaN or infinity in row {int(np.argmin(whole))}", "whole vectors")
    return vectors.astype(np.float32)


def _extend_catalogue(
    catalogue: Catalogue, table: pa.Table, rows: Ints, given: Mapping[str, Floats], folder: Path
) -> Catalogue:
    """Return the catalogue with the table's items and vectors, new items after the existing ones."""
    n_rows = max(int(rows.max()) + 1, catalogue.n_rows)
    names = [*catalogue.items.column_names, *table.column_names]
    columns = {name: _column(name, catalogue, table, rows, n_rows) for name in dict.fromkeys(names)}
    modalities = {}
    for name, modality in catalogue.modalities.items():
        vectors = _zeros((n_rows, modality.width), folder)
        present = np.zeros(n_rows, bool)
        vectors[: catalogue.n_rows], present[: catalogue.n_rows] = modality.vectors, modality.present
        if name in given:
            has_vector = ~np.isnan(given[name]).any(1)
            vectors[rows[has_vector]], present[rows[has_vector]] = given[name][has_vector], True
        modalities[name] = Modality(vectors, present, modality.encoder)
    return Catalogue(pa.table(columns), modalities, checked=True)


def _zeros(shape: tuple[int, int], folder: Path) -> Floats:
    """Return zeros, a large array in an unlinked file of ``folder``, whose pages the system may write back to disk."""
    if shape[0] * shape[1] < _MOST_IN_MEMORY:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _column(name: str, catalogue: Catalogue, table: pa.Table, rows: Ints, n_rows: int) -> pa.Array:
    """Return one column of the extended item table: the catalogue's values, replaced where the table has one."""
    exists = name in catalogue.items.column_names
    dtype = catalogue.items[name].type if exists else table[name].type
    old = one_array(catalogue.items[name]) if exists else pa.nulls(catalogue.n_items, dtype)
    # Both are concatenated; source [item] is the position of every item's value in the result
    source = np.arange(n_rows - FIRST_ITEM_ROW)
    if name == TRAIN_COUNT or name not in table.column_names:  # popularity is that of the training
        new = pa.array([0], dtype) if name == TRAIN_COUNT else pa.nulls(1, dtype)  # of every new item
        source = np.minimum(source, len(old))
    else:
        new = _cast(one_array(table[name]), dtype, name)
        source[rows - FIRST_ITEM_ROW] = len(old) + np.arange(len(rows))
    return pa.concat_arrays([old, new]).take(pa.array(source))


def _write(folder: Path, old: LoadedBundle, extended: Catalogue, rows: Ints, given: Mapping[str, Floats]) -> None:
    """Write the files of the extended catalogue, with the interests of new and changed modality embeddings."""
    interests = old.model.interests
    assignment = torch.zeros(len(extended.modalities), extended.n_rows, dtype=torch.int64)  # [modality, catalogue]
    assignment[:, : old.catalogue.n_rows] = interests.assignment
    embeddings, mask = _modality_embeddings(old.model, extended, rows)
    nearest = nearest_interests(interests, embeddings, mask)  # [modality, row of the table]
    for index, name in enumerate(extended.modalities):
        has_vector = np.isfinite(given[name]).all(1) if name in given else np.zeros(len(rows), bool)
        changed = torch.from_numpy(has_vector | (rows >= old.catalogue.n_rows))
        assignment[index, torch.from_numpy(rows)[changed]] = nearest[index, changed]
    state = {"interests.centroids": interests.centroids, "interests.assignment": assignment}
    write_catalogue(state, extended, folder / CATALOGUE_FILE)
    pq.write_table(extended.items, folder / ITEMS_FILE)
    write_features(folder, extended)
    write_manifest(folder)


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
    """Exchange the new version with the bundle in one step; the old one becomes the previous version."""
    exchange(new, folder)
    previous = previous_of(folder)
    if previous.exists():
        shutil.rmtree(previous)
    new.rename(previous)
