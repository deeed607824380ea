"""What an evaluation says: one JSON-able mapping, and tables of it for people."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from missrec_t4r.evaluation.full_ranking import SEEN_EXCLUDED, SEEN_KEPT

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
    """Return systems x metrics with half their 95 % intervals, and coverage@10, for one protocol.

    Parameters
    ----------
    report : mapping
        As `evaluate` returns it.
    protocol : {"seen_kept", "seen_excluded"}
    """
    systems: Mapping[str, Any] = report["protocols"][protocol]
    shown = [metric for metric in TABLE_COLUMNS if metric in next(iter(systems.values()))]
    drawn = _table(f"{report['split']}, {report['n_users']:,} users, {PROTOCOL_TITLES[protocol]}", "system", shown)
    drawn.add_column("coverage@10", justify="right", no_wrap=True)
    for name, measured in systems.items():
        cells = [_with_interval(measured, metric) for metric in shown]
        drawn.add_row(name, *cells, _number(report["coverage"][protocol][name].get("coverage@10"), 3))
    return drawn


def slices_table(report: Mapping[str, Any], protocol: str, metric: str = "ndcg@10") -> Table:
    """Return slices x systems of one metric, each with the number of sessions behind it."""
    systems = list(report["protocols"][protocol])
    drawn = _table(f"{metric} by slice, {PROTOCOL_TITLES[protocol]}", "slice", ["n", *systems])
    for name, part in report["slices"].items():
        values = [_number(part[protocol][system].get(metric)) for system in systems]
        drawn.add_row(name, f"{part['n']:,}", *values)
    return drawn


def write_report(report: Mapping[str, Any], file: Path) -> None:
    """Write the JSON aside, then rename it into place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(report, stream, indent=2, allow_nan=False)
            stream.write("\n")
        Path(aside).chmod(0o644)
        Path(aside).replace(file)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    drawn = Table(title=title, title_justify="left")
    drawn.add_column(first, no_wrap=True)
    for column in columns:
        drawn.add_column(column, justify="right", no_wrap=True)
    return drawn


def _with_interval(measured: Mapping[str, Any], metric: str) -> str:
    interval = measured["interval"][metric]
    if interval is None:
        return NO_VALUE
    return f"{_number(measured[metric])}\n±{(interval[1] - interval[0]) / 2:.4f}"  # fits a terminal of 80 columns


def _number(value: float | None, digits: int = 4) -> str:
    return NO_VALUE if value is None else f"{value:.{digits}f}"
