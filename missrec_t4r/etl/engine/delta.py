"""missrec etl --update --delta: a night's users beside the plain splits, read instead of their older rows.

What it costs follows the night: its events are encoded, the users whom they concern are looked up in the state by
their hash, and their whole sessions become one more file, ``deltas/00002.arrow`` (`missrec_t4r.data.session_files`
reads
it). The parquet files of the splits stay as they are, a complete older version, until `compaction.py` writes them anew.
Counts are kept by what changed: the new sessions of these users less their old ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from missrec_t4r.data.catalogue import ITEMS_FILE, Catalogue
from missrec_t4r.data.session_files import DELTA_FOLDER, one_array
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl import outputs
from missrec_t4r.etl.engine import build as scale
from missrec_t4r.etl.engine import sessionize as partitions
from missrec_t4r.etl.engine.build import note_gathered
from missrec_t4r.etl.engine.executor import Threads
from missrec_t4r.etl.engine.sessionize import STATE_FILE, Ordered
from missrec_t4r.etl.engine.shuffle import ShardReader, batches_of, with_codes, write_json
from missrec_t4r.etl.engine.user_state import Known, load_user_state
from missrec_t4r.etl.nvt.extend_vocabulary import grow
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Change:
    """What a night changes: differences to the version before."""

    events: int
    users: int
    sessions: Mapping[str, int]
    """Rows per split."""
    trained: Ints
    """[row of the catalogue], or shorter: how much more often each item is in the training rows."""
    longest: int
    """Events of the longest session of the night's users (no difference)."""
    touched: int
    """Users whom the night's events concern."""


NOTHING = Change(0, 0, dict.fromkeys(SPLITS, 0), np.zeros(0, np.int64), 0, 0)


@dataclass(frozen=True)
class Divided:
    """Sessions of some users and how they are divided."""

    sessions: pa.Table
    """Whole; columns ``train``, ``valid`` and ``test`` say how many events of each are in the split's row."""
    rows: Mapping[str, int]
    trained: Ints
    longest: int

    @classmethod
    def of(cls, state: pa.Table, merged: Mapping[str, Any]) -> Divided:
        """Divide what is known of users."""
        sessions = partitions.sessions_of(state, merged) if partitions.derives(merged) else state
        offsets, lengths = partitions.prefixes(sessions, merged)
        rows = {split: int((lengths[split] > 0).sum()) for split in SPLITS}
        trained = partitions.trained(sessions, offsets, lengths["train"])
        for split in SPLITS:
            sessions = sessions.append_column(split, pa.array(lengths[split].astype(np.int32)))
        return cls(sessions, rows, trained, int(np.diff(offsets).max(initial=0)))


def add(
    job: scale.Job, old: Catalogue, data: Path, folder: Path, report: Mapping[str, Any], version: int
) -> dict[str, Any]:
    """Write what a night adds to a data folder into ``folder``; what is not there afterwards is the old version's.

    Parameters
    ----------
    job : scale.Job
        An update; its items and vectors hold the new lines of the item table already.
    old : Catalogue
        As it is.
    data : Path
        The folder as it is.
    report : mapping
        Its ``etl.json``.
    version : int
        Number of the new version.

    Returns
    -------
    dict
        Counts as in the report, and how many users were touched.
    """
    change, categories = NOTHING, job.old["categories"]
    if job.files:
        events, merged = read_increment(job, folder)
        change, categories = _add_events(job, data, folder, events, merged, version), merged["categories"]
    longest, ids = max(change.longest, longest_of(job.old)), one_array(job.items[ITEM_ID])
    known = job.old["categories"]
    grown = {name: pd.Series(values) for name, values in categories.items() if len(values) > len(known[name])}
    if len(ids) > old.n_items:
        grown[ITEM_ID] = ids.to_pandas()
    if grown or longest > longest_of(job.old):
        grow(data, folder, grown, longest)
    kept = {name: job.old[name] for name in ("types", "valid_from", "test_from", "newest", "partitions", "parts")}
    (folder / partitions.STATE_FOLDER).mkdir(exist_ok=True)
    write_json(folder / partitions.STATE_FOLDER / STATE_FILE, kept | {"categories": categories, "longest": longest})
    catalogue = _write_catalogue(job, old, data, folder, change.trained)
    sessions = {split: report["sessions"][split] + more for split, more in change.sessions.items()}
    events_now, users_now = report["events"] + change.events, report["users"] + change.users
    counts = outputs.counted(catalogue, catalogue.train_count, events_now, users_now, sessions)
    return counts | {"touched": {"users": change.touched}}


def longest_of(state: Mapping[str, Any]) -> int:
    """Return the events of the longest session of a data folder."""
    return max(state.get("longest", 0), *(part["longest"] for part in state["parts"]))


def read_increment(job: scale.Job, folder: Path) -> tuple[pa.Table, dict[str, Any]]:
    """Return the new events, encoded and in the folder's types, and what all events have in common.

    Raises
    ------
    SchemaError, DataError
        They do not fit the folder.
    """
    plan = scale.make_plan(job)
    reader = ShardReader(plan, one_array(job.items[ITEM_ID]))
    tables = [reader.encode(batch)[0] for chunk in plan.chunks for batch in batches_of(plan, chunk)]
    merged = scale.merge(job, plan, [reader.report()], folder, Threads(1))
    known = {name: np.asarray(values, np.int32) for name, values in merged["maps"][0].items()}
    events = with_codes(pa.concat_tables(tables, promote_options="permissive"), known)
    return partitions.with_types(events, merged["types"]), merged


def _add_events(
    job: scale.Job, data: Path, folder: Path, events: pa.Table, merged: Mapping[str, Any], version: int
) -> Change:
    """Write the sessions of the night's users and what is known of them; return what they change."""
    strange = events[ITEM_ID].to_numpy() >= merged["rows"]
    events = events.filter(pa.array(~strange)) if strange.any() else events
    if not events.num_rows:
        return NOTHING
    times = events[TIMESTAMP].to_numpy()
    day = partitions.order_of(one_array(events[USER_ID]), times)
    old = load_user_state(data, job.old["partitions"], day.users, day.hashes)
    state, repeated = _joined(day, old, partitions.values_of(events, events[ITEM_ID].to_numpy()), merged)
    clock = partitions.backwards(day.codes, times)
    note_gathered(job.findings, [{"repeated": repeated, "backwards": clock}], merged)
    now, before = Divided.of(state, merged), Divided.of(_as_state(day.users, old, state.schema), merged)
    files = [top / DELTA_FOLDER / f"{version:05}.arrow" for top in (folder, folder / partitions.STATE_FOLDER)]
    for file in files:
        file.parent.mkdir(parents=True)
    partitions.write_arrow(now.sessions, files[0])
    if partitions.derives(merged):
        partitions.write_arrow(state, files[1])
    else:  # a session is all that is known of a user
        link_or_copy(files[0], files[1])
    trained = np.zeros(max(len(now.trained), len(before.trained)), np.int64)
    trained[: len(now.trained)] += now.trained
    trained[: len(before.trained)] -= before.trained
    return Change(
        partitions.n_events(state) - int(old.sizes.sum()),
        len(day.users) - len(old.numbers),
        {split: now.rows[split] - before.rows[split] for split in SPLITS},
        trained,
        now.longest,
        len(day.users),
    )


def _joined(day: Ordered, old: Known, new: Mapping[str, Any], merged: Mapping[str, Any]) -> tuple[pa.Table, int]:
    """Return what is known of the night's users now, and how many of their events are repeats."""
    codes = np.concatenate([np.repeat(old.numbers, old.sizes), day.codes[day.order]])
    values = {name: column[day.order] for name, column in new.items()}
    if old.values:
        values = {name: np.concatenate([old.values[name], column]) for name, column in values.items()}
    order = partitions.packed_order(codes, values[TIMESTAMP], nearly=True)
    repeated = partitions.repeats(codes, values[TIMESTAMP], values[ITEM_ID], order)
    if merged["drop_duplicates"] and len(repeated):
        stay = np.ones(len(codes), bool)
        stay[repeated] = False
        codes, values = codes[stay], {name: column[stay] for name, column in values.items()}
        order = partitions.packed_order(codes, values[TIMESTAMP], nearly=True)
    return partitions.as_lists(Ordered(order, codes, day.users, day.hashes), values), len(repeated)


def _as_state(users: pa.Array, old: Known, schema: pa.Schema) -> pa.Table:
    """Return what was known of users as a state, in the order in which they were found."""
    offsets = pa.array(np.concatenate([[0], np.cumsum(old.sizes)]), pa.int32())
    columns = {USER_ID: users.take(pa.array(old.numbers))}
    for field in schema:
        if field.name.endswith(LIST_SUFFIX):
            values = old.values.get(field.name.removesuffix(LIST_SUFFIX), np.zeros(0, np.int64))
            columns[field.name] = pa.ListArray.from_arrays(offsets, pa.array(values, field.type.value_type))
    return pa.table(columns)


def _write_catalogue(job: scale.Job, old: Catalogue, data: Path, folder: Path, trained: Ints) -> Catalogue:
    """Write the catalogue with its new counts and items; without new items all other files are links."""
    place = folder / CATALOGUE_FOLDER
    same = not job.old["new_lines"] and job.items.num_rows == old.n_items
    catalogue = old if same else catalogues.extended_catalogue(old, job.items, job.vectors)
    counts = np.zeros(catalogue.n_rows, np.int64)
    counts[: old.n_rows] = old.train_count
    counts[: len(trained)] += trained
    catalogue = catalogues.with_train_count(catalogue, counts[FIRST_ITEM_ROW:])
    if not same:
        catalogue.save(place)
        return catalogue
    place.mkdir()
    for file in (data / CATALOGUE_FOLDER).iterdir():
        if file.name != ITEMS_FILE:
            link_or_copy(file, place / file.name)
    catalogue.write_items(place)
    return catalogue
