"""The parts of a self-contained HTML page: document, sections, tables and large numbers.

Six small functions; a Jinja2 template with the same tables, formats and conditions would be as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from missrec_t4r.pages.charts import number

STYLE = """
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
.bad{color:var(--bad);font-weight:600}.good{color:var(--good)}
svg{width:100%;height:auto;display:block}.bar{fill:var(--bar)}.line{fill:none;stroke:var(--bar);stroke-width:2}
line.grid,line.zero{stroke:var(--line)}line.zero{stroke-width:2}text{font-size:11px;fill:var(--soft)}text.title{font-size:12px}
"""


def document(name: str, title: str, about: str, sections: Iterable[str], *, above: str = "", style: str = STYLE) -> str:
    """Return a complete page; ``sections``, and what stands ``above`` them, are HTML; ``name`` is that of its tab."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{style}</style></head><body><h1>{escape(title)}</h1>"
        f'<p>{escape(about)}</p>{above}<div class="grid">{"".join(sections)}</div></body></html>\n'
    )


def numbers(facts: Mapping[str, object]) -> str:
    """Return figures by name as large numbers beside each other."""
    shown = (f"<div><b>{escape(str(value))}</b><span>{escape(name)}</span></div>" for name, value in facts.items())
    return f'<div class="numbers">{"".join(shown)}</div>'


def gate(title: str, what: str, checks: Sequence[Mapping[str, Any]], form: Callable[[float], str]) -> str:
    """Return a section of the checks of `missrec_t4r.etl.quality.report.apply_gate`; empty without any."""
    rows = [
        (
            check["measure"],
            "not measured" if check["value"] is None else form(check["value"]),
            ", ".join(f"{key} {number(value)}" for key, value in check["bounds"].items()),
            '<span class="good">passed</span>' if check["passed"] else '<span class="bad">violated</span>',
        )
        for check in checks
    ]
    return section(title, table((what, "value", "bounds", ""), rows, raw=3)) if rows else ""


def section(title: str, inside: str, *, wide: bool = False) -> str:
    """Return a section of a page, over its whole width if ``wide``; ``inside`` is HTML."""
    kind = ' class="wide"' if wide else ""
    return f"<section{kind}><h2>{escape(title)}</h2>{inside}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], raw: int = -1) -> str:
    """Return a table; cells are escaped except those of column ``raw``, which are HTML."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        cells = (f"<td>{cell if index == raw else escape(cell)}</td>" for index, cell in enumerate(row))
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
