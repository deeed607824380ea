"""Bar and line charts as inline SVG, with axes and tooltips.

Own code instead of matplotlib: these hundred lines follow the page's light and dark colours and show tooltips;
matplotlib would add 30 MB to the installation and draw static images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 30, 10, 48
_WIDE, _TALL = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
_TICKS = 4
_LONGEST_LABEL = 27
_MOST_ROWS, _ROW = 4, 14
"""Rows of labels below an axis, and the height of one."""

Marks = Iterable[tuple[float, str]]
"""Texts along an axis, each with its place as a share of the axis, 0 to 1."""


def bars(labels: Sequence[str], values: Sequence[float], *, x_title: str, y_title: str) -> str:
    """Return a bar chart; the tooltip of a bar shows its label and value.

    Parameters
    ----------
    labels : sequence of str
        One per bar, printed below the axis: in several rows where neighbours would overlap, and only as many as fit
        where even these would not do.
    values : sequence of float
        Not negative.
    """
    top, count = _nice_top(max([*values, 0.0])), max(len(values), 1)
    step = _WIDE / count
    shapes = [
        f'<rect class="bar" x="{_LEFT + (index + 0.08) * step:.1f}" y="{_y(value / top):.1f}" '
        f'width="{max(step * 0.84, 0.5):.1f}" height="{_TALL * value / top:.1f}">'
        f"<title>{escape(label)}: {number(value)}</title></rect>"
        for index, (label, value) in enumerate(zip(labels, values, strict=True))
    ]
    # A character is about 9 units wide: every n-th label fits into one row.
    every = math.ceil(max(map(len, labels), default=1) * 9 / step) or 1
    rows = every if every <= _MOST_ROWS else 1
    below = [((index + 0.5) / count, label) for index, label in enumerate(labels) if rows > 1 or index % every == 0]
    return _frame(shapes, below, _from_zero(top), x_title, y_title, rows)


def log_line(xs: Sequence[float], ys: Sequence[float], *, x_title: str, y_title: str) -> str:
    """Return a line chart with logarithmic axes; values must be positive."""
    x_top, y_top = (max(1, math.ceil(math.log10(max(values)))) for values in (xs, ys))
    points = [(math.log10(x) / x_top, math.log10(y) / y_top) for x, y in zip(xs, ys, strict=True)]
    below, left = ([(power / top, number(10.0**power)) for power in range(top + 1)] for top in (x_top, y_top))
    return _frame([_polyline("line", points)], below, left, x_title, y_title)


def curves(series: Mapping[str, Sequence[float]], marked: str, *, x_title: str, y_title: str) -> str:
    """Return one line per series over 0, 1, 2, …; the marked one is drawn last, and a tooltip names each.

    Parameters
    ----------
    series : mapping of str to sequence of float
        Not negative.
    marked : str
        Name of the series of class ``best``; the others are of class ``other``.
    """
    top = _nice_top(max((value for values in series.values() for value in values), default=0.0))
    last = max((len(values) for values in series.values()), default=1) - 1
    shapes, end = [], max(last, 1)
    for name in sorted(series, key=lambda name: name == marked):
        points = [(x / end, y / top) for x, y in enumerate(series[name])]
        points += [(2 / _WIDE, points[0][1])] if len(points) == 1 else []  # a line of one point shows nothing
        kind = "best" if name == marked else "other"
        shapes.append(_polyline(kind, points, f"{escape(name)}: {number(max(series[name]))}"))
    below = [(x / end, str(x)) for x in range(0, last + 1, max(math.ceil(last / 10), 1))]
    return _frame(shapes, below, _from_zero(top), x_title, y_title)


def line(xs: Sequence[float], ys: Sequence[float], *, x_title: str, y_title: str, mark: int | None = None) -> str:
    """Return a line chart between the smallest and the largest value; the tooltip of a point shows both numbers.

    Parameters
    ----------
    xs, ys : sequence of float
        Of the same length.
    mark : int, optional
        Index of a point that is emphasised.
    """
    (left, right), (low, high) = ((min(values), max(values)) for values in (xs, ys))
    wide, tall = (right - left) or 1.0, (high - low) or 1.0
    points = [((x - left) / wide, (y - low) / tall) for x, y in zip(xs, ys, strict=True)]
    shapes = [_polyline("line", points)]
    for index, (x, y) in enumerate(points):
        title, size = f"{number(xs[index])}: {ys[index]:.4g}", 5 if index == mark else 2.5
        place = f'cx="{_x(x):.1f}" cy="{_y(y):.1f}" r="{size}"'
        shapes.append(f'<circle class="bar" {place}><title>{title}</title></circle>')
    below = [(points[index][0], number(xs[index])) for index in range(0, len(points), math.ceil(len(points) / 10))]
    marks = [(tick / _TICKS, f"{low + tall * tick / _TICKS:.3g}") for tick in range(_TICKS + 1)]
    return _frame(shapes, below, marks, x_title, y_title)


def intervals(
    labels: Sequence[str],
    values: Sequence[float],
    bounds: Sequence[Sequence[float]],
    *,
    x_title: str,
    differences: bool = True,
) -> str:
    """Return one point with its interval per line, around a line at zero; the tooltip shows the numbers.

    Parameters
    ----------
    labels, values : sequence
        One per line, from top to bottom.
    bounds : sequence of (low, high)
        Ends of the interval of every value.
    x_title : str
        What the values are.
    differences : bool
        False: the values are not negative, zero is at the left, and above zero is not good.
    """
    far = max([abs(end) for pair in bounds for end in pair] + [abs(value) for value in values] + [1e-3])
    left, step = 170, 24
    centre = (left + WIDTH - _RIGHT) / 2
    middle, half = (centre, (WIDTH - _RIGHT - left) / 2 - 8) if differences else (left, WIDTH - _RIGHT - left - 8)
    signed = "+.4f" if differences else ".4f"
    bottom = _TOP + step * len(labels)
    shapes = [f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="{_TOP}" y2="{bottom}"/>']
    for index, (label, value, (low, high)) in enumerate(zip(labels, values, bounds, strict=True)):
        y = _TOP + step * (index + 0.5)
        x, start, end = (middle + half * number / far for number in (value, low, high))
        sign = "open"
        if differences and not low <= 0 <= high:
            sign = "good" if low > 0 else "bad"
        shown = label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"  # whole in the tooltip
        shapes.append(
            f'<g class="{sign}"><title>{escape(label)}: {value:{signed}} ({low:{signed}} to {high:{signed}})</title>'
            f'<line class="interval" x1="{start:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"/></g>' + _text(left - 10, y + 4, shown, "end")
        )
    tick = _nice_tick(far)
    for n in range(-int(far / tick) if differences else 0, int(far / tick) + 1):
        text = f"{tick * n:+.3g}" if differences and n else f"{tick * n:.3g}"
        shapes.append(_text(middle + half * tick * n / far, bottom + 16, text, "middle"))
    shapes.append(_text(centre, bottom + 36, x_title, "middle", "title"))
    return f'<svg viewBox="0 0 {WIDTH} {bottom + 44}" role="img" aria-label="{escape(x_title)}">{"".join(shapes)}</svg>'


def number(value: float) -> str:
    """Return a number in readable form.

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


def _nice_tick(far: float) -> float:
    """Return the largest of 1, 2 or 5 times a power of ten that stands two times or more before ``far``.

    Examples
    --------
    >>> _nice_tick(0.128), _nice_tick(0.078), _nice_tick(0.2)
    (0.05, 0.02, 0.1)
    """
    power = 10.0 ** math.floor(math.log10(far / 2))
    return next(power * factor for factor in (5, 2, 1) if power * factor <= far / 2 * (1 + 1e-9))


def _x(share: float) -> float:
    return _LEFT + _WIDE * share


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - _TALL * share


def _polyline(kind: str, points: Iterable[tuple[float, float]], title: str = "") -> str:
    """Return a line through points that are given as shares of the axes."""
    drawn = " ".join(f"{_x(x):.1f},{_y(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{drawn}">' + (f"<title>{title}</title>" if title else "") + "</polyline>"


def _from_zero(top: float) -> Marks:
    return [(tick / _TICKS, number(top * tick / _TICKS)) for tick in range(_TICKS + 1)]


def _frame(shapes: Iterable[str], below: Marks, left: Marks, x_title: str, y_title: str, rows: int = 1) -> str:
    """Return a chart: shapes on a grid, with the texts and the titles of both axes; those below in turn in ``rows``."""
    height = HEIGHT + _ROW * (rows - 1)
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{_y(share):.1f}" y2="{_y(share):.1f}"/>'
        + _text(_LEFT - 6, _y(share) + 4, text, "end")
        for share, text in left
    )
    ticks = ""
    for index, (share, text) in enumerate(below):
        half = 3.5 * len(text)  # of a text at the end of the axis nothing is cut off
        x, y = min(max(_x(share), half), WIDTH - half), HEIGHT - _BOTTOM + 18 + _ROW * (index % rows)
        ticks += _text(x, y, text, "middle")
    titles = _text((_LEFT + WIDTH - _RIGHT) / 2, height - 6, x_title, "middle", "title") + (
        f'<text class="title" text-anchor="middle" transform="translate(14 {_TOP + _TALL / 2:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(y_title)} by {escape(x_title)}">'
        f"{grid}{''.join(shapes)}{ticks}{titles}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
