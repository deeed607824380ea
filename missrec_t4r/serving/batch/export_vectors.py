"""`missrec vectors`: item and session vectors for another retrieval index, and the settings of the served score.

================= ==================================================================================================
items.parquet     ``item_id`` and ``recommendable`` in the order of the vectors
items.npy         [item, dim] float32: inner product with a session vector = the static score of the item
modality-X.npy    [item, dim] float32: unit-length embeddings of modality X, zero where missing
ids.npy           [item, dim] float32: unit-length ID embeddings, zero where untrained; only if the model has them
sessions.parquet  the sessions' own columns and ``usable``, in the order of the vectors; only with sessions
sessions.npy      [session, dim] float32, unit length; zero for a session without any known item
vectors.json      width, fusion, phi, history bias, active score terms: docs/howto/vectors.md
================= ==================================================================================================
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from missrec_t4r.arrays import Floats, Ints
from missrec_t4r.bundle.bundle import LoadedBundle, bundle_or_run, load_bundle
from missrec_t4r.bundle.manifest import WEIGHTS_FILE, verify_bundle
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.data.event_features import EventArrays, compact_event_features
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import BundleError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.io.json_files import write_json
from missrec_t4r.model.fast.fusion import mean_embeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.retrieval.ranker import compact
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, PADDING_ROW
from missrec_t4r.serving.batch.parquet_io import SessionFiles
from missrec_t4r.serving.batch.source import given_bundle
from missrec_t4r.serving.client.in_process import torch_threads
from missrec_t4r.serving.event_features import EventFeatureReader

log = logging.getLogger(__name__)

MARKER = "vectors.json"
USABLE = "usable"
"""Column of the written sessions: whether an item of the session is known."""
_SESSIONS_AT_A_TIME = 256


def vectors(
    out: str | Path,
    *,
    bundle: str | Path | None = None,
    run: str | Path | None = None,
    sessions: str | Path | None = None,
    items_column: str = "items",
    threads: int = 1,
) -> dict[str, Any]:
    """Write item vectors and session vectors, for another retrieval index.

    Parameters
    ----------
    out : path
        Folder to write; an older one of this command is replaced as a whole.
    bundle : path, optional
        Bundle written by `missrec export`, or folder of `missrec deploy`: the one that it serves.
    run : path, optional
        Run folder written by `missrec train`, in place of a bundle.
    sessions : path, optional
        Parquet of sessions, one per row, whose vectors are written too.
    items_column : str
        List column of raw item ids, oldest first.
    threads : int
        Number of torch threads.

    Returns
    -------
    dict
        Folder, items, sessions, width, seconds.
    """
    require_at_least(1, threads=threads)
    started = time.monotonic()
    with bundle_or_run(bundle and given_bundle(bundle), run) as source:
        loaded = load_bundle(source)
        weights = str(verify_bundle(source, only=())["files"][WEIGHTS_FILE]["sha256"])
    files = None
    if sessions is not None:
        event_columns = [column.name for column in loaded.model.event_columns]
        files = SessionFiles(sessions, items_column, loaded.catalogue.id_type, event_columns, written=(USABLE,))
    with atomic_write_dir(Path(out), MARKER, "folder of vectors", BundleError) as folder, torch_threads(threads):
        described = _write_items(folder, loaded) | {"weights_sha256": weights}
        n_sessions = 0 if files is None else _write_sessions(folder, loaded, files)
        write_json(folder / MARKER, described)
    return {
        "out": str(out),
        "items": loaded.catalogue.n_items,
        "sessions": n_sessions,
        "width": described["width"],
        "seconds": round(time.monotonic() - started, 2),
    }


@torch.inference_mode()
def session_vectors(model: MISSRec, rows: Ints, event_features: EventArrays | None = None) -> Floats:
    """Return the vector of every session; zero where no item is known.

    Parameters
    ----------
    model : MISSRec
    rows : ndarray [session, seq], int64
        Catalogue rows, 0-padded on the right.
    event_features : mapping of str to ndarray [session, seq] or [session, seq, size], optional
        Event features, aligned with ``rows``.

    Returns
    -------
    ndarray [session, dim]
    """
    device = model.item_encoder.presence.device
    item_ids = torch.from_numpy(compact(rows, model.config.max_sequence_length)).to(device)  # without unknown rows
    aligned = compact_event_features(event_features or {}, rows, model.config.max_sequence_length)
    usable = (item_ids > PADDING_ROW).any(1)  # [session]
    vectors = torch.zeros(len(rows), model.config.d_model, device=device)
    if bool(usable.any()):
        features = {name: torch.from_numpy(values).to(device)[usable] for name, values in aligned.items()}
        vectors[usable] = model(item_ids[usable], features)
    return vectors.cpu().numpy()


@torch.inference_mode()
def _write_items(folder: Path, loaded: LoadedBundle) -> dict[str, Any]:
    model, catalogue = loaded.model, loaded.catalogue
    candidates = model.candidates()
    items = slice(FIRST_ITEM_ROW, catalogue.n_rows)
    np.save(folder / "items.npy", mean_embeddings(candidates)[items].numpy())
    names = list(catalogue.modalities)
    for name, embeddings, present in zip(names, candidates.modality, candidates.mask, strict=True):
        np.save(folder / f"modality-{name}.npy", (embeddings * present[:, None])[items].numpy())
    if candidates.ids is not None and candidates.id_mask is not None:
        np.save(folder / "ids.npy", (candidates.ids * candidates.id_mask[:, None])[items].numpy())
    recommendable = pa.array(model.recommendable[items].numpy())
    pq.write_table(
        pa.table({ITEM_ID: catalogue.items[ITEM_ID], "recommendable": recommendable}), folder / "items.parquet"
    )
    phi = None if model.fusion.phi is None else model.fusion.phi.flatten()
    terms = terms_of(model)
    return {
        "format": 2,
        "width": model.config.d_model,
        "modalities": names,
        "fusion": model.fusion.name,
        "phi": phi.tolist() if phi is not None and len(phi) == 1 else None,
        "id_embeddings": candidates.ids is not None,
        "history_bias": None
        if terms.history_bias is None
        else float(terms.history_bias.bias + terms.history_bias.offset),
        "score_terms": {
            "item_knn": terms.item_knn is not None and terms.item_knn.active,
            "content_knn": terms.content_knn is not None and terms.content_knn.active,
            "cold_start": terms.cold_start is not None and terms.cold_start.active,
            "rare_items": terms.rare_items is not None and terms.rare_items.active,
        },
    }


def _write_sessions(folder: Path, loaded: LoadedBundle, files: SessionFiles) -> int:
    vectors: list[Floats] = []
    tables: list[pa.Table] = []
    reader = EventFeatureReader(loaded.model.event_columns)
    for batch in files.batches(_SESSIONS_AT_A_TIME, "encoding sessions"):
        sessions = Sessions.from_lists(loaded.transform(*batch.sessions))
        rows = sessions.padded(range(len(sessions)), max(1, int(sessions.lengths.max(initial=0))))
        features = [
            reader.encode(values, len(ids))
            for values, ids in zip(batch.event_features or [], batch.sessions, strict=bool(batch.event_features))
        ]
        vectors.append(session_vectors(loaded.model, rows, reader.stacked(features, rows)))
        usable = pa.array(vectors[-1].any(1), pa.bool_())
        tables.append(batch.passthrough.append_column(USABLE, usable))
    np.save(folder / "sessions.npy", np.concatenate(vectors))  # [session, dim]
    table = pa.concat_tables(tables)
    pq.write_table(table, folder / "sessions.parquet")
    known = int(np.count_nonzero(table[USABLE]))
    if 2 * known < len(table):
        log.warning(
            f"{len(table) - known:,} of {len(table):,} sessions hold no item of the catalogue and have a vector of "
            "zeros; are these the ids of the item table, and is this the bundle of this shop?"
        )
    return len(table)
