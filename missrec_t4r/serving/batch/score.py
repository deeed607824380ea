"""`missrec score`: recommendations for a file of sessions, without a server, for batch jobs and e-mail.

The two served models run in this process (`InProcessTransport`), so the recommendations equal those of a server: same
ID encoding, same business rules, same order of ties. Memory depends on the batch, not on the file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.bundle.bundle import bundle_or_run
from missrec_t4r.bundle.id_encoder import RawId
from missrec_t4r.bundle.manifest import MANIFEST_FILE, MODEL_FILE
from missrec_t4r.config.checks import require_at_least, require_choices
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.io.key_names import read_with_current_keys
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.batch.parquet_io import ITEMS_COLUMN, SessionBatch, SessionFiles, session_file_of
from missrec_t4r.serving.batch.parts import write_in_parts
from missrec_t4r.serving.batch.source import given_bundle
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import Recommendation, typed_id

log = logging.getLogger(__name__)

_SESSIONS_AT_A_TIME = 2048
"""Of one part of an unfinished job, and so in memory."""
_FORMAT = 2
"""Of the parts of an unfinished job: those of another format are not used."""
_LISTS = (ITEM_ID, "score", "unknown_items", "fallback")
_WRITTEN = {"lists": _LISTS, "long": ("rank", *_LISTS)}
"""Columns that are added, by layout."""
LAYOUTS = tuple(_WRITTEN)


def score(
    sessions: str | Path | None = None,
    out: str | Path | None = None,
    *,
    data: str | Path | None = None,
    users: Sequence[str] | None = None,
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
) -> dict[str, Any]:
    """Write recommendations for every session of a file, or every user of a data folder: those of the server.

    A job that was interrupted goes on where it was when the same command is given again.

    Parameters
    ----------
    sessions : path, optional
        Parquet file or folder, one row per session. Other columns (such as user ids) are copied to the output; list
        columns named like the model's event features are used with the items.
    out : path
        Parquet file to write.
    data : path, optional
        Data folder, in place of sessions: all its users, with all their events.
    users : sequence of str, optional
        Some users of the data folder; comma-separated.
    bundle : path, optional
        Bundle written by `missrec export`, or folder of `missrec deploy`: the one that it serves.
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
        Text column with rules per session, as JSON; where --rules names the same column, the session's rule applies.
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
    require_at_least(1, top_k=top_k, threads=threads)
    require_choices(layout=(layout, LAYOUTS))
    started, source = time.monotonic(), _source(sessions, data, users)
    if out is None:
        raise ConfigError("no --out", "the parquet file to write", "give --out FILE")
    with (
        bundle_or_run(bundle and given_bundle(bundle), run) as folder,
        MISSRecClient.of_bundle(folder, threads=threads) as client,
        source as file,
    ):
        features = event_feature_names(folder)
        if data is not None and features:
            log.warning(
                f"the event features {', '.join(features)} count as missing: a data folder holds them encoded; "
                "to use them, give their raw values with --sessions"
            )
        files = SessionFiles(
            file,
            ITEMS_COLUMN if data is not None else items_column,
            client.id_type,
            features if data is None else (),
            rules_column,
            exclude_column,
            _WRITTEN[layout],
        )
        files.refuse_as_output(Path(out))
        excluded: list[RawId] = [typed_id(item, client.id_type) for item in exclude or []]

        def compute(batch: SessionBatch) -> tuple[pa.Table, dict[str, int]]:
            recommendations = client.recommend(
                batch.sessions,
                top_k,
                exclude_seen=exclude_seen,
                exclude=_exclusions(excluded, batch.exclude),
                rules=rules if batch.rules is None else [_merge_rules(rules or {}, own) for own in batch.rules],
                side=batch.event_features,
            )
            counts = {
                "sessions": len(recommendations),
                "fallbacks": sum(recommendation.fallback for recommendation in recommendations),
                "with_unknown_items": sum(recommendation.unknown_items > 0 for recommendation in recommendations),
            }
            return _table(batch.passthrough, recommendations, client.id_type, layout), counts

        settings = [top_k, exclude_seen, excluded, rules, rules_column, exclude_column, layout, items_column]
        digests = [file_digest(file) for file in (*files.files, folder / MANIFEST_FILE)]
        made_from = json.dumps([_FORMAT, settings, digests], sort_keys=True, default=str)
        batches = files.batches(_SESSIONS_AT_A_TIME, f"scoring {files.rows:,} sessions")
        rows, counts = write_in_parts(Path(out), hashlib.sha256(made_from.encode()).hexdigest(), batches, compute)
    if 2 * counts["fallbacks"] > counts["sessions"]:
        log.warning(
            f"{counts['fallbacks']:,} of {counts['sessions']:,} sessions hold no item of the catalogue and got "
            "the most popular items; are these the ids of the item table, and is this the bundle of this shop?"
        )
    return {"out": str(Path(out)), "rows": rows, **counts, "seconds": round(time.monotonic() - started, 2)}


def _source(
    sessions: str | Path | None, data: str | Path | None, users: Sequence[str] | None
) -> AbstractContextManager[Path]:
    """Return the file or folder of sessions, which for a data folder exists while the context lasts.

    Raises
    ------
    ConfigError
        Both or neither of the two are given, or users of no data folder.
    """
    if data is not None and sessions is None:
        return session_file_of(Path(data), users)
    if sessions is None or data is not None:
        found = "neither --sessions nor --data" if data is None else "both --sessions and --data"
        raise ConfigError(found, "one of the two", "give --sessions FILE, or --data FOLDER")
    if users is not None:
        raise ConfigError("--users without --data", "the data folder of these users", "give --data FOLDER")
    return nullcontext(Path(sessions))


def _exclusions(for_all: list[RawId], per_session: list[list[RawId]] | None) -> list[RawId] | list[list[RawId]] | None:
    if per_session is None:
        return for_all or None
    return [[*for_all, *ids] for ids in per_session]


def _merge_rules(for_all: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the rules of all sessions with those of one session, which take precedence; the ranker validates them."""
    merged = {**for_all, **own}
    for part in for_all.keys() & own.keys():
        if isinstance(for_all[part], Mapping) and isinstance(own[part], Mapping):
            merged[part] = {**for_all[part], **own[part]}
    return merged


def event_feature_names(bundle: str | Path) -> list[str]:
    """Return the names of the event features that a bundle's model was trained with."""
    content = read_with_current_keys(Path(bundle) / MODEL_FILE)
    return [str(column["name"]) for column in content.get("event_features", [])]


def _table(passthrough: pa.Table, answers: Sequence[Recommendation], id_type: str, layout: str) -> pa.Table:
    """Return the answers of a batch in the requested layout, beside the copied columns."""
    ids = pa.string() if id_type == "string" else pa.int64()
    added: dict[str, pa.Array] = {
        ITEM_ID: pa.array([answer.item_ids for answer in answers], pa.list_(ids)),
        "score": pa.array([answer.scores for answer in answers], pa.list_(pa.float32())),
        "unknown_items": pa.array([answer.unknown_items for answer in answers], pa.int32()),
        "fallback": pa.array([answer.fallback for answer in answers], pa.bool_()),
    }
    if layout == "long":
        session = pc.list_parent_indices(added[ITEM_ID])  # [recommended item]
        ranks = [rank for answer in answers for rank in range(1, len(answer.item_ids) + 1)]
        added = {
            "rank": pa.array(ranks, pa.int32()),
            ITEM_ID: added[ITEM_ID].flatten(),
            "score": added["score"].flatten(),
            "unknown_items": added["unknown_items"].take(session),
            "fallback": added["fallback"].take(session),
        }
        passthrough = passthrough.take(session)
    return pa.table(dict(zip(passthrough.column_names, passthrough.columns, strict=True)) | added)
