"""The page of a data report: tables and plots in one HTML file that loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

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


# Small charts as inline SVG: bars and lines with axes that people can read, nothing loaded from anywhere

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 30, 10, 48
_TICKS = 4


def bars(labels: Sequence[str], values: Sequence[float], *, x_title: str, y_title: str) -> str:
    """Return a bar chart; every bar tells its label and value when pointed at.

    Parameters
    ----------
    labels : sequence of str
        One per bar; as many as fit are written below.
    values : sequence of float
        Not negative.
    """
    top = _nice_top(max([*values, 0.0]))
    step = (WIDTH - _LEFT - _RIGHT) / max(len(values), 1)
    shapes = []
    for index, (label, value) in enumerate(zip(labels, values, strict=True)):
        height = (HEIGHT - _TOP - _BOTTOM) * value / top
        x, y = _LEFT + index * step, HEIGHT - _BOTTOM - height
        shapes.append(
            f'<rect class="bar" x="{x + step * 0.08:.1f}" y="{y:.1f}" width="{max(step * 0.84, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{escape(label)}: {number(value)}</title></rect>'
        )
    every = math.ceil(max((len(label) for label in labels), default=1) * 9 / step) if labels else 1
    shapes += [
        _text(_LEFT + (index + 0.5) * step, HEIGHT - _BOTTOM + 18, label, "middle")
        for index, label in enumerate(labels)
        if index % every == 0
    ]
    ticks = [top * tick / _TICKS for tick in range(_TICKS + 1)]
    marks = [(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * tick / top, number(tick)) for tick in ticks]
    return _frame("".join(shapes), marks, x_title, y_title)


def log_line(xs: Sequence[float], ys: Sequence[float], *, x_title: str, y_title: str) -> str:
    """Return a line with both axes logarithmic; values must be positive."""
    x_top, y_top = (max(1.0, math.ceil(math.log10(max(values)))) for values in (xs, ys))
    points = " ".join(
        f"{_LEFT + (WIDTH - _LEFT - _RIGHT) * math.log10(x) / x_top:.1f},"
        f"{HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * math.log10(y) / y_top:.1f}"
        for x, y in zip(xs, ys, strict=True)
    )
    below = [
        _text(_LEFT + (WIDTH - _LEFT - _RIGHT) * power / x_top, HEIGHT - _BOTTOM + 18, number(10.0**power), "middle")
        for power in range(int(x_top) + 1)
    ]
    marks = [
        (HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * power / y_top, number(10.0**power))
        for power in range(int(y_top) + 1)
    ]
    return _frame(f'<polyline class="line" points="{points}"/>' + "".join(below), marks, x_title, y_title)


def number(value: float) -> str:
    """Return a number for people.

    Examples
    --------
    >>> number(12345.0), number(0.25), number(2_500_000), number(3.0)
    ('12,345', '0.25', '2.5M', '3')
    """
    if abs(value) >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.3g}"


def _nice_top(value: float) -> float:
    """Return 1, 2, 4 or 8 times a power of ten, at least ``value``, so that quarters are round."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 2, 4, 8, 10) if power * factor >= value * (1 - 1e-9))


def _frame(inside: str, marks: Sequence[tuple[float, str]], x_title: str, y_title: str) -> str:
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        + _text(_LEFT - 6, y + 4, text, "end")
        for y, text in marks
    )
    middle = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    titles = _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_title, "middle", "title") + (
        f'<text class="title" text-anchor="middle" transform="translate(14 {middle:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">'
        f"{grid}{inside}{titles}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
