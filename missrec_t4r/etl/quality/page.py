"""The HTML page of a data report: tables and charts in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from missrec_t4r.pages.charts import bars, log_line, number
from missrec_t4r.pages.document import document, gate, numbers, section, table

_FACTS = ("events", "users", "items", "items_without_events", "session_length_median", "days", "newest_age_days")
_DAYS = 400
"""With more days than this, events are shown by month."""


def page(report: Mapping[str, Any]) -> str:
    """Return the complete HTML page of a report (the content of report.json)."""
    statistics, distributions = report["measures"], report["distributions"]
    sections = [gate("Quality gate", "statistic", report["gate"], number), _days(distributions)]
    sections += [_lengths(distributions), _popularity(distributions, statistics)]
    sections += [_coverage(distributions["coverage"]), _data_quality(statistics), _drift(report)]
    facts = {name.replace("_", " "): number(statistics[name]) for name in _FACTS if name in statistics}
    against = f", compared with the run of {report['previous']}" if report["previous"] else ""
    about = f"{report['data']}, {report['made']}{against}"
    return document(f"Data report: {report['data']}", "Data report", about, sections, above=numbers(facts))


def _days(distributions: Mapping[str, Any]) -> str:
    days = distributions.get("events_per_day")
    if not days:
        return section("Events per day", "<p>The data have no times, or positions in place of times.</p>")
    unit = "day"
    if len(days) > _DAYS:
        months: dict[str, int] = {}
        for day, count in days.items():
            months[day[:7]] = months.get(day[:7], 0) + count
        days, unit = months, "month"
    chart = bars(list(days), list(days.values()), x_title=f"{unit} (UTC)", y_title="events")
    return section(f"Events per {unit}", chart)


def _lengths(distributions: Mapping[str, Any]) -> str:
    lengths = distributions["session_lengths"]
    occurring = [index for index, count in enumerate(lengths.values()) if count] or [0]
    shown = slice(occurring[0], occurring[-1] + 1)
    labels, counts = list(lengths)[shown], list(lengths.values())[shown]
    return section("Session lengths", bars(labels, counts, x_title="events per session", y_title="sessions"))


def _popularity(distributions: Mapping[str, Any], statistics: Mapping[str, Any]) -> str:
    points = distributions["popularity"]
    if not points:
        return ""
    chart = log_line([rank for rank, _ in points], [n for _, n in points], x_title="rank of the item", y_title="events")
    summary = (
        f"The top 1 % of the items have {statistics['share_top_1_percent_items']:.1%} of the events; "
        f"Gini coefficient {statistics['popularity_gini']:.2f}; "
        f"{number(statistics['items_without_events'])} items have no event."
    )
    return section("Item popularity", f"<p>{summary}</p>{chart}")


def _coverage(coverage: Mapping[str, Mapping[str, Any]]) -> str:
    if not coverage:
        return section("Modality coverage", "<p>The catalogue has no modality.</p>")
    rows = [
        (
            name,
            f"{part['items']:.1%}",
            f"{part['events']:.1%}",
            str(part["width"]),
            part["encoder"],
            (part["fingerprint"] or "not stated")[:22],
        )
        for name, part in coverage.items()
    ]
    head = ("modality", "items that have it", "events on these items", "width", "encoder", "fingerprint")
    return section("Modality coverage", table(head, rows))


def _data_quality(statistics: Mapping[str, Any]) -> str:
    """Return the table of data-quality findings (shares of the events that the ETL counted) and of event times."""
    findings = [name for name in statistics if name.startswith("share.")]
    times = ["share_future", "share_same_time_as_before", "days_without_events", "last_day_vs_median"]
    times += ["share_repeated_items", "share_short_sessions"]
    rows = [
        (
            name.removeprefix("share.").removeprefix("share_").replace("_", " "),
            f"{statistics[name]:.3%}" if name.startswith("share") else number(statistics[name]),
        )
        for name in [*findings, *times]
        if name in statistics
    ]
    return section("Data quality", table(("finding", "share of events, or number"), rows))


def _drift(report: Mapping[str, Any]) -> str:
    changes = {name: value for name, value in report["measures"].items() if name.startswith("drift.")}
    if not changes:
        return section("Drift", "<p>There is no earlier run to compare with.</p>")
    rows = [(name.removeprefix("drift.").replace("_", " "), f"{value:+.2%}") for name, value in changes.items()]
    return section("Drift since the last run", table(("statistic", "change"), rows))
