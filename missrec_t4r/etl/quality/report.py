"""``missrec report``: statistics of a data folder (JSON and one HTML page), drift since the last run, a quality gate.

The page is self-contained: styles and charts are inside, nothing is loaded. The gate is a YAML file of bounds; a
statistic out of bounds raises `GateError` after the report is written, and the command ends with exit code 3.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.errors import ConfigError, GateError
from missrec_t4r.etl.quality.checks import CHECKS
from missrec_t4r.etl.quality.page import page
from missrec_t4r.etl.quality.statistics import ReportData, compute_statistics
from missrec_t4r.io.atomic import write_text
from missrec_t4r.io.hashing import data_digest
from missrec_t4r.io.json_files import write_json
from missrec_t4r.io.key_names import read_with_current_keys

log = logging.getLogger(__name__)

REPORT_FILE, PREVIOUS_FILE = "report.json", "previous.json"
_COMPARED = {"made", "measures", "distributions"}
"""What the next report reads of a report."""
_RELATIVE = ("events", "users", "items", "session_length_mean")
_SHARES = frozenset(f"share.{check}" for check in CHECKS)
"""Measures that are 0 where there is no such finding."""
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
        Folder of the report. Drift is measured against the report that is already in it; a repeated report on the
        same data is measured against the same earlier one.
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
        The statistics (``measures``), the result of the gate, and the paths of the files: ``report`` and ``page``, of a
        dry run ``would_write``.

    Raises
    ------
    GateError
        A statistic is out of bounds. The report is written, and the last accepted run stays the basis of drift.
    DataError, ConfigError
        Not a data folder, or a gate that cannot be read or names an unknown statistic.
    """
    data, out = Path(data), Path(out)
    if previous is not None and not Path(previous).is_file():
        raise ConfigError(f"there is no report {previous}", "the report.json of the last run", "check --previous")
    bounds = read_gate(Path(gate)) if gate is not None else {}
    log.info(f"reading {data}")
    digest = data_digest(data)
    existing = _stored_report(out / REPORT_FILE) if previous is None else None
    repeated = existing is not None and existing.get("data_digest") == digest
    last = _stored_report(Path(previous or out / PREVIOUS_FILE)) if previous or repeated else existing
    content_of_data = ReportData.load(data, None if last is None else last.get("version"))
    statistics, distributions = compute_statistics(content_of_data, time.time() if now is None else now)
    if last is not None:
        statistics |= drift(statistics, distributions, last)
    checked = apply_gate(statistics, bounds)
    failed = [check for check in checked if not check["passed"]]
    content = {
        "format": 1,
        "data": str(data),
        "data_digest": digest,
        "version": content_of_data.version,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "previous": None if last is None else last["made"],
        "measures": statistics,
        "gate": checked,
        "passed": not failed,
        "distributions": distributions,
    }
    name = "refused" if failed else "report"  # the next run must not be compared with a refused one
    if not dry_run:
        _write(out, name, content, None if repeated else existing)
    result = {key: content[key] for key in ("data", "previous", "measures", "gate", "passed")}
    written = {"report": str(out / f"{name}.json"), "page": str(out / f"{name}.html")}
    result |= {"dry_run": True, "would_write": list(written.values())} if dry_run else written
    log.info(
        f"{'would write ' if dry_run else ''}{written['page']}: {statistics['events']:,} events, "
        f"{len(checked)} bounds, {len(failed)} violated"
    )
    if failed:
        words = "; ".join(f"{check['measure']} is {check['value']}, bounds {check['bounds']}" for check in failed)
        raise GateError(
            f"the gate {gate} refuses {data}: {words}",
            "every measure within its bounds",
            f"{'run without --dry-run and ' if dry_run else ''}look at {written['page']}; "
            "repair the data, or move the bounds",
            result=result,
        )
    return result


def _write(out: Path, name: str, content: Mapping[str, Any], replaced: Mapping[str, Any] | None) -> None:
    """Write page and JSON of a report; an accepted one ends a refusal, and keeps the report that it replaces."""
    if name == "report":
        if replaced is not None:
            write_json(out / PREVIOUS_FILE, replaced)
        for stale in (out / "refused.html", out / "refused.json"):
            stale.unlink(missing_ok=True)
    write_text(out / f"{name}.html", page(content))
    write_json(out / f"{name}.json", content)


def read_gate(file: Path) -> dict[str, dict[str, Any]]:
    """Return the bounds of a gate file.

    Raises
    ------
    ConfigError
        It is missing, or not a mapping of statistics to ``min``, ``max`` and ``required``.
    """
    try:
        bounds = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"the gate {file} cannot be read ({error})", "a YAML file", "check --gate") from error
    by_name: dict[str, Any] = bounds if isinstance(bounds, dict) else {"the file": bounds}
    for name, bound in by_name.items():
        valid = isinstance(bound, dict) and bound and set(bound) <= {"min", "max", "required"}
        if not valid or not all(isinstance(bound[key], int | float) for key in bound):
            raise ConfigError(
                f"the gate {file} sets {bound!r} for {name}", "measure: {min: number, max: number}", "correct it"
            )
    return by_name


def apply_gate(statistics: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one entry per bound: ``measure``, ``value``, ``bounds``, ``passed``.

    Raises
    ------
    ConfigError
        A bound names an unknown statistic.

    Examples
    --------
    >>> apply_gate({"events": 5}, {"events": {"min": 10}, "share.null_item_id": {"max": 0.1}})[0]["passed"]
    False
    """
    usual = {**dict.fromkeys(_SHARES, 0.0), **dict.fromkeys(_DRIFT)}
    return check_bounds({**statistics, **usual, **statistics}, bounds)  # errors name the first ones


def check_bounds(measures: Mapping[str, Any], bounds: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return `apply_gate`'s entries; a measure that is None was not taken, and passes unless it is required."""
    checks = []
    for name, bound in bounds.items():
        if name not in measures:
            near = difflib.get_close_matches(name, measures, 3) or list(measures)[:6]
            raise ConfigError(
                f"the gate bounds {name!r}, which is not measured on these data",
                f"a measure such as {', '.join(near)}",
                "correct the gate, or leave the line out",
            )
        value, low, high = measures[name], bound.get("min", float("-inf")), bound.get("max", float("inf"))
        passed = not bound.get("required", False) if value is None else low <= value <= high
        checks.append({"measure": name, "value": value, "bounds": dict(bound), "passed": bool(passed)})
    return checks


def drift(statistics: Mapping[str, Any], distributions: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, float]:
    """Return the changes since the last run.

    ``drift.popularity`` and ``drift.session_lengths`` are total variation distances (0 equal, 1 disjoint), popularity
    over the most popular items of both runs and all others as one; ``drift.new_popular`` is the share of events on
    items that were not among the most popular before; the others are relative changes (0.1: ten per cent more).
    """
    old, new = last["distributions"]["popular"], distributions["popular"]
    names = set(old) | set(new)
    rest = abs(sum(old.values()) - sum(new.values()))
    lengths = [_shares(run["session_lengths"]) for run in (last["distributions"], distributions)]
    result = {
        "drift.popularity": (sum(abs(old.get(name, 0) - new.get(name, 0)) for name in names) + rest) / 2,
        "drift.session_lengths": sum(abs(lengths[0].get(key, 0) - share) for key, share in lengths[1].items()) / 2,
        "drift.new_popular": sum(share for name, share in new.items() if name not in old),
    }
    for name in _RELATIVE:
        before = last["measures"].get(name) or 0
        result[f"drift.{name}"] = statistics[name] / before - 1 if before else 0.0
    return {name: round(float(value), 6) for name, value in result.items()}


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = max(sum(counts.values()), 1)
    return {key: count / total for key, count in counts.items()}


def _stored_report(file: Path) -> dict[str, Any] | None:
    """Return the report of an earlier run, or None if there is none."""
    try:
        content = read_with_current_keys(file) if file.is_file() else None
        if content is not None and (missing := _COMPARED - content.keys()):
            raise ValueError(f"without {', '.join(sorted(missing))}")
    except ValueError as error:
        remedy = "report.json of `missrec report`", "remove it"
        raise ConfigError(f"{file} is not a report ({error.__cause__ or error})", *remedy) from error
    return content
