"""What the chunks of the fast path found, brought together: types, categories in the order of their codes, findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, TIMESTAMP, UNKNOWN_ROW, USER_ID
from missrec_t4r.workflows import checks
from missrec_t4r.workflows.shards import Plan


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
