"""Incremental update with merge-on-read: sessions of affected users go to a delta file that overrides older rows.

The cost follows the increment: its events are encoded, their users are looked up in the user state by hash, and the
whole sessions of these users become one more file, ``deltas/00002.arrow`` (read by `missrec_t4r.data.session_files`).
The parquet files of the splits stay those of an older version until compaction (`compact.py`). Counts are kept
up to date by difference: the new sessions of the affected users less their old ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from missrec_t4r.arrays import AnyArray, Ints
from missrec_t4r.data.catalogue import ITEMS_FILE, Catalogue
from missrec_t4r.data.session_files import DELTA_FOLDER
from missrec_t4r.etl import item_table, outputs, splits
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.engine.executor import ThreadExecutor
from missrec_t4r.etl.engine.job import Job, make_plan
from missrec_t4r.etl.engine.ordering import (
    EventOrder,
    count_out_of_order,
    duplicate_positions,
    order_events,
    sort_by_code_and_time,
)
from missrec_t4r.etl.engine.reduce import reduce_chunks
from missrec_t4r.etl.engine.shuffle import EventEncoder, map_codes, read_batches
from missrec_t4r.etl.engine.user_state import (
    STATE_FILE,
    STATE_FOLDER,
    UserEvents,
    count_events,
    event_columns,
    load_user_events,
    to_state,
)
from missrec_t4r.etl.event_settings import CLOCK
from missrec_t4r.etl.outputs import WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.session_schema import write_session_schema
from missrec_t4r.io.arrow_files import one_array, write_arrow
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    FIRST_ITEM_ROW,
    ITEM_ID,
    LIST_SUFFIX,
    SESSION_TRANSFORM_FILE,
    SPLITS,
    TIMESTAMP,
    USER_ID,
)


@dataclass(frozen=True)
class CountChange:
    """Differences of the folder's counts to the version before."""

    events: int
    users: int
    sessions: Mapping[str, int]
    """Rows per split."""
    train_items: Ints
    """[item index], trailing zeros may be missing: occurrences in the training rows."""
    longest: int
    """Events of the longest session of the affected users (no difference)."""
    affected_users: int


NO_CHANGE = CountChange(0, 0, dict.fromkeys(SPLITS, 0), np.zeros(0, np.int64), 0, 0)


@dataclass(frozen=True)
class SplitSessions:
    """Sessions of some users and their lengths in every split."""

    sessions: pa.Table
    """Uncut; the columns ``train``, ``valid`` and ``test`` hold the events of each session in the split's row."""
    rows: Mapping[str, int]
    train_items: Ints
    longest: int

    @classmethod
    def from_state(cls, state: pa.Table, common: Mapping[str, Any]) -> SplitSessions:
        """Make sessions of a state table and split them."""
        sessions = sessionize.to_sessions(state, common) if sessionize.derives_sessions(common) else state
        offsets, lengths = splits.split_lengths(sessions, common)
        rows = {split: int((lengths[split] > 0).sum()) for split in SPLITS}
        train_items = sessionize.count_train_items(sessions, offsets, lengths["train"])
        for split in SPLITS:
            sessions = sessions.append_column(split, pa.array(lengths[split].astype(np.int32)))
        return cls(sessions, rows, train_items, int(np.diff(offsets).max(initial=0)))


def write_delta(
    job: Job, old: Catalogue, data: Path, folder: Path, report: Mapping[str, Any], version: int
) -> dict[str, Any]:
    """Write the files that an increment adds or changes into ``folder``; all others stay those of the old version.

    Parameters
    ----------
    job : Job
        An incremental update; its items and vectors contain the new rows of the item table.
    old : Catalogue
        Of the version before.
    data : Path
        The data folder, unchanged.
    folder : Path
        Empty.
    report : mapping
        ``etl.json`` of the version before.
    version : int
        Number of the new version.

    Returns
    -------
    dict
        Counts as in the report, and the number of affected users.
    """
    change, old_categories = NO_CHANGE, job.old["categories"]
    categories = old_categories
    if job.run.files:
        events, common = encode_increment(job, folder)
        change, categories = _write_sessions(job, data, folder, events, common, version), common["categories"]
    longest, item_ids = max(change.longest, longest_session(job.old)), one_array(job.items[ITEM_ID])
    longer = [name for name, values in categories.items() if len(values) > len(old_categories[name])]
    longer += [ITEM_ID] if len(item_ids) > old.n_items else []
    if longer or longest > longest_session(job.old):
        _extend_encodings(job, data, folder, {ITEM_ID: item_ids.to_pylist(), **categories}, longer, longest)
    state = {name: job.old[name] for name in ("types", "valid_from", "test_from", "newest", "partitions", "parts")}
    (folder / STATE_FOLDER).mkdir(exist_ok=True)
    write_json(folder / STATE_FOLDER / STATE_FILE, state | {"categories": categories, "longest": longest}, indent=None)
    catalogue = _write_catalogue(job, old, data, folder, change.train_items)
    sessions = {split: report["sessions"][split] + more for split, more in change.sessions.items()}
    n_events, n_users = report["events"] + change.events, report["users"] + change.users
    counts = outputs.data_counts(catalogue, catalogue.train_count, n_events, n_users, sessions)
    return counts | {"touched": {"users": change.affected_users}}


def _extend_encodings(
    job: Job, data: Path, folder: Path, vocabularies: Mapping[str, list[Any]], longer: Sequence[str], longest: int
) -> None:
    """Write schema, request transform and, where the folder has them, workflows with longer vocabularies."""
    clock = {name: values for name, values in CLOCK.items() if name in job.run.derive.time_features}
    write_session_schema(data, folder, {**vocabularies, **clock}, longest)
    transform = read_json(data / SESSION_TRANSFORM_FILE)
    for name in longer:
        if name == ITEM_ID:
            transform["item_id"]["items"] = len(vocabularies[name])
        else:
            transform["features"][name]["values"] = vocabularies[name]
    outputs.write_request_transform(transform, folder)
    if (data / WORKFLOW_FOLDER).is_dir():
        from missrec_t4r.etl.nvt.extend_vocabulary import extend_workflows

        extend_workflows(data, folder, {name: pd.Series(vocabularies[name]) for name in longer})


def longest_session(state: Mapping[str, Any]) -> int:
    """Return the events of the longest session, from the content of ``state.json``."""
    return max(state.get("longest", 0), *(part["longest"] for part in state["parts"]))


def encode_increment(job: Job, folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Return the new events with the folder's codes and types, and what `reduce.reduce_chunks` returns for them.

    Raises
    ------
    SchemaError, DataError
        They do not fit the folder.
    """
    plan = make_plan(job)
    encoder = EventEncoder(plan, one_array(job.items[ITEM_ID]))
    tables = [encoder.encode(batch)[0] for chunk in plan.chunks for batch in read_batches(plan, chunk)]
    common = reduce_chunks(job, plan, [encoder.statistics()], folder, ThreadExecutor(1))
    maps = {name: np.asarray(codes, np.int32) for name, codes in common["maps"][0].items()}
    events = map_codes(pa.concat_tables(tables, promote_options="permissive"), maps)
    return sessionize.cast_columns(events, common["types"]), common


def _write_sessions(
    job: Job, data: Path, folder: Path, events: pa.Table, common: Mapping[str, Any], version: int
) -> CountChange:
    """Write sessions and state of the affected users as delta files; return the change of the counts."""
    unknown = events[ITEM_ID].to_numpy() >= common["rows"]
    events = events.filter(pa.array(~unknown)) if unknown.any() else events
    if not events.num_rows:
        return NO_CHANGE
    times = events[TIMESTAMP].to_numpy()
    new = order_events(one_array(events[USER_ID]), times)
    old = load_user_events(data, job.old["partitions"], new.users, new.hashes)
    state, n_duplicates = _merge_events(new, old, event_columns(events, events[ITEM_ID].to_numpy()), common)
    counts = {"duplicates": n_duplicates, "out_of_order": count_out_of_order(new.codes, times)}
    checks.note_users(job.run.findings, [counts], drop_duplicates=common["drop_duplicates"])
    after = SplitSessions.from_state(state, common)
    before = SplitSessions.from_state(_state_before(new.users, old, state.schema), common)
    sessions_file, state_file = (top / DELTA_FOLDER / f"{version:05}.arrow" for top in (folder, folder / STATE_FOLDER))
    for file in (sessions_file, state_file):
        file.parent.mkdir(parents=True)
    write_arrow(after.sessions, sessions_file)
    if sessionize.derives_sessions(common):
        write_arrow(state, state_file)
    else:  # sessions are the users' events, so the files are equal
        link_or_copy(sessions_file, state_file)
    train_items = np.zeros(max(len(after.train_items), len(before.train_items)), np.int64)
    train_items[: len(after.train_items)] += after.train_items
    train_items[: len(before.train_items)] -= before.train_items
    return CountChange(
        count_events(state) - int(old.sizes.sum()),
        len(new.users) - len(old.users),
        {split: after.rows[split] - before.rows[split] for split in SPLITS},
        train_items,
        after.longest,
        len(new.users),
    )


def _merge_events(
    new: EventOrder, old: UserEvents, columns: Mapping[str, AnyArray], common: Mapping[str, Any]
) -> tuple[pa.Table, int]:
    """Return the new state of the affected users, and the number of duplicates among their new events."""
    codes = np.concatenate([np.repeat(old.users, old.sizes), new.codes[new.order]])  # [old and new event]
    merged = {name: column[new.order] for name, column in columns.items()}
    if old.columns:
        merged = {name: np.concatenate([old.columns[name], column]) for name, column in merged.items()}
    # Old events are sorted within each source file, and so are the new ones: a few sorted runs.
    order = sort_by_code_and_time(codes, merged[TIMESTAMP], nearly_sorted=True)
    duplicates = duplicate_positions(codes, merged[TIMESTAMP], merged[ITEM_ID], order)
    n_duplicates = int((duplicates >= old.sizes.sum()).sum())
    if common["drop_duplicates"] and len(duplicates):
        kept = np.ones(len(codes), bool)
        kept[duplicates] = False
        codes, merged = codes[kept], {name: column[kept] for name, column in merged.items()}
        order = sort_by_code_and_time(codes, merged[TIMESTAMP], nearly_sorted=True)
    return to_state(EventOrder(order, codes, new.users, new.hashes), merged), n_duplicates


def _state_before(users: pa.Array, old: UserEvents, schema: pa.Schema) -> pa.Table:
    """Return the old events of the affected users as a state table, users in the order of ``old``."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(old.sizes)]), pa.int32())
    columns = {USER_ID: users.take(pa.array(old.users))}
    for field in schema:
        if field.name.endswith(LIST_SUFFIX):
            values = old.columns.get(field.name.removesuffix(LIST_SUFFIX), np.zeros(0, np.int64))
            columns[field.name] = pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type))
    return pa.table(columns)


def _write_catalogue(job: Job, old: Catalogue, data: Path, folder: Path, train_items: Ints) -> Catalogue:
    """Write the catalogue with its new counts and items; without new items all but the item table are links."""
    target = folder / CATALOGUE_FOLDER
    unchanged = not job.old["new_rows"] and job.items.num_rows == old.n_items
    catalogue = old if unchanged else item_table.extend_catalogue(old, job.items, job.vectors)
    counts = np.zeros(catalogue.n_rows, np.int64)
    counts[: old.n_rows] = old.train_count
    counts[: len(train_items)] += train_items
    catalogue = item_table.with_train_count(catalogue, counts[FIRST_ITEM_ROW:])
    if not unchanged:
        catalogue.save(target)
        return catalogue
    target.mkdir()
    for file in (data / CATALOGUE_FOLDER).iterdir():
        if file.name != ITEMS_FILE:
            link_or_copy(file, target / file.name)
    catalogue.write_items(target)
    return catalogue
