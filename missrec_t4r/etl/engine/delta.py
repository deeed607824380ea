"""Incremental update with merge-on-read: sessions of affected users go to a delta file that overrides older rows.

The cost follows the increment: its events are encoded, their users are looked up in the user state by hash, and the
whole sessions of these users become one more file, ``deltas/00002.arrow`` (read by `missrec_t4r.data.session_files`).
The parquet files of the splits stay those of an older version until compaction (`compact.py`). Counts are kept
up to date by difference: the new sessions of the affected users less their old ones.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import ITEMS_FILE, Catalogue
from missrec_t4r.data.session_files import DELTA_FOLDER
from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.etl import item_table, outputs, splits
from missrec_t4r.etl.engine import sessionize
from missrec_t4r.etl.engine.executor import ThreadExecutor
from missrec_t4r.etl.engine.job import Job, make_plan
from missrec_t4r.etl.engine.reduce import reduce_chunks
from missrec_t4r.etl.engine.shuffle import EventEncoder, map_codes, read_batches
from missrec_t4r.etl.engine.user_state import STATE_FILE, STATE_FOLDER, count_events, load_users
from missrec_t4r.etl.engine.versions import Version
from missrec_t4r.etl.event_arithmetic import sum_counts
from missrec_t4r.etl.outputs import WORKFLOW_FOLDER
from missrec_t4r.etl.quality import checks
from missrec_t4r.io.arrow_files import one_array, write_arrow
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, SESSION_TRANSFORM_FILE, SPLITS, USER_ID


class Change(NamedTuple):
    """Differences of the folder's counts to the version before."""

    counts: Counter[str]
    """Events, users, and rows per split."""
    train_items: Ints
    """[item index], trailing zeros may be missing: occurrences in the training rows."""
    longest: int
    """Events of the longest session of the affected users (no difference)."""
    affected_users: int


NO_CHANGE = Change(Counter(), np.zeros(0, np.int64), 0, 0)


def split_sessions(state: pa.Table, common: Mapping[str, Any]) -> tuple[pa.Table, Change]:
    """Return the sessions of a state table, and what they add to the counts.

    Sessions are uncut; the columns ``train``, ``valid`` and ``test`` hold the events of each in the split's row.
    """
    sessions = sessionize.to_sessions(state, common) if sessionize.derives_sessions(common) else state
    offsets, lengths = splits.split_lengths(sessions, common)
    train_items = sessionize.count_train_items(sessions, offsets, lengths["train"])
    counts = Counter(events=count_events(state), users=state.num_rows)
    for split in SPLITS:
        counts[split] = int((lengths[split] > 0).sum())
        sessions = sessions.append_column(split, pa.array(lengths[split].astype(np.int32)))
    return sessions, Change(counts, train_items, int(np.diff(offsets).max(initial=0)), state.num_rows)


def write_delta(job: Job, old: Version, old_catalogue: Catalogue, work: Path) -> tuple[Path, dict[str, Any]]:
    """Write the files that an increment adds or changes into the working directory; all others stay those of ``old``.

    Parameters
    ----------
    job : Job
        An incremental update; its items and vectors contain the new rows of the item table.
    old, old_catalogue : Version, Catalogue
        Before the update.
    work : Path
        Working directory.

    Returns
    -------
    folder : Path
        Of these files.
    counts : dict
        As in the report, and the number of affected users.
    """
    shutil.rmtree(work, ignore_errors=True)  # of a killed run
    job.folder = work / f"delta-{old.number + 1}"
    job.folder.mkdir(parents=True)
    change, categories, old_categories = NO_CHANGE, old.state["categories"], old.state["categories"]
    old_longest = max(old.state.get("longest", 0), *(part["longest"] for part in old.state["parts"]))
    if job.run.files:
        events, common = encode_increment(job)
        change, categories = _write_sessions(job, old, events, common), common["categories"]
    longest, item_ids = max(change.longest, old_longest), one_array(job.items[ITEM_ID])
    longer = [name for name, values in categories.items() if len(values) > len(old_categories[name])]
    longer += [ITEM_ID] if len(item_ids) > old_catalogue.n_items else []
    if longer or longest > old_longest:
        _extend_encodings(job, old.folder, {ITEM_ID: item_ids.to_pylist(), **categories}, longer, longest)
    state = {name: old.state[name] for name in ("types", "valid_from", "test_from", "newest", "partitions", "parts")}
    state |= {"categories": categories, "longest": longest}
    write_json(job.folder / STATE_FOLDER / STATE_FILE, state, indent=None)
    catalogue = _write_catalogue(job, old.folder, old_catalogue, change.train_items)
    counts = Counter(events=old.report["events"], users=old.report["users"], **old.report["sessions"])
    counts.update(change.counts)
    rows = {split: counts.pop(split) for split in SPLITS}
    touched = {"touched": {"users": change.affected_users}}
    return job.folder, {**touched, **counts, **outputs.data_counts(catalogue, catalogue.train_count, rows)}


def _extend_encodings(
    job: Job, data: Path, vocabularies: Mapping[str, list[Any]], longer: Sequence[str], longest: int
) -> None:
    """Write schema, request transform and, where the folder has them, workflows with longer vocabularies."""
    folder = job.folder
    outputs.write_session_schema(data, folder, {**vocabularies, **job.run.derive.clock}, longest)
    transform = read_json(data / SESSION_TRANSFORM_FILE)
    for name in longer:
        if name == ITEM_ID:
            transform["item_id"]["items"] = len(vocabularies[name])
        else:
            transform["features"][name]["values"] = vocabularies[name]
    write_json(folder / SESSION_TRANSFORM_FILE, transform)
    if (data / WORKFLOW_FOLDER).is_dir():
        from missrec_t4r.etl.nvt.serialization import extend_workflows

        extend_workflows(data, folder, {name: pd.Series(vocabularies[name]) for name in longer})


def encode_increment(job: Job) -> tuple[pa.Table, dict[str, Any]]:
    """Return the new events with the folder's codes and types, and what `reduce.reduce_chunks` returns for them.

    Raises
    ------
    SchemaError, DataError
        They do not fit the folder.
    """
    plan = job.plan = make_plan(job)
    encoder = EventEncoder(plan, one_array(job.items[ITEM_ID]))
    tables = [encoder.encode(batch)[0] for chunk in plan.chunks for batch in read_batches(plan, chunk)]
    common = reduce_chunks(job, [encoder.statistics()], ThreadExecutor(1))
    maps = {name: np.asarray(codes, np.int32) for name, codes in common["maps"][0].items()}
    events = map_codes(pa.concat_tables(tables, promote_options="permissive"), maps)
    return sessionize.cast_columns(events, common["types"]), common


def _write_sessions(job: Job, old: Version, events: pa.Table, common: Mapping[str, Any]) -> Change:
    """Write sessions and state of the affected users as delta files; return the change of the counts."""
    events = events.filter(pa.array(events[ITEM_ID].to_numpy() < common["rows"]))
    if not events.num_rows:
        return NO_CHANGE
    users = one_array(events[USER_ID]).unique()
    users = users.take(pa.array(np.argsort(hash_ids(users), kind="stable")))
    known = load_users(old.folder, old.state["partitions"], users, hash_ids(users))
    state, counts = sessionize.extend_state(known, events, common)
    checks.note_users(job.run.findings, [counts], drop_duplicates=common["drop_duplicates"])
    sessions, after = split_sessions(state, common)
    _, before = split_sessions(state.take(pa.array([], pa.int64())) if known is None else known, common)
    file = f"{DELTA_FOLDER}/{old.number + 1:05}.arrow"
    sessions_file, state_file = job.folder / file, job.folder / STATE_FOLDER / file
    write_arrow(sessions, sessions_file)
    if sessionize.derives_sessions(common):
        write_arrow(state, state_file)
    else:  # sessions are the users' events, so the files are equal
        state_file.parent.mkdir(parents=True)
        link_or_copy(sessions_file, state_file)
    after.counts.subtract(before.counts)
    n_items = max(len(after.train_items), len(before.train_items))
    return after._replace(train_items=sum_counts([after.train_items, -before.train_items], n_items))


def _write_catalogue(job: Job, data: Path, old: Catalogue, train_items: Ints) -> Catalogue:
    """Write the catalogue with its new counts and items; without new items all but the item table are links."""
    target = job.folder / CATALOGUE_FOLDER
    unchanged = not job.new_rows and job.items.num_rows == old.n_items
    catalogue = old if unchanged else item_table.extend_catalogue(old, job.items, job.vectors)
    counts = sum_counts([old.train_count, train_items], catalogue.n_rows)
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
