"""Tables of an evaluation report for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from missrec_t4r.evaluation.full_ranking import FORMER_PROTOCOLS, PROTOCOL_TITLES

TABLE_COLUMNS: Final = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
NO_VALUE: Final = "-"


def table(report: Mapping[str, Any]) -> Group:
    """Return all tables of a report, for ``console.print``; also of a report that an earlier version wrote."""
    report = with_current_names(report)
    protocols = [name for name, systems in report["protocols"].items() if systems]
    return Group(
        *(metrics_table(report, name) for name in protocols),
        *([checklist_table(report["checklist"])] if "checklist" in report else []),
        *(slices_table(report, name) for name in protocols),
    )


def with_current_names(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return a report, or a part of one, with today's names of the protocols instead of those of earlier versions.

    Examples
    --------
    >>> with_current_names({"protocols": {"seen_excluded": {"model": {"ndcg@10": 0.1}}}, "n_users": 5})
    {'protocols': {'excluded': {'model': {'ndcg@10': 0.1}}}, 'n_users': 5}
    """
    return {
        FORMER_PROTOCOLS.get(name, name): with_current_names(part) if isinstance(part, Mapping) else part
        for name, part in report.items()
    }


def metrics_table(report: Mapping[str, Any], protocol: str) -> Table:
    """Return a table of systems x metrics with half the width of their 95 % intervals, and coverage@10.

    Parameters
    ----------
    report : mapping
        Return value of `missrec_t4r.runs.evaluate.evaluate`.
    protocol : {"excluded", "kept_strict", "kept_with_history_term"}
    """
    systems: Mapping[str, Any] = report["protocols"][protocol]
    shown = [metric for metric in TABLE_COLUMNS if metric in next(iter(systems.values()))]
    title = f"{report['split']}, {report['n_users']:,} users, {PROTOCOL_TITLES[protocol]}"
    result = Table(title=title, title_justify="left")
    result.add_column("system", no_wrap=True)
    for column in (*shown, "coverage@10"):
        result.add_column(column, justify="right", no_wrap=True)
    for name, measured in systems.items():
        cells = [_with_interval(measured, metric) for metric in shown]
        result.add_row(name, *cells, _number(report["coverage"][protocol][name].get("coverage@10"), 3))
    return result


def slices_table(report: Mapping[str, Any], protocol: str) -> Table:
    """Return a table of slices x systems of NDCG@10, with the number of sessions in each slice."""
    metric = "ndcg@10"
    systems = list(report["protocols"][protocol])
    title = f"{metric} by slice, {PROTOCOL_TITLES[protocol]}"
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns
    result.add_column("slice", no_wrap=True)
    for column in ("n", *systems):
        result.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for name, part in report["slices"].items():
        values = [_number(part[protocol][system].get(metric)).removeprefix("0") for system in systems]
        result.add_row(name, f"{part['n']:,}", *values)
    return result


def checklist_table(checklist: Mapping[str, Any]) -> Table:
    """Return the protocol checklist as a table: what a reader must know to compare the figures."""
    result = Table(title="protocol checklist", title_justify="left", show_header=False)
    result.add_column(no_wrap=True)
    result.add_column(overflow="fold")
    for name, value in checklist.items():
        result.add_row(name.replace("_", " "), _in_lines(value))
    return result


def _in_lines(value: Any) -> str:
    """Return a value of the checklist as text, a mapping with a line per entry."""
    if isinstance(value, Mapping):
        return "\n".join(f"{PROTOCOL_TITLES.get(name, name)}: {_in_lines(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_interval(measured: Mapping[str, Any], metric: str) -> str:
    interval = measured["interval"][metric]
    if interval is None:
        return NO_VALUE
    return f"{_number(measured[metric])}\n±{(interval[1] - interval[0]) / 2:.4f}"  # fits a terminal of 80 columns


def _number(value: float | None, digits: int = 4) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
