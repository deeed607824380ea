"""The HTML page of a comparison: verdict, tables, charts and examples in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

from missrec_t4r.comparison.verdict import OPEN, REFUSED, SHIP
from missrec_t4r.etl.quality.charts import bars, intervals
from missrec_t4r.etl.quality.html import STYLE, document, gate, section, table
from missrec_t4r.evaluation.full_ranking import PROTOCOL_TITLES

COMPARISON_STYLE: Final = (
    STYLE
    + """
.verdict{border-left:6px solid var(--soft);padding:.8rem 1.2rem;background:var(--card);margin:1rem 0}
.verdict b{font-size:1.5rem}.verdict p{margin:.3rem 0 0;color:var(--ink)}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.wide{grid-column:1/-1}g .interval{stroke:var(--soft);stroke-width:2}g circle{fill:var(--soft)}
g.good .interval{stroke:var(--good)}g.good circle{fill:var(--good)}
g.bad .interval{stroke:var(--bad)}g.bad circle{fill:var(--bad)}
.examples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(32rem,100%),1fr));gap:1rem}
.example{border-top:1px solid var(--line);padding:.6rem 0}.two{display:grid;grid-template-columns:1fr 1fr;gap:1rem}
.example ol{margin:.2rem 0;padding-left:1.3rem}.hit{color:var(--good);font-weight:600}dl{margin:0}dt{font-weight:600}
dd{margin:0 0 .5rem;color:var(--soft)}
.pic{display:inline-block;width:3.5rem;height:3.5rem;background:center/contain no-repeat;margin:.1rem}
.pic{vertical-align:middle}.strip{display:block}.example li .pic{width:2.4rem;height:2.4rem;margin:0;flex:none}
.item{display:inline-flex;align-items:center;gap:.5rem;vertical-align:middle;min-height:1.5rem}
.example li:has(.pic){margin:.15rem 0}
"""
)
_LONGEST_TITLE: Final = 110
_CLASS: Final = {SHIP: "good", OPEN: "", REFUSED: "bad"}
_WORDS: Final = {
    "NDCG@10": "how high the item that came next stands among the first ten: 1 at the first place, 0 below the tenth",
    "Recall@10": "share of the sessions whose next item is among the first ten",
    "±, interval": "range in which the figure lies with 95 % confidence if other users of the same kind had come",
    "coverage@10": "share of the catalogue that at least one session is recommended",
    "novelty": "how unknown the recommended items are, in bits: one more bit, half as many earlier events",
    "popularity bias": "earlier events of the recommended items, divided by those of the items that came next; "
    "1: as popular as what users choose",
    "diversity": "how different the ten items of a list are in text and picture: 0 alike, 1 unrelated",
    "excluded": "items that a session has already are not recommended, as most shops do",
    "kept": "they may be recommended again",
}


def page(report: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """Return the complete HTML page of a comparison (the content of comparison.json).

    ``pictures`` are ``data:`` URIs by item id, for the examples.
    """
    verdict = report["verdict"]
    protocol = verdict["protocol"]
    sections = [
        gate("Gate", "measure", verdict["gate"], "{:.4g}".format),
        _systems(report, protocol),
        _differences(report, protocol),
    ]
    sections += [_by_slice(report, protocol), _slices(report, protocol), _beyond(report, protocol), _cost(report)]
    sections += [_systems(report, name) for name in report["protocols"] if name != protocol]
    sections += [_examples(report, Pictures(pictures or {})), _left_out(report), _words()]
    title = f"{report['candidate']} against {report['current']}"
    about = f"{report['data']}, {report['split']} sessions, {report['made']}"
    above = headline(verdict["decision"].capitalize(), f"{verdict['words']}.", _CLASS[verdict["decision"]])
    return document(f"Comparison: {title}", title, about, sections, above=above, style=COMPARISON_STYLE)


def headline(head: str, words: str, colour: str = "") -> str:
    """Return a page's main statement as HTML; ``colour`` is its class: good or bad."""
    return f'<div class="verdict {colour}"><b>{escape(head)}</b><p>{escape(words)}</p></div>'


def _systems(report: Mapping[str, Any], protocol: str) -> str:
    measured = report["protocols"][protocol]
    rows = []
    for name, of in measured.items():
        low, high = of["interval"]["ndcg@10"]
        seeds = report["systems"][name].get("seeds")
        rows.append(
            (
                _role(report, name),
                f"{of['ndcg@10']:.4f} ± {(high - low) / 2:.4f}",
                f"{of['recall@10']:.4f}",
                f"{of['recall@50']:.4f}",
                report["systems"][name]["kind"] + (f", {seeds['n']} seeds" if seeds else ""),
            )
        )
    head = ("system", "NDCG@10", "Recall@10", "Recall@50", "what it is")
    chart = bars(list(measured), [of["ndcg@10"] for of in measured.values()], x_title="system", y_title="NDCG@10")
    return section(f"Accuracy, seen items {PROTOCOL_TITLES[protocol]}", table(head, rows) + chart)


def _role(report: Mapping[str, Any], name: str) -> str:
    roles = {report["current"]: " (current)", report["candidate"]: " (candidate)"}
    return name + roles.get(name, "")


def _differences(report: Mapping[str, Any], protocol: str) -> str:
    found = {name: of["ndcg@10"] for name, of in report["differences"][protocol].items()}
    chart = intervals(
        list(found),
        [of["difference"] for of in found.values()],
        [(of["low"], of["high"]) for of in found.values()],
        x_title=f"NDCG@10 minus that of {report['current']}, same users",
    )
    words = "Each line is a system; right of zero it is better than the current one. The line is the 95 % interval."
    rows = [
        (name, f"{of['difference']:+.4f}", f"{of['low']:+.4f} to {of['high']:+.4f}", _change(of["relative"]))
        for name, of in found.items()
    ]
    return section(
        "Difference to the current system",
        f"<p>{words}</p>{chart}" + table(("system", "difference", "95 % interval", "change"), rows),
    )


def _change(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:+.1%}"


def _by_slice(report: Mapping[str, Any], protocol: str) -> str:
    found = {
        f"{name.replace('_', ' ')} ({part['n']:,})": part["differences"][protocol]["ndcg@10"]
        for name, part in report["slices"].items()
        if part["n"]
    }
    chart = intervals(
        list(found),
        [of["difference"] for of in found.values()],
        [(of["low"], of["high"]) for of in found.values()],
        x_title=f"NDCG@10, {report['candidate']} minus {report['current']}",
    )
    words = "Where the candidate is better (green), worse (red), or not different for sure. Sessions in brackets."
    return section("By kind of session", f"<p>{words}</p>{chart}")


def _slices(report: Mapping[str, Any], protocol: str) -> str:
    names = list(report["protocols"][protocol])
    rows = [
        (
            part.replace("_", " "),
            f"{of['n']:,}",
            *("-" if (value := of[protocol][name]["ndcg@10"]) is None else f"{value:.4f}" for name in names),
        )
        for part, of in report["slices"].items()
        if of["n"]
    ]
    words = (
        "Cold: the next item has no earlier event. Rare: fewer than five. Short sessions have up to three items, "
        "long ones ten or more."
    )
    return section("NDCG@10 by kind of session", f"<p>{words}</p>" + table(("sessions", "number", *names), rows))


def _beyond(report: Mapping[str, Any], protocol: str) -> str:
    rows = [
        (
            _role(report, name),
            _value(of["coverage@10"], "{:.1%}"),
            _value(of["novelty"], "{:.2f}"),
            _value(of["popularity_bias"], "{:.2f}"),
            _value(of["diversity"], "{:.3f}"),
        )
        for name, of in report["beyond_accuracy"][protocol].items()
    ]
    head = ("system", "coverage@10", "novelty", "popularity bias", "diversity")
    return section("Beyond accuracy", table(head, rows))


def _cost(report: Mapping[str, Any]) -> str:
    rows, threads = [], 0
    for name, of in report["systems"].items():
        found = of["cost"] or {}
        threads = found.get("threads", threads)
        times = [_value(found.get("milliseconds", {}).get(size), "{:.1f} ms") for size in ("1", "64")]
        weights = f"{found['parameters']:,}" if found.get("parameters") else "-"
        rows.append((_role(report, name), *times, weights, _size(found.get("bytes_in_memory")), _size(of["bytes"])))
    words = (
        f"Median time to score all {report['n_items']:,} items and take the first ten, for one session and for "
        f"64 at once, in this process on this machine (threads: {threads}), not by a server. -: not called here."
    )
    head = ("system", "1 session", "64 sessions", "trained weights", "in memory", "on disk")
    return section("Latency, memory and size", f"<p>{words}</p>" + table(head, rows))


def _value(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _size(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f} MB"


class Pictures:
    """Pictures of the examples; each stands once in the page, however often its item is shown."""

    def __init__(self, of: Mapping[str, str]) -> None:
        self.number = {item: number for number, item in enumerate(of)}
        rules = [f".p{number}{{background-image:url({uri})}}" for number, uri in enumerate(of.values())]
        self.style = f"<style>{''.join(rules)}</style>" if rules else ""

    def __call__(self, item: str | None) -> str:
        """Return the picture of an item as HTML; empty if it has none."""
        return f'<i class="pic p{self.number[item]}"></i>' if item in self.number else ""


def _examples(report: Mapping[str, Any], pictures: Pictures) -> str:
    shown = [example_card(example, f"Better: {example['better']}", pictures) for example in report["examples"]]
    words = "The sessions on which the two differ most; the item that came next is green."
    return wide_section("Examples", words, shown, pictures)


def wide_section(title: str, words: str, cards: Sequence[str], pictures: Pictures) -> str:
    """Return a section of the page's whole width with examples; ``cards`` are HTML."""
    inside = f'<p>{words}</p><div class="examples">{"".join(cards)}</div>' if cards else "<p>There is none.</p>"
    return section(title, pictures.style + inside, wide=True)


def example_card(example: Mapping[str, Any], heading: str, pictures: Pictures) -> str:
    """Return one session of `missrec_t4r.comparison.examples.described` as HTML."""
    lists = "".join(_list(name, of, pictures) for name, of in example["systems"].items())
    earlier = f"{example['earlier']} earlier, " if example["earlier"] else ""
    history = "; ".join(_short(title) for title in example["history"]) or "nothing known"
    strip = "".join(map(pictures, example["history_ids"]))
    return (
        f'<div class="example"><b>{escape(heading)}</b>'
        f"<p>User {escape(str(example['user']))} had: {escape(earlier + history)}"
        f'<span class="strip">{strip}</span>'
        f'Next came: {pictures(example["target_id"])}<span class="hit">{escape(_short(example["target"]))}</span></p>'
        f'<div class="two">{lists}</div></div>'
    )


def _list(name: str, of: Mapping[str, Any], pictures: Pictures) -> str:
    place = "not among the first fifty" if of["rank"] is None else f"at place {of['rank']}"
    items = "".join(
        f'<li{" class=hit" if item["hit"] else ""} title="{escape(item["title"])}">'
        f'<span class="item">{pictures(item["id"])}<span>{escape(_short(item["title"]))}</span></span></li>'
        for item in of["list"]
    )
    return f"<div>{escape(name)}: {place}<ol>{items}</ol></div>"


def _short(title: str) -> str:
    """Return a title that fits a line or two; the whole one is shown by the mouse."""
    return title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 1].rstrip() + "…"


def _left_out(report: Mapping[str, Any]) -> str:
    rows = [("all systems", name.replace("_", " "), f"{value:,}") for name, value in report["sessions"].items()]
    for name, of in report["systems"].items():
        rows += [(name, what.replace("_", " "), f"{value:,}") for what, value in of["counts"].items() if value]
        rows += [(name, note, "") for note in of["notes"]]
        if of["ranked_items"] != report["n_items"]:
            rows.append((name, "ranks among another number of items", f"{of['ranked_items']:,}"))
    return section("What was compared, and what was left out", table(("system", "what", "number"), rows))


def _words() -> str:
    inside = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _WORDS.items())
    return section("How to read the figures", f"<dl>{inside}</dl>")
