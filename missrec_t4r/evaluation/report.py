"""Evaluation report: a JSON file, and tables of it for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from missrec_t4r.evaluation.full_ranking import SEEN_EXCLUDED, SEEN_KEPT
from missrec_t4r.io.json_files import write_json

PROTOCOL_TITLES: Final = {
    SEEN_KEPT: "seen items kept (as published)",
    SEEN_EXCLUDED: "seen items excluded (as shops serve)",
}
TABLE_COLUMNS: Final = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
NO_VALUE: Final = "-"


def table(report: Mapping[str, Any]) -> Group:
    """Return all tables of a report, for ``console.print``."""
    protocols = list(report["protocols"])
    return Group(
        *(metrics_table(report, name) for name in protocols), *(slices_table(report, name) for name in protocols)
    )


def metrics_table(report: Mapping[str, Any], protocol: str) -> Table:
    """Return a table of systems x metrics with half the width of their 95 % intervals, and coverage@10.

    Parameters
    ----------
    report : mapping
        Return value of `missrec_t4r.runs.evaluate.evaluate`.
    protocol : {"seen_kept", "seen_excluded"}
    """
    systems: Mapping[str, Any] = report["protocols"][protocol]
    shown = [metric for metric in TABLE_COLUMNS if metric in next(iter(systems.values()))]
    result = _table(f"{report['split']}, {report['n_users']:,} users, {PROTOCOL_TITLES[protocol]}", "system", shown)
    result.add_column("coverage@10", justify="right", no_wrap=True)
    for name, measured in systems.items():
        cells = [_with_interval(measured, metric) for metric in shown]
        result.add_row(name, *cells, _number(report["coverage"][protocol][name].get("coverage@10"), 3))
    return result


def slices_table(report: Mapping[str, Any], protocol: str, metric: str = "ndcg@10") -> Table:
    """Return a table of slices x systems for one metric, with the number of sessions in each slice."""
    systems = list(report["protocols"][protocol])
    result = _table(f"{metric} by slice, {PROTOCOL_TITLES[protocol]}", "slice", ["n", *systems])
    for name, part in report["slices"].items():
        values = [_number(part[protocol][system].get(metric)) for system in systems]
        result.add_row(name, f"{part['n']:,}", *values)
    return result


def write_report(report: Mapping[str, Any], file: Path) -> None:
    """Write the report as JSON, atomically."""
    write_json(file, report, allow_nan=False)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    result = Table(title=title, title_justify="left")
    result.add_column(first, no_wrap=True)
    for column in columns:
        result.add_column(column, justify="right", no_wrap=True)
    return result


def _with_interval(measured: Mapping[str, Any], metric: str) -> str:
    interval = measured["interval"][metric]
    if interval is None:
        return NO_VALUE
    return f"{_number(measured[metric])}\n±{(interval[1] - interval[0]) / 2:.4f}"  # fits a terminal of 80 columns


def _number(value: float | None, digits: int = 4) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
