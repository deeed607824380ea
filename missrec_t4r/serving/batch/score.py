"""`missrec score`: the answers of the server for a file of sessions, without a server. For batch jobs and e-mail.

The two models of the repository run in this process (`InProcessTransport`), so the answers are the served ones: same
transform,
same rules, same order of ties. Memory follows the batch, never the file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from missrec_t4r.bundle.from_run import bundle_or_run
from missrec_t4r.bundle.id_encoder import RawId
from missrec_t4r.bundle.manifest import MODEL_FILE
from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.batch.parquet_io import SessionFiles, TableWriter, replace_dir
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import Recommendation, typed_id

_SESSIONS_AT_A_TIME = 1024
LAYOUTS = ("lists", "long")


def score(
    sessions: str | Path,
    out: str | Path,
    *,
    bundle: str | Path | None = None,
    run: str | Path | None = None,
    top_k: int = 10,
    exclude_seen: bool = False,
    exclude: Sequence[str | int] | None = None,
    rules: Mapping[str, Any] | None = None,
    items_column: str = "items",
    rules_column: str | None = None,
    exclude_column: str | None = None,
    layout: Literal["lists", "long"] = "lists",
    threads: int = 1,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Write recommendations for every session of a file: the answers of the server, without a server.

    Parameters
    ----------
    sessions : path
        Parquet file or folder, one row per session. Other columns (such as user ids) are copied to the output; list
        columns named like the model's event features are used with the items.
    out : path
        Parquet file to write.
    bundle : path, optional
        Bundle written by `missrec export`.
    run : path, optional
        Run folder written by `missrec train`, in place of a bundle.
    top_k : int
        Recommendations per session.
    exclude_seen : bool
        Exclude the session's own items.
    exclude : sequence of str or int, optional
        Item ids never to recommend; comma-separated.
    rules : mapping, optional
        Filters and diversity caps for all sessions: {"where": {"in_stock": true}, "at_most": {"brand": 2}}.
    items_column : str
        List column of raw item ids, oldest first.
    rules_column : str, optional
        Text column with rules per session, as JSON; for a column in both, the session's rule applies.
    exclude_column : str, optional
        List column of item ids that are not recommended to the session.
    layout : {"lists", "long"}
        lists: one row per session. long: one row per recommended item, with its rank from 1.
    threads : int
        Number of torch threads.

    Returns
    -------
    dict
        Sessions, rows written, fallbacks, sessions with unknown ids, seconds.

    Raises
    ------
    DataError
        The sessions cannot be read.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout!r}", " or ".join(LAYOUTS))
    started = time.monotonic()
    with (
        bundle_or_run(bundle, run, progress=progress) as folder,
        MISSRecClient.of_bundle(folder, threads=threads) as client,
    ):
        files = SessionFiles(
            sessions, items_column, client.id_type, event_feature_names(folder), rules_column, exclude_column
        )
        banned: list[RawId] = [typed_id(item, client.id_type) for item in exclude or []]
        counts = {"sessions": 0, "fallbacks": 0, "with_unknown_items": 0}
        total = -(-files.rows // _SESSIONS_AT_A_TIME)
        with replace_dir(out) as aside, TableWriter(aside) as writer:
            batches = files.batches(_SESSIONS_AT_A_TIME)
            for batch in progress.track(batches, f"scoring {files.rows} sessions", total):
                answers = client.recommend(
                    batch.sessions,
                    top_k,
                    exclude_seen=exclude_seen,
                    exclude=_exclusions(banned, batch.exclude),
                    rules=rules if batch.rules is None else [_both(rules or {}, own) for own in batch.rules],
                    side=batch.event_features,
                )
                writer.write(_table(batch.carried, answers, client.id_type, layout))
                counts["sessions"] += len(answers)
                counts["fallbacks"] += sum(answer.fallback for answer in answers)
                counts["with_unknown_items"] += sum(answer.unknown_items > 0 for answer in answers)
            if not writer.rows:
                writer.write(_table(files.schema.empty_table().select(files.carried), [], client.id_type, layout))
            rows = writer.rows
    return {"out": str(Path(out)), "rows": rows, **counts, "seconds": round(time.monotonic() - started, 2)}


def _exclusions(everywhere: list[RawId], own: list[list[RawId]] | None) -> list[RawId] | list[list[RawId]] | None:
    if own is None:
        return everywhere or None
    return [[*everywhere, *ids] for ids in own]


def _both(everywhere: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return rules with the session's own over those of all; what is no mapping is left for the ranker to refuse."""
    joined = {**everywhere, **own}
    for part in everywhere.keys() & own.keys():
        if isinstance(everywhere[part], Mapping) and isinstance(own[part], Mapping):
            joined[part] = {**everywhere[part], **own[part]}
    return joined


def event_feature_names(bundle: str | Path) -> list[str]:
    """Return the side features that a bundle's model was trained with."""
    described = json.loads((Path(bundle) / MODEL_FILE).read_bytes())
    return [str(column["name"]) for column in described.get("side_features", [])]


def _table(carried: pa.Table, answers: Sequence[Recommendation], id_type: str, layout: str) -> pa.Table:
    ids = pa.string() if id_type == "string" else pa.int64()
    offsets = np.concatenate([[0], np.cumsum([len(answer.item_ids) for answer in answers])]).astype(np.int32)
    item_ids = pa.array([item_id for answer in answers for item_id in answer.item_ids], ids)
    scores = pa.array([score for answer in answers for score in answer.scores], pa.float32())
    unknown = pa.array([answer.unknown_items for answer in answers], pa.int32())
    fallback = pa.array([answer.fallback for answer in answers], pa.bool_())
    if layout == "lists":
        added: dict[str, pa.Array] = {
            ITEM_ID: pa.ListArray.from_arrays(offsets, item_ids),
            "score": pa.ListArray.from_arrays(offsets, scores),
            "unknown_items": unknown,
            "fallback": fallback,
        }
        return _beside(carried, added)
    lengths = np.diff(offsets)
    owner = np.repeat(np.arange(len(answers)), lengths)
    rank = np.arange(len(owner)) - np.repeat(offsets[:-1], lengths) + 1
    taken = {"unknown_items": unknown.take(pa.array(owner)), "fallback": fallback.take(pa.array(owner))}
    added = {"rank": pa.array(rank, pa.int32()), ITEM_ID: item_ids, "score": scores} | taken
    return _beside(carried.take(pa.array(owner)), added)


def _beside(carried: pa.Table, added: dict[str, pa.Array]) -> pa.Table:
    kept = [name for name in carried.column_names if name not in added]
    return pa.table({name: carried[name] for name in kept} | added)
