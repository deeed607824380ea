"""The page of a data report: tables and plots in one HTML file that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from missrec_t4r.workflows.charts import bars, log_line, number

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#e3e7ee;--bar:#2f6db5;--bad:#b42318;--good:#1a7f4b;
--ground:#fff;--card:#f8f9fb}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b2;--line:#2e3643;--bar:#6ea8e8;--bad:#ff8a7a;
--good:#5fd39a;--ground:#12161d;--card:#1a202a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);margin:2rem auto;max-width:78rem;
padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.05rem;margin:0 0 .5rem}p{margin:.2rem 0 1rem;color:var(--soft)}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(34rem,100%),1fr));gap:1rem;margin:1rem 0}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;min-width:0;overflow-x:auto}
.numbers{display:flex;flex-wrap:wrap;gap:1rem 2.2rem;margin:1rem 0}.numbers div{min-width:6rem}
.numbers b{display:block;font-size:1.35rem;font-weight:600}.numbers span{color:var(--soft)}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right}.bad{color:var(--bad);font-weight:600}.good{color:var(--good)}
svg{width:100%;height:auto;display:block}.bar{fill:var(--bar)}.line{fill:none;stroke:var(--bar);stroke-width:2}
line.grid{stroke:var(--line)}text{font-size:11px;fill:var(--soft)}text.title{font-size:12px}
"""
_FACTS = ("events", "users", "items", "items_without_events", "session_length_median", "days", "newest_age_days")
_DAYS = 400
"""More days than these are shown by month."""


def page(report: Mapping[str, Any]) -> str:
    """Return the HTML of a report, complete."""
    measures, shown = report["measures"], report["shown"]
    sections = [_gate(report["gate"]), _days(shown), _lengths(shown), _popularity(shown, measures)]
    sections += [_coverage(shown["coverage"]), _oddities(measures), _drift(report)]
    facts = "".join(
        f"<div><b>{number(measures[name])}</b><span>{escape(name.replace('_', ' '))}</span></div>"
        for name in _FACTS
        if name in measures
    )
    against = f", compared with the run of {escape(report['previous'])}" if report["previous"] else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Data report: {escape(report['data'])}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Data report</h1><p>{escape(report['data'])}, {escape(report['made'])}{against}</p>"
        f'<div class="numbers">{facts}</div><div class="grid">{"".join(filter(None, sections))}</div></body></html>\n'
    )


def _gate(lines: Sequence[Mapping[str, Any]]) -> str:
    if not lines:
        return ""
    rows = [
        (
            line["measure"],
            "not measured" if line["value"] is None else number(line["value"]),
            ", ".join(f"{key} {number(value)}" for key, value in line["bounds"].items()),
            '<span class="good">passed</span>' if line["passed"] else '<span class="bad">broken</span>',
        )
        for line in lines
    ]
    return _section("Gate", _table(("measure", "value", "bounds", ""), rows, raw=3))


def _days(shown: Mapping[str, Any]) -> str:
    days = shown.get("events_per_day")
    if not days:
        return _section("Events per day", "<p>The times are positions or absent, so there are no days.</p>")
    unit = "day"
    if len(days) > _DAYS:
        months: dict[str, int] = {}
        for day, count in days.items():
            months[day[:7]] = months.get(day[:7], 0) + count
        days, unit = months, "month"
    return _section(
        f"Events per {unit}", bars(list(days), list(days.values()), x_title=f"{unit} (UTC)", y_title="events")
    )


def _lengths(shown: Mapping[str, Any]) -> str:
    lengths = shown["session_lengths"]
    used = [index for index, count in enumerate(lengths.values()) if count]
    kept = list(lengths.items())[used[0] : used[-1] + 1] if used else []
    chart = bars([key for key, _ in kept], [n for _, n in kept], x_title="events of a session", y_title="sessions")
    return _section("Session lengths", chart)


def _popularity(shown: Mapping[str, Any], measures: Mapping[str, Any]) -> str:
    points = shown["popularity"]
    if not points:
        return ""
    chart = log_line([rank for rank, _ in points], [n for _, n in points], x_title="rank of the item", y_title="events")
    said = (
        f"The top 1 % of the items have {measures['share_top_1_percent_items']:.1%} of the events; "
        f"Gini {measures['popularity_gini']:.2f}; {number(measures['items_without_events'])} items have none."
    )
    return _section("Item popularity", f"<p>{said}</p>{chart}")


def _coverage(coverage: Mapping[str, Mapping[str, Any]]) -> str:
    if not coverage:
        return _section("Modality coverage", "<p>The catalogue has no modality.</p>")
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
    head = ("modality", "items that have it", "events on them", "width", "encoder", "fingerprint")
    return _section("Modality coverage", _table(head, rows))


def _oddities(measures: Mapping[str, Any]) -> str:
    """Duplicates, clock problems, orphans: everything that is a share and not zero."""
    named = [name for name in measures if name.startswith("share.")]
    clock = ["share_future", "share_same_time_as_before", "days_without_events", "last_day_vs_median"]
    clock += ["share_repeated_items", "share_short_sessions"]
    rows = [
        (
            name.removeprefix("share.").removeprefix("share_").replace("_", " "),
            f"{measures[name]:.3%}" if name.startswith("share") else number(measures[name]),
        )
        for name in [*named, *clock]
        if name in measures
    ]
    return _section("Duplicates, clock, orphans", _table(("what", "share of events, or number"), rows))


def _drift(report: Mapping[str, Any]) -> str:
    named = {name: value for name, value in report["measures"].items() if name.startswith("drift.")}
    if not named:
        return _section("Drift", "<p>There is no earlier run to compare with.</p>")
    rows = [(name.removeprefix("drift.").replace("_", " "), f"{value:+.2%}") for name, value in named.items()]
    return _section("Drift since the last run", _table(("what", "change"), rows))


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: int = -1) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if at == raw else escape(cell)}</td>" for at, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
