"""``missrec report``: what a data folder is like, as JSON and as one HTML page, against the last run and a gate.

The page is self-contained: styles and plots are inside, nothing is loaded. The gate is a YAML file of bounds; a measure
out of bounds raises `GateError`, after the report is written, and the command ends with exit code 3.
"""

from __future__ import annotations

import difflib
import json
import logging
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from missrec_t4r.errors import ConfigError, GateError
from missrec_t4r.etl.quality.html import page
from missrec_t4r.etl.quality.statistics import Everything, measure
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.io.hashing import data_digest
from missrec_t4r.io.json_files import write_json

log = logging.getLogger(__name__)

REPORT_FILE, PREVIOUS_FILE = "report.json", "previous.json"
_RELATIVE = ("events", "users", "items", "session_length_mean")
_DRIFT = ("drift.popularity", "drift.session_lengths", "drift.new_popular", *(f"drift.{name}" for name in _RELATIVE))


def report(
    data: str | Path,
    out: str | Path,
    *,
    previous: str | Path | None = None,
    gate: str | Path | None = None,
    now: float | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Report on a data folder (JSON and HTML), measure drift since the last report, and apply a quality gate.

    Parameters
    ----------
    data : path
        Data folder written by `missrec etl` or `missrec catalogue adopt`.
    out : path
        Folder of the report. The report already in it is the last run that drift is measured against; if it is of
        the same data, this run repeats it and is compared with what that one was compared with.
    previous : path, optional
        report.json of the last run, if it is elsewhere.
    gate : path, optional
        Quality gate: YAML of bounds (measure: {min: ..., max: ...}); a violation ends with exit code 3. Drift passes
        on the first run unless the bound has required: true.
    now : float, optional
        Unix time from which the newest event's age is counted; by default the current time.
    dry_run : bool
        Measure and apply the gate; write nothing.

    Returns
    -------
    dict
        The measures, what the gate said, and where the files are.

    Raises
    ------
    GateError
        A measure is out of bounds; the report is written all the same, `previous` stays the basis of comparison.
    DataError, ConfigError
        No data folder, or a gate that cannot be read or names an unknown measure.
    """
    data, out = Path(data), Path(out)
    previous = None if previous is None else Path(previous)
    bounds = read_gate(Path(gate)) if gate is not None else {}
    log.info(f"reading {data}")
    measures, shown = measure(Everything.load(data), time.time() if now is None else now)
    made_from = data_digest(data)
    here = None if previous is not None else _last(out / REPORT_FILE, required=False)
    repeated = here is not None and here.get("made_from") == made_from
    before = out / (PREVIOUS_FILE if repeated else REPORT_FILE) if previous is None else previous
    last = _last(before, required=previous is not None)
    if last is not None:
        measures |= drift(measures, shown, last)
    judged = judge(measures, bounds)
    failed = [line for line in judged if not line["passed"]]
    written = {
        "format": 1,
        "data": str(data),
        "made_from": made_from,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "previous": None if last is None else last["made"],
        "measures": measures,
        "gate": judged,
        "passed": not failed,
        "shown": shown,
    }
    name = "refused" if failed else "report"  # a refused run must not become what the next one is compared with
    if not dry_run:
        if not failed and here is not None and not repeated:
            write_json(out / PREVIOUS_FILE, here)
        if not failed:
            for stale in (out / "refused.html", out / "refused.json"):
                stale.unlink(missing_ok=True)
        with atomic_write_file(out / f"{name}.html") as file:
            file.write_text(page(written), encoding="utf-8")
        write_json(out / f"{name}.json", written)
    answer = {key: written[key] for key in ("data", "previous", "measures", "gate", "passed")}
    answer |= {"report": str(out / f"{name}.json"), "page": str(out / f"{name}.html")}
    answer |= {"dry_run": True} if dry_run else {}
    log.info(f"{out / f'{name}.html'}: {measures['events']:,} events, {len(judged)} bounds, {len(failed)} broken")
    if failed:
        words = "; ".join(f"{line['measure']} is {line['value']}, bounds {line['bounds']}" for line in failed)
        raise GateError(
            f"the gate {gate} refuses {data}: {words}",
            "every measure within its bounds",
            f"look at {out / f'{name}.html'}; repair the data, or move the bounds",
            result=answer,
        )
    return answer


def read_gate(file: Path) -> dict[str, dict[str, Any]]:
    """Return the bounds of a gate file.

    Raises
    ------
    ConfigError
        It is missing or no mapping of measures to ``min``, ``max`` and ``required``.
    """
    try:
        bounds = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the gate {file} cannot be read ({error})", "a YAML file", "check --gate") from error
    named: dict[str, Any] = bounds if isinstance(bounds, dict) else {"the file": bounds}
    for name, bound in named.items():
        sound = isinstance(bound, dict) and bound and set(bound) <= {"min", "max", "required"}
        if not sound or not all(isinstance(bound[key], int | float) for key in bound):
            raise ConfigError(
                f"the gate {file} says {bound!r} about {name}", "measure: {min: number, max: number}", "correct it"
            )
    return named


def judge(measures: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per bound: measure, value, bounds, passed.

    Raises
    ------
    ConfigError
        A bound on a measure that does not exist.

    Examples
    --------
    >>> judge({"events": 5}, {"events": {"min": 10}, "share.null_item_id": {"max": 0.1}})[0]["passed"]
    False
    """
    lines = []
    for name, bound in bounds.items():
        value = measures.get(name, 0.0 if name.startswith("share.") else None)
        if value is None and name not in _DRIFT:
            near = difflib.get_close_matches(name, measures, 1)
            raise ConfigError(
                f"the gate bounds {name!r}, which is not measured on these data",
                f"one of {near or sorted(measures)}",
                "correct the gate, or leave the line out",
            )
        low, high = bound.get("min", float("-inf")), bound.get("max", float("inf"))
        passed = not bound.get("required", False) if value is None else low <= value <= high
        lines.append({"measure": name, "value": value, "bounds": dict(bound), "passed": bool(passed)})
    return lines


def drift(measures: Mapping[str, Any], shown: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, float]:
    """Return how far this run is from the last one.

    ``drift.popularity`` and ``drift.session_lengths`` are total variation distances (0 the same, 1 nothing in common),
    popularity over the most popular items of both runs and all others as one; ``drift.new_popular`` is the share of
    events on items that became popular since; the others are relative changes (0.1: ten per cent more).
    """
    old, new = last["shown"]["popular"], shown["popular"]
    names = set(old) | set(new)
    rest = abs(sum(old.values()) - sum(new.values()))
    lengths = [_shares(run["session_lengths"]) for run in (last["shown"], shown)]
    result = {
        "drift.popularity": (sum(abs(old.get(name, 0) - new.get(name, 0)) for name in names) + rest) / 2,
        "drift.session_lengths": sum(abs(lengths[0].get(key, 0) - share) for key, share in lengths[1].items()) / 2,
        "drift.new_popular": sum(share for name, share in new.items() if name not in old),
    }
    for name in _RELATIVE:
        before = last["measures"].get(name) or 0
        result[f"drift.{name}"] = measures[name] / before - 1 if before else 0.0
    return {name: round(float(value), 6) for name, value in result.items()}


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = max(sum(counts.values()), 1)
    return {key: count / total for key, count in counts.items()}


def _last(file: Path, *, required: bool) -> dict[str, Any] | None:
    """Return the last run's report, None if there is none."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(
                f"there is no report {file}", "the report.json of the last run", "check --previous"
            ) from None
        return None
    except ValueError as error:
        raise ConfigError(f"{file} is no report ({error})", "report.json of `missrec report`", "remove it") from error
    return dict(read)
