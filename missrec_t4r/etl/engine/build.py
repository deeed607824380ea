"""The fast path of ``missrec etl``: files -> shards -> partitions -> data folder, in bounded memory.

    write_shard  per chunk of the input: ids encoded, events to the partition of their user's hash
    merge        what the chunks found: unknown items in input order, categories by frequency, types, findings
    gather       per partition: users whole, time-ordered        divide  sessions, splits, parquet

Every task leaves a file that says "finished" in the working folder, a hidden folder beside the output. A run that was
killed continues there if input and settings are the same; the output appears by one rename. What it makes equals what
the fitted NVTabular workflow makes of the same events (`tests/workflows/test_scale.py`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl import item_table as catalogues
from missrec_t4r.etl import outputs, splits
from missrec_t4r.etl.engine import sessionize as partitions
from missrec_t4r.etl.engine.executor import Engine
from missrec_t4r.etl.engine.shuffle import (
    ITEMS_FILE,
    PLAN_FILE,
    Codes,
    Plan,
    cut_chunks,
    plain,
    write_json,
    write_shard,
)
from missrec_t4r.etl.engine.workdir import one_of, unified_schema
from missrec_t4r.etl.event_settings import CLOCK, EventSettings
from missrec_t4r.etl.nvt import kernels
from missrec_t4r.etl.nvt import workflows as sessions
from missrec_t4r.etl.quality import checks
from missrec_t4r.io.atomic import link_or_copy
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, LIST_SUFFIX, SPLITS, TIMESTAMP, UNKNOWN_ROW, USER_ID

EVENTS_PER_PARTITION = 500_000
_SAMPLE = 1000


@dataclass
class Job:
    """One run: what to read, how, and what is known of it so far.

    Parameters
    ----------
    files : sequence of Path
        Parquet files of events.
    items : pyarrow.Table
        Item table with ids in their normal type; vectors : modality vectors, rows as in it.
    names : mapping of str to str
        Raw to our name of user, item and time.
    settings : dict
        As they go into the report.
    """

    files: Sequence[Path]
    items: pa.Table
    vectors: catalogues.Vectors
    names: Mapping[str, str]
    settings: dict[str, Any]
    modality_files: Mapping[str, Path]
    derive: EventSettings
    findings: checks.Findings
    drop_columns: Sequence[str] = ()
    categorical_columns: Sequence[str] = ()
    partitions: int | None = None
    old: dict[str, Any] = field(default_factory=dict)
    """For an update: folder, types, categories and boundaries of the version before."""
    catalogue: Catalogue | None = None
    """For an update: the catalogue that grows."""


def build(job: Job, top: Path, engine: Engine) -> tuple[Path, dict[str, Any]]:
    """Write everything of a data folder into a folder in ``top``; return it and the counts."""
    plan = make_plan(job)
    work = prepare_folder(top, plan, job)
    shards = engine.run(write_shard, _each(work, len(plan.chunks)), "reading events")
    if not job.old and not sum(shard["rows"] for shard in shards):
        raise DataError("no event has user, item and time", "at least one complete row", "check the three columns")
    merged = merge(job, plan, shards, work, engine)
    write_json(work / partitions.MERGED_FILE, merged)
    numbers = touched(work, plan) if job.old else list(range(plan.partitions))
    tasks = [(str(work), number) for number in numbers]
    note_gathered(job.findings, engine.run(partitions.gather, tasks, "grouping sessions"), merged)
    if merged["split"] == "time" and merged["valid_from"] is None:
        merged["valid_from"], merged["test_from"] = _boundaries(work, plan.partitions)
        job.settings |= {name: merged[name] for name in ("valid_from", "test_from")}
    write_json(work / partitions.DIVIDE_FILE, merged)
    engine.run(partitions.divide, tasks, "writing the splits")
    if job.old:
        _take_over(job, work, sorted(set(range(plan.partitions)) - set(numbers)))
    return work / "out", _finish(job, plan, merged, work) | ({"touched": {"partitions": numbers}} if job.old else {})


def make_plan(job: Job) -> Plan:
    """Read the files' schemas and decide on chunks, partitions and columns.

    Raises
    ------
    SchemaError, DataError
        The files lack columns, differ, or are no parquet.
    """
    schema = unified_schema(job.files, job.names, job.findings)
    empty = pa.table([plain(pa.chunked_array([], kind)) for kind in schema.types], names=schema.names)
    renamed = [job.names.get(name, name) for name in schema.names]
    clashing = [name for name in schema.names if name in job.names.values() and name not in job.names]
    job.findings.add(
        "column_name_taken", len(clashing), f"columns {clashing} are left out: other columns take their names"
    )
    kept = [index for index, name in enumerate(schema.names) if name not in clashing]
    empty = empty.rename_columns([f"{name}.{i}" if i not in kept else name for i, name in enumerate(renamed)]).select(
        kept
    )
    features = checks.event_features(empty, job.drop_columns, job.findings)
    texts = [name for name in features if pa.types.is_string(empty[name].type)]
    job.derive.check(features, texts)
    if missing := [name for name in job.categorical_columns if name not in features]:
        raise SchemaError(f"categorical columns {missing} are no event columns", f"some of {features}")
    kinds = {name: "category" if name in texts or name in job.categorical_columns else "number" for name in features}
    chunks = cut_chunks(job.files)
    rows = sum(chunk.rows for chunk in chunks)
    count = job.partitions or max(1, -(-rows // EVENTS_PER_PARTITION))
    time = empty[TIMESTAMP].type
    numeric = pa.types.is_integer(time) or pa.types.is_floating(time)
    if job.old and features != job.settings["event_features"]:
        known = job.settings["event_features"]
        raise SchemaError(f"the new events have columns {features}", f"{known} as before", "see --drop-column")
    job.settings["event_features"] = features
    return Plan(chunks, min(count, 65_535), dict(job.names), kinds, not numeric)


def prepare_folder(top: Path, plan: Plan, job: Job) -> Path:
    """Return the folder of this job in the working folder: that of a killed run, or a new one; others go."""
    known = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in map(Path, job.files)]
    ids = pd.util.hash_array(job.items[ITEM_ID].to_pandas().to_numpy())
    told = json.dumps(
        [known, plan.partitions, plan.names, plan.features, job.settings, job.old.get("version")], default=str
    )
    work = one_of(top, hashlib.sha256(told.encode() + ids.tobytes()).hexdigest()[:16])
    if not (work / PLAN_FILE).is_file():
        for name in (
            "shards",
            "survey",
            "keep",
            "done",
            partitions.STATE_FOLDER,
            *(f"out/{split}" for split in SPLITS),
        ):
            (work / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(job.items.select([ITEM_ID]), work / ITEMS_FILE)
        plan.save(work)
    return work


def merge(job: Job, plan: Plan, shards: Sequence[dict[str, Any]], work: Path, engine: Engine) -> dict[str, Any]:
    """Bring together what the chunks found, filter, and fix rows, codes and types for all partitions."""
    unknown = Codes(job.items[ITEM_ID].type)
    n_rows = FIRST_ITEM_ROW + job.items.num_rows
    maps: list[dict[str, list[int]]] = [
        {ITEM_ID: (unknown.of(pa.array(shard["unknown"], unknown.values.type)) + n_rows).tolist()} for shard in shards
    ]
    append = job.settings["unknown_items"] == "append"
    note_shards(job.findings, plan, shards, len(unknown.values), append)
    merged: dict[str, Any] = {
        "maps": maps,
        "rows": n_rows + (len(unknown.values) if append else 0),
        "types": job.old["types"] if job.old else _types(plan, shards, work),
        "drop_duplicates": job.settings["drop_duplicates"],
        "filtered": False,
        "old": job.old.get("folder"),
        "split": job.settings["split"],
        "valid_from": job.settings["valid_from"],
        "test_from": job.settings["test_from"],
        "max_events": job.settings["max_events"],
        **derived(job.derive),
        "newest": job.settings["newest"] if job.old else max(s["newest"] for s in shards if s["newest"] is not None),
    }
    job.settings["newest"] = merged["newest"]
    job.derive.check_clock(merged["newest"])
    categories = {name: common_values(shards, name) for name, kind in plan.features.items() if kind == "category"}
    for name, (_, _, codes) in categories.items():
        for chunk, values in zip(maps, codes, strict=True):
            chunk[name] = values
    if append and len(unknown.values):
        job.items, job.vectors = with_items(job.items, job.vectors, unknown.values)
    rare = max(job.settings["k_core"], job.settings["min_item_count"]) > 0
    dropped = not append and len(unknown.values) > 0
    if not job.old and (rare or dropped or job.settings["drop_duplicates"]):
        write_json(work / partitions.SURVEY_FILE, merged)
        _filter(job, plan, merged, work, engine)
        counts = engine.run(partitions.count_codes, _each(work, plan.partitions), "counting categories")
        categories = {
            name: (values, summed([c[name] for c in counts], len(values)), codes)
            for name, (values, _, codes) in categories.items()
        }
        merged["filtered"] = True
    merged["categories"] = {}
    for name, (values, count, _) in categories.items():
        ordered, places = by_frequency(values, count, job.old.get("categories", {}).get(name))
        merged["categories"][name] = ordered
        for chunk in maps:
            chunk[name] = [int(places[code]) for code in chunk[name]]
    return merged | derived(job.derive, merged["categories"])


def derived(derive: EventSettings, categories: Mapping[str, Sequence[Any]] | None = None) -> dict[str, Any]:
    """Return what the tasks have to know of what is derived; weights by code once the categories are known."""
    told: dict[str, Any] = {
        "session_gap": derive.session_gap,
        "time_features": list(derive.time_features),
        "weights": None,
    }
    if derive.weights and categories is not None:
        by_code = [derive.other_weight] * FIRST_ITEM_ROW
        by_code += [derive.weights.get(str(kind), derive.other_weight) for kind in categories[derive.weight_column]]
        told["weights"] = {"column": derive.weight_column, "by_code": by_code}
    return told


def _types(plan: Plan, shards: Sequence[dict[str, Any]], work: Path) -> dict[str, str]:
    """Return the types of time and numbers: as narrow as all chunks allow."""
    if plan.time_is_date:
        time = "int64" if all(shard["whole"] for shard in shards) else "double"
    else:
        time = number_type(shards, plan, TIMESTAMP, work)
    numbers = {name: number_type(shards, plan, name, work) for name, kind in plan.features.items() if kind == "number"}
    return {TIMESTAMP: time, **numbers}


def with_items(items: pa.Table, vectors: catalogues.Vectors, added: pa.Array) -> tuple[pa.Table, catalogues.Vectors]:
    """Append items of which only the id is known; they have no modality."""
    items = pa.concat_tables([items, pa.table({ITEM_ID: added})], promote_options="default")
    blank = {name: np.zeros((len(added), array.shape[1]), np.float32) for name, array in vectors.items()}
    return items, {name: np.concatenate([array, blank[name]]) for name, array in vectors.items()}


def touched(work: Path, plan: Plan) -> list[int]:
    """Return the partitions that the shards have events for."""
    sizes = np.zeros(plan.partitions, np.int64)
    for file in sorted((work / "shards").glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            for at in range(reader.num_record_batches):
                sizes[at % plan.partitions] += reader.get_batch(at).num_rows
    return [int(number) for number in np.flatnonzero(sizes)]


def _filter(job: Job, plan: Plan, merged: dict[str, Any], work: Path, engine: Engine) -> None:
    """Decide which events, users and items stay, and write it down for every partition."""
    numbers = list(range(plan.partitions))
    surveyed = engine.run(partitions.survey, [(str(work), n) for n in numbers], "looking for what is rare")
    note_gathered(job.findings, surveyed, merged)
    loaded = [np.load(partitions.place(work, "survey", n, "npz")) for n in numbers]
    alive = np.concatenate([part["alive"] for part in loaded])
    items = np.concatenate([part["items"] for part in loaded])
    sizes = [len(part["alive"]) for part in loaded]
    least, once = job.settings["k_core"], job.settings["min_item_count"]
    if not alive.any():
        raise DataError("no event is on an item of the item table", "matching ids", "check both id columns")
    if once > 0:
        alive &= np.bincount(items[alive], minlength=int(items.max()) + 1)[items] >= once
    if least > 0:
        first, users = 0, []
        for part in loaded:
            users.append(part["users"].astype(np.int64) + first)
            first += int(part["users"].max(initial=-1)) + 1
        at = np.flatnonzero(alive)
        alive[at] = kernels.core([np.concatenate(users)[at], items[at]], np.ones(len(at), np.int64), least)
    if not alive.any():
        raise DataError(
            f"k_core={least} with min_item_count={once} leaves no event", "at least one", "lower the numbers"
        )
    for number, mask in zip(numbers, np.split(alive, np.cumsum(sizes)[:-1]), strict=True):
        np.save(partitions.place(work, "keep", number, "npy"), mask)
    if max(least, once) > 0:
        stays = np.zeros(FIRST_ITEM_ROW + job.items.num_rows, bool)
        stays[items[alive]] = True
        rows = np.full(max(len(stays), int(items.max()) + 1), -1, np.int64)
        rows[np.flatnonzero(stays)] = FIRST_ITEM_ROW + np.arange(int(stays.sum()))
        np.save(partitions.place(work, "keep", None, "npy"), rows)
        keep = np.flatnonzero(stays[FIRST_ITEM_ROW:])
        job.items = job.items.take(pa.array(keep))
        job.vectors = {name: array[keep] for name, array in job.vectors.items()}


def _take_over(job: Job, work: Path, numbers: Sequence[int]) -> None:
    """Link what an update did not touch into the new version."""
    old = Path(job.old["folder"])
    for number in numbers:
        for ending in ("arrow", "json", "npy"):
            file = partitions.place(old, partitions.STATE_FOLDER, number, ending)
            place = partitions.place(work, partitions.STATE_FOLDER, number, ending)
            if file.is_file() and not place.exists():
                link_or_copy(file, place)
        for split in SPLITS:
            file = old / split / f"part_{number:05}.parquet"
            if file.is_file() and not (work / "out" / split / file.name).exists():
                link_or_copy(file, work / "out" / split / file.name)
        write_json(partitions.place(work, "done", number, "json"), job.old["parts"][number])


def _finish(job: Job, plan: Plan, merged: dict[str, Any], work: Path) -> dict[str, Any]:
    """Write what is common to all partitions: catalogue, workflows, schema."""
    out = work / "out"
    done = [json.loads(partitions.place(work, "done", n, "json").read_text()) for n in range(plan.partitions)]
    known = [json.loads(partitions.place(work, "state", n, "json").read_text()) for n in range(plan.partitions)]
    rows = {name: sum(part["sessions"][name] for part in done) for name in SPLITS}
    splits.check_lengths({name: np.array([rows[name]]) for name in SPLITS})
    if job.catalogue is None:
        catalogue = catalogues.build_catalogue(job.items, job.vectors, job.modality_files, job.settings["fingerprints"])
    else:
        catalogue = catalogues.extended_catalogue(job.catalogue, job.items, job.vectors)
    counts = np.zeros(catalogue.n_rows, np.int64)
    for number in range(plan.partitions):
        part = np.load(partitions.place(work, "state", number, "npy"))
        counts[: len(part)] += part
    item_ids = catalogue.items[ITEM_ID].combine_chunks()
    categories = {name: pd.Series(values) for name, values in merged["categories"].items()}
    with tempfile.TemporaryDirectory() as storage:
        workflow = sessions.build_session_workflow(
            item_ids,
            Path(storage) / "sessions",
            categories=categories,
            numbers=[name for name, kind in plan.features.items() if kind == "number"],
            max_events=merged["max_events"],
            derive=EventSettings(**{**vars(job.derive), "newest": merged["newest"]}),
        )
        sessions.fit(workflow, sample(work, plan, merged, item_ids, categories))
        longest = max(part["longest"] for part in done)
        outputs.write_workflow(workflow, longest, out, pickled=job.settings["save_nvtabular_workflow"])
        clock = {name: values for name, values in CLOCK.items() if name in merged["time_features"]}
        outputs.write_request(
            item_ids,
            out,
            Path(storage),
            job.settings["max_sequence_length"],
            outputs.feature_codes([*plan.features, *job.derive.columns], categories | clock),
        )
    outputs.write_catalogue(catalogue, counts, out)
    shutil.rmtree(out / partitions.STATE_FOLDER, ignore_errors=True)  # of a run that was killed after this line
    (work / partitions.STATE_FOLDER).rename(out / partitions.STATE_FOLDER)
    kept = {name: merged[name] for name in ("types", "categories", "valid_from", "test_from", "newest")}
    write_json(
        out / partitions.STATE_FOLDER / partitions.STATE_FILE, kept | {"partitions": plan.partitions, "parts": done}
    )
    events, users = (sum(part[name] for part in known) for name in ("events", "users"))
    return outputs.counted(catalogue, counts, events, users, rows)


def sample(
    work: Path, plan: Plan, merged: Mapping[str, Any], item_ids: pa.Array, categories: Mapping[str, pd.Series]
) -> pd.DataFrame:
    """Return some events as the workflow meets them: raw ids and values, types as in the whole."""
    for number in range(plan.partitions):
        table = partitions.read_arrow(work / partitions.STATE_FOLDER / f"{number:05}.arrow").slice(0, _SAMPLE)
        if table.num_rows:
            break
    lists = {name.removesuffix(LIST_SUFFIX): column for name, column in partitions.lists_of(table).items()}
    sizes = lists[ITEM_ID].value_lengths().to_numpy()
    columns: dict[str, Any] = {USER_ID: np.repeat(table[USER_ID].to_pandas().to_numpy(), sizes)}
    for name, column in lists.items():
        values = column.flatten().to_numpy()
        if name == ITEM_ID:
            columns[name] = item_ids.take(pa.array(values - FIRST_ITEM_ROW)).to_pandas().to_numpy()
        elif name in categories:
            columns[name] = categories[name].to_numpy()[values - FIRST_ITEM_ROW]
        else:
            columns[name] = values
    return pd.DataFrame(columns)


def _each(work: Path, count: int) -> list[tuple[str, int]]:
    return [(str(work), index) for index in range(count)]


def _boundaries(work: Path, count: int) -> tuple[float, float]:
    times = []
    for number in range(count):
        known = partitions.read_arrow(work / partitions.STATE_FOLDER / f"{number:05}.arrow")
        times.append(partitions.lists_of(known)[TIMESTAMP + LIST_SUFFIX].values.to_numpy().copy())
    return splits.default_boundaries(np.concatenate(times))


# What the chunks of the fast path found, brought together: types, categories in the order of their codes, findi


def number_type(shards: Sequence[dict[str, Any]], plan: Plan, name: str, work: Path) -> str:
    """Return the type of a number column: integers stay so if no chunk had a null there."""
    kinds = set()
    for file in sorted((work / "shards").glob("*.arrow")):
        with pa.memory_map(str(file)) as source:
            kinds.add(str(pa.ipc.open_file(source).schema.field(name).type))
    if name == TIMESTAMP:
        return "int64" if kinds == {"int64"} else "double"
    return "int64" if kinds == {"int64"} and not any(shard["nulls"].get(name) for shard in shards) else "float"


def common_values(shards: Sequence[dict[str, Any]], name: str) -> tuple[list[Any], list[int], list[list[int]]]:
    """Return the values of a category in the order of their first event, their counts, and every chunk's codes."""
    numbers: dict[Any, int] = {}
    counts: list[int] = []
    codes = []
    for shard in shards:
        found = shard["categories"].get(name, {"values": [], "counts": []})
        codes.append([numbers.setdefault(value, len(numbers)) for value in found["values"]])
        counts += [0] * (len(numbers) - len(counts))
        for code, count in zip(codes[-1], found["counts"], strict=True):
            counts[code] += count
    return list(numbers), counts, codes


def by_frequency(values: list[Any], counts: Sequence[int], old: list[Any] | None) -> tuple[list[Any], Any]:
    """Return the values in the order of their codes, and the code of each; old ones keep theirs."""
    first = list(old or [])
    known = {value: place for place, value in enumerate(first)}
    there = [number for number, count in enumerate(counts) if count and values[number] not in known]
    new = sorted(there, key=lambda number: (-counts[number], values[number])) if not old else there
    ordered = first + [values[number] for number in new]
    at = {value: FIRST_ITEM_ROW + place for place, value in enumerate(ordered)}
    return ordered, [at.get(value, UNKNOWN_ROW) for value in values]


def summed(parts: Sequence[Sequence[int]], size: int) -> list[int]:
    """Return the sum of counts of different lengths, [size]."""
    total = np.zeros(size, np.int64)
    for part in parts:
        total[: len(part)] += np.asarray(part, np.int64)
    return total.tolist()


def note_shards(
    findings: checks.Findings, plan: Plan, shards: Sequence[dict[str, Any]], unknown: int, append: bool
) -> None:
    """Add to the findings what the chunks report."""
    add, total = findings.add, sum(shard["rows"] for shard in shards)
    for name in (USER_ID, ITEM_ID, TIMESTAMP):
        add(f"null_{name}", sum(shard["nulls"].get(name, 0) for shard in shards), f"events without {name} are left out")
    checks.refuse_mixed_units(sum(shard["seconds"] for shard in shards), sum(shard["finer"] for shard in shards))
    add("time_negative", sum(shard["negative"] for shard in shards), "times before 1970 are kept; check the unit")
    late = sum(shard["late"] for shard in shards)
    add("time_out_of_range", late, "times after the year 2100 are kept; are they milliseconds?")
    strange = sum(shard["strange"] for shard in shards)
    if append:
        add("orphan_items", unknown, f"items that only events know ({strange}) were appended")
        if strange == total:
            add("no_item_matches", unknown, "no event is on an item of the item table; are the ids the same?")
    else:
        add("orphan_events", strange, f"events on {unknown} items without a line are left out")
    for name, kind in plan.features.items():
        nulls = sum(shard["nulls"].get(name, 0) for shard in shards)
        checks.note_nulls(findings, name, nulls, text=kind == "category")
        checks.note_repaired(findings, name, sum(shard["repaired"].get(name, 0) for shard in shards))


def note_gathered(findings: checks.Findings, gathered: Sequence[dict[str, Any]], merged: Mapping[str, Any]) -> None:
    """Add to the findings what the partitions report."""
    done = "are left out" if merged["drop_duplicates"] else "are kept; --drop-duplicates leaves them out"
    repeated = sum(part.get("repeated", 0) for part in gathered)
    findings.add("duplicate_events", repeated, f"repeated (user, item, time) {done}")
    findings.add("very_long_users", sum(part.get("very_long", 0) for part in gathered), checks.VERY_LONG)
    backwards = sum(part.get("backwards", 0) for part in gathered)
    findings.add("time_backwards", backwards, "events of a user not in the order of time were sorted")
