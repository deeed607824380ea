"""`missrec catalogue update`: items added, changed and retired in a bundle, without training.

The weights stay. Known items keep their rows, new ones are appended; a new or changed token belongs to the nearest of
the frozen interests. The new version must give every session of untouched items the scores it had, to 1e-6, or it does
not appear. The version before stays beside the bundle, for `missrec catalogue rollback`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from missrec_t4r.bundle.bundle import (
    SEARCH_FROM,
    LoadedBundle,
    load_bundle,
    with_index,
    write_catalogue,
    write_features,
)
from missrec_t4r.bundle.extend import nearest_interests
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
from missrec_t4r.io.atomic import exchange
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.ranking.terms.cold_start import cold_item_mask
from missrec_t4r.schema import (
    FIRST_ITEM_ROW,
    ITEM_ID,
    RETIRED,
    SCHEMA_FILE,
    SESSION_TRANSFORM_FILE,
    TRAIN_COUNT,
    UNKNOWN_ROW,
)

Vectors = npt.NDArray[np.float32]

TOLERANCE = 1e-6
"""Largest difference of an untouched item's score in an untouched session."""
_CHECKED_SESSIONS = 64
_MANY = 1 << 25
"""Numbers that are kept in memory: a vector table (128 MiB), or the scores of the sessions that are checked."""
_KEPT_FILES = (MODEL_FILE, WEIGHTS_FILE, SESSION_TRANSFORM_FILE, SCHEMA_FILE)


def update_catalogue(
    bundle: str | Path,
    items: str | Path | pa.Table,
    *,
    modalities: Mapping[str, Path | Vectors] | None = None,
    dry_run: bool = False,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Replace a bundle by one with another catalogue, atomically.

    Parameters
    ----------
    bundle : path
        Verified first.
    items : path or pyarrow.Table
        One line per item to add, change or retire: ``item_id`` and any columns. A column that is left out keeps its
        values; ``retired`` true or false retires an item or brings it back.
    modalities : mapping of str to path or ndarray [line, width], optional
        Vectors of the table's lines, one ``.npy`` per modality; a line of NaN gives none: a new item then lacks the
        modality, a known one keeps its vector.
    dry_run : bool
        Make and check the new version, then discard it.
    progress : Progress

    Returns
    -------
    dict
        The version before and now, items added, changed and retired, and the largest difference found by the check.

    Raises
    ------
    DataError, ModalityError
        Items or vectors do not fit the catalogue.
    ParityError
        An untouched item would change its score; the bundle stays as it is.
    """
    started, folder = time.monotonic(), Path(bundle).absolute()
    before = catalogue_version(verify_bundle(folder, only=()))
    old = load_bundle(folder)
    table = items if isinstance(items, pa.Table) else read_items(Path(items))
    rows = _rows(old.catalogue, table)
    given = {name: _vectors(name, part, old.catalogue, table.num_rows) for name, part in (modalities or {}).items()}
    progress.say(f"writing the catalogue with {table.num_rows} new, changed or retired items")
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        aside.chmod(0o755)
        grown = _grown(old.catalogue, table, rows, given, aside)
        for name in _KEPT_FILES:
            shutil.copyfile(folder / name, aside / name)
        _write(aside, old, grown, rows, given)
        new = load_bundle(aside)
        if grown.n_rows >= SEARCH_FROM:
            new = with_index(aside, new, progress)
        largest = _check(old, new, rows)
        after = catalogue_version(verify_bundle(aside, only=()))
        if after != before and not dry_run:  # the same change again would push the version before out of reach
            _swap(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    added = int((rows >= old.catalogue.n_rows).sum())
    return ({"dry_run": True} if dry_run else {}) | {
        "bundle": str(folder),
        "updated": after != before and not dry_run,
        "catalogue_version": after,
        "previous": before,
        "items": grown.n_items,
        "added": added,
        "changed": len(rows) - added,
        "retired": int(_retired(grown).sum()),
        "largest_difference": largest,
        "seconds": round(time.monotonic() - started, 2),
    }


def rollback_catalogue(bundle: str | Path) -> dict[str, Any]:
    """Exchange a bundle and the version before its last update, atomically; a second rollback undoes the first.

    Raises
    ------
    BundleError
        There is no version before, or it is damaged.
    """
    folder = Path(bundle).absolute()
    previous = previous_of(folder)
    if not previous.is_dir():
        raise BundleError(f"{folder} has no version before", f"{previous.name} beside it", "nothing was changed")
    before, after = (catalogue_version(verify_bundle(one)) for one in (folder, previous))
    exchange(previous, folder)
    return {"bundle": str(folder), "catalogue_version": after, "previous": before}


def previous_of(folder: Path) -> Path:
    """Return where the version before a bundle's last update is kept."""
    return folder.with_name(f"{folder.name}.previous")


def read_items(file: Path) -> pa.Table:
    """Read the table of items to add, change or retire."""
    try:
        return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{file} cannot be read ({error})", "a parquet file with a column item_id") from error


def _rows(catalogue: Catalogue, table: pa.Table) -> npt.NDArray[np.int64]:
    """Return the row of every line of the table: the known one, or the next free one."""
    if ITEM_ID not in table.column_names or not table.num_rows:
        raise DataError(f"items with columns {table.column_names}, {table.num_rows} lines", "item_id, one line or more")
    ids = table[ITEM_ID].combine_chunks()
    wanted = catalogue.items[ITEM_ID].type
    try:
        ids = ids.cast(wanted)
    except pa.ArrowInvalid as error:
        raise DataError(f"item ids of type {ids.type}", f"{wanted}, as in the catalogue") from error
    if ids.null_count or len(ids.unique()) != len(ids):
        raise DataError("the new items hold missing or repeated ids", "one line per item")
    rows = catalogue.rows_of(pa.array(ids.to_pylist(), wanted)).copy()
    fresh = rows == UNKNOWN_ROW
    rows[fresh] = catalogue.n_rows + np.arange(fresh.sum())
    return rows


def _vectors(name: str, part: Path | Vectors, catalogue: Catalogue, n_lines: int) -> Vectors:
    if name not in catalogue.modalities:
        raise ModalityError(f"modality {name!r}", f"one of {', '.join(catalogue.modalities)}: the model has no other")
    vectors = np.load(part, allow_pickle=False) if isinstance(part, Path) else part
    expected = n_lines, catalogue.modalities[name].width
    if vectors.shape != expected or vectors.dtype.kind != "f":
        raise ModalityError(f"modality {name!r} has {vectors.dtype} of shape {vectors.shape}", f"numbers {expected}")
    whole = np.isnan(vectors).all(1) | np.isfinite(vectors).all(1)
    if not whole.all():
        raise ModalityError(f"modality {name!r} holds NaN or infinity in line {int(np.argmin(whole))}", "whole vectors")
    return vectors.astype(np.float32)


def _grown(
    catalogue: Catalogue, table: pa.Table, rows: npt.NDArray[np.int64], given: Mapping[str, Vectors], folder: Path
) -> Catalogue:
    n_rows = max(int(rows.max()) + 1, catalogue.n_rows)
    places, n_items = rows - FIRST_ITEM_ROW, n_rows - FIRST_ITEM_ROW
    source = np.where(np.arange(n_items) < catalogue.n_items, np.arange(n_items), -1)
    columns = {}
    for name in [
        *catalogue.items.column_names,
        *(one for one in table.column_names if one not in catalogue.items.column_names),
    ]:
        columns[name] = _column(name, catalogue, table, source, places)
    modalities = {}
    for name, modality in catalogue.modalities.items():
        vectors = _zeros((n_rows, modality.width), folder)
        present = np.zeros(n_rows, bool)
        vectors[: catalogue.n_rows], present[: catalogue.n_rows] = modality.vectors, modality.present
        if name in given:
            told = ~np.isnan(given[name]).any(1)
            vectors[rows[told]], present[rows[told]] = given[name][told], True
        modalities[name] = Modality(vectors, present, modality.encoder)
    return Catalogue(pa.table(columns), modalities, checked=True)


def _zeros(shape: tuple[int, int], folder: Path) -> Vectors:
    """Return zeros, in a nameless file of ``folder`` where they are many: its pages need not stay in memory."""
    if shape[0] * shape[1] < _MANY:
        return np.zeros(shape, np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float32, "w+", shape=shape)


def _column(
    name: str, catalogue: Catalogue, table: pa.Table, source: npt.NDArray[np.int64], places: npt.NDArray[np.int64]
) -> pa.Array:
    """Return one column of the grown item table: the known values, over them the table's."""
    known = name in catalogue.items.column_names
    kind = catalogue.items[name].type if known else table[name].type
    old = catalogue.items[name].combine_chunks() if known else pa.nulls(catalogue.n_items, kind)
    old = pa.concat_arrays(old.chunks) if isinstance(old, pa.ChunkedArray) else old
    if name == TRAIN_COUNT or name not in table.column_names:
        filling = pa.array([0], kind) if name == TRAIN_COUNT else pa.nulls(1, kind)
        new, taken = filling, np.where(source < 0, len(old), source)
    else:
        try:
            new = table[name].combine_chunks().cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"column {name!r} of type {table[name].type}", f"{kind}, as in the catalogue") from error
        new = pa.concat_arrays(new.chunks) if isinstance(new, pa.ChunkedArray) else new
        taken = source.copy()
        taken[places] = len(old) + np.arange(len(places))
    return pa.concat_arrays([old, new]).take(pa.array(taken))


def _write(
    aside: Path, old: LoadedBundle, grown: Catalogue, rows: npt.NDArray[np.int64], given: Mapping[str, Vectors]
) -> None:
    interests = old.model.interests
    assignment = torch.zeros(len(grown.modalities), grown.n_rows, dtype=torch.int64)
    assignment[:, : old.catalogue.n_rows] = interests.assignment
    tokens, mask = _tokens(old.model, grown, rows)
    fresh = nearest_interests(interests, tokens, mask)
    for index, name in enumerate(grown.modalities):
        told = np.isfinite(given[name]).all(1) if name in given else np.zeros(len(rows), bool)
        changed = torch.from_numpy(told | (rows >= old.catalogue.n_rows))
        assignment[index, torch.from_numpy(rows)[changed]] = fresh[index, changed]
    state = {"interests.centroids": interests.centroids, "interests.assignment": assignment}
    write_catalogue(state, grown, aside / CATALOGUE_FILE)
    pq.write_table(grown.items, aside / ITEMS_FILE)
    write_features(aside, grown)
    write_manifest(aside)


@torch.inference_mode()
def _tokens(model: MISSRec, grown: Catalogue, rows: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of some rows of the grown catalogue, through the trained adapters, and which of them count."""
    stacked, present = [], []
    for name, modality in grown.modalities.items():
        vectors = torch.from_numpy(modality.vectors[rows])
        if model.config.feature_scaling == "l2":
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        stacked.append(model.item_encoder.adapters[name](vectors))
        present.append(torch.from_numpy(modality.present[rows]))
    mask = torch.stack(present)
    return torch.stack(stacked), mask if model.config.missing_modality == "masked" else torch.ones_like(mask)


@torch.inference_mode()
def _check(old: LoadedBundle, new: LoadedBundle, rows: npt.NDArray[np.int64]) -> float:
    """Return the largest difference of untouched items' scores in sessions of untouched items; refuse a visible one."""
    untouched = np.ones(old.catalogue.n_rows, bool)
    untouched[:FIRST_ITEM_ROW] = False
    untouched[rows[rows < old.catalogue.n_rows]] = False
    if old.model.item_knn is not None:  # items without events lean on others' content, which may have changed
        untouched &= ~cold_item_mask(old.model.item_knn.frequency).numpy()
    pool = np.flatnonzero(untouched)
    if not len(pool):
        return 0.0
    rng = np.random.default_rng(0)
    length = min(old.model.config.max_sequence_length, 10)
    n_sessions = min(_CHECKED_SESSIONS, max(_MANY // new.catalogue.n_rows, 1))
    sessions = torch.from_numpy(rng.choice(pool, (n_sessions, length)))
    scores = [_scores(bundle, sessions)[:, pool] for bundle in (old, new)]
    largest = float(torch.nan_to_num(scores[0] - scores[1], nan=0.0).abs().max())
    ids = [bundle.transform.look_up(old.transform.wire_ids) for bundle in (old, new)]
    if largest > TOLERANCE or not np.array_equal(ids[0], ids[1]):
        raise ParityError(
            f"items that were not touched would change their scores by {largest:.2g}", f"at most {TOLERANCE}",
            "the bundle stays as it is; export it again with the installed version",
        )  # fmt: skip
    return largest


def _scores(bundle: LoadedBundle, sessions: torch.Tensor) -> torch.Tensor:
    model, vectors = bundle.model, bundle.model(sessions)
    if bundle.tables is None:
        return model.score(vectors, model.candidates(), sessions)
    scores = model.add_history(bundle.tables.table.scan(vectors), sessions)
    return scores.index_fill_(1, model.excluded, -torch.inf)


def _retired(catalogue: Catalogue) -> npt.NDArray[np.bool_]:
    if RETIRED not in catalogue.items.column_names:
        return np.zeros(catalogue.n_items, bool)
    return np.asarray(catalogue.items[RETIRED].fill_null(False).to_numpy(), bool)


def _swap(aside: Path, folder: Path) -> None:
    """Put the new version in place in one step; the old one becomes the version before."""
    exchange(aside, folder)
    previous = previous_of(folder)
    if previous.exists():
        shutil.rmtree(previous)
    aside.rename(previous)
