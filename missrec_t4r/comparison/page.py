"""The HTML page of a comparison: verdict, tables, charts and examples in one self-contained file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Final

from missrec_t4r.comparison.verdict import OPEN, REFUSED, SHIP
from missrec_t4r.evaluation.full_ranking import PROTOCOL_TITLES
from missrec_t4r.evaluation.report import NO_VALUE
from missrec_t4r.pages.charts import intervals
from missrec_t4r.pages.document import STYLE, document, gate, section, table

COMPARISON_STYLE: Final = (
    STYLE
    + """
.verdict{border-left:6px solid var(--soft);padding:.8rem 1.2rem;background:var(--card);margin:1rem 0}
.verdict b{font-size:1.5rem}.verdict p{margin:.3rem 0 0;color:var(--ink)}
.verdict.good{border-color:var(--good)}.verdict.bad{border-color:var(--bad)}
.wide{grid-column:1/-1}g .interval{stroke:var(--soft);stroke-width:2}g circle{fill:var(--soft)}
g.good .interval{stroke:var(--good)}g.good circle{fill:var(--good)}
g.bad .interval{stroke:var(--bad)}g.bad circle{fill:var(--bad)}
.grid{grid-auto-flow:dense}.verdict p{white-space:pre-line}
.example{border-top:1px solid var(--line);padding:.6rem 0}
.lists{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(17rem,100%),1fr));gap:.6rem 1.5rem;margin:.4rem 0}
.example ol,.example ul{margin:.2rem 0;padding-left:1.5rem}.example ul{list-style:none;padding:0}
.example li{margin:.3rem 0;line-height:1.3}.hit{color:var(--good);font-weight:600}
dl{margin:0}dt{font-weight:600}dd{margin:0 0 .5rem;color:var(--soft)}
.item{display:inline-flex;align-items:flex-start;gap:.5rem;vertical-align:top}
.pic{flex:none;width:2.6rem;height:2.6rem;background:center/contain no-repeat}
"""
)
_LONGEST_TITLE: Final = 110
_NARROW: Final = 5
"""Systems that fit beside each other into half of the page."""
_BUSY: Final = 1.2
"""Load per core from which times are said to be wrong."""
_CLASS: Final = {SHIP: "good", OPEN: "", REFUSED: "bad"}
_WORDS: Final = {
    "NDCG@10": "how high the item that came next stands among the first ten: 1 at the first place, 0 below the tenth",
    "Recall@10": "share of the sessions whose next item is among the first ten",
    "±, interval": "range in which the figure lies with 95 % confidence if other users of the same kind had come",
    "T4R model, missrec run": "trained by a script of Transformers4Rec, or by missrec train with its score terms",
    "coverage@10": "share of the catalogue that at least one session is recommended",
    "novelty": "how unknown the recommended items are, in bits: one more bit, half as many earlier events",
    "popularity bias": "earlier events of the recommended items, divided by those of the items that came next; "
    "1: as popular as what users choose",
    "diversity": "how different the ten items of a list are in text and picture: 0 alike, 1 unrelated",
    "seen items excluded": "items that a session has already are not recommended, as most shops do",
    "kept, strict": "they may be recommended again, and no score depends on what was seen, as in most papers",
    "kept, with history term": "they may be recommended again, and the score may depend on what was seen",
}
SLICE_WORDS: Final = (
    "Cold: the next item has no event in training. Rare: fewer than five. Short sessions have up to three items, "
    "long ones ten or more."
)
_BEYOND: Final = {
    "coverage@10": ("coverage@10", "{:.1%}"),
    "novelty": ("novelty", "{:.2f}"),
    "popularity bias": ("popularity_bias", "{:.2f}"),
    "diversity": ("diversity", "{:.3f}"),
}
_KINDS: Final = {"run": "missrec run", "t4r model": "T4R model", "lists": "file of lists"}
_SESSIONS: Final = {
    "in_split": "sessions of the split",
    "compared": "sessions that all systems have: compared",
    "left_out": "sessions that a system lacks: left out",
    "targets_no_item": "compared, but the next item is not in the catalogue",
    "without_known_item": "compared, but no earlier item is in the catalogue",
}


def page(report: Mapping[str, Any], pictures: Mapping[str, str] | None = None) -> str:
    """Return the complete HTML page of a comparison (the content of comparison.json).

    ``pictures`` are ``data:`` URIs by item id, for the examples.
    """
    verdict = report["verdict"]
    protocol = verdict["protocol"]
    explained = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _WORDS.items())
    sections = [
        gate("Gate", "measure", verdict["gate"], "{:.4g}".format),
        _systems(report, protocol),
        _differences(report, protocol),
        _by_slice(report, protocol),
        _slices(report, protocol),
        _beyond(report, protocol),
        _cost(report),
        *(_systems(report, name) for name in report["protocols"] if name != protocol),
        section("How to read the figures", f"<dl>{explained}</dl>"),
        _examples(report, Pictures(pictures or {})),
        _left_out(report),
    ]
    title = f"{report['candidate']} against {report['current']}"
    made = datetime.fromisoformat(report["made"])
    about = (
        f"{report['n_users']:,} sessions of the {report['split']} split, {report['n_items']:,} items, made "
        f"{made.day} {made:%B %Y, %H:%M} UTC"
    )
    words = "\n".join([f"{verdict['summary']}.", *verdict["explanation"]])
    above = headline(verdict["decision"].capitalize(), words, _CLASS[verdict["decision"]])
    return document(f"Comparison: {title}", title, about, sections, above=above, style=COMPARISON_STYLE)


def headline(head: str, words: str, colour: str = "") -> str:
    """Return a page's main statement as HTML; ``colour`` is its class: good or bad."""
    return f'<div class="verdict {colour}"><b>{escape(head)}</b><p>{escape(words)}</p></div>'


def _systems(report: Mapping[str, Any], protocol: str) -> str:
    measured, rows = report["protocols"][protocol], []
    for name, own in measured.items():
        system = report["systems"][name]
        seeds = f", {system['seeds']['n']} seeds" if "seeds" in system else ""
        cells = (with_interval(own, "ndcg@10"), form(own["recall@10"]), form(own["recall@50"]))
        rows.append((_role(report, name), *cells, _KINDS.get(system["kind"], system["kind"]) + seeds))
    head = ("system", "NDCG@10", "Recall@10", "Recall@50", "what it is")
    return section(f"Accuracy, seen items {PROTOCOL_TITLES[protocol]}", table(head, rows) + accuracy_chart(measured))


def accuracy_chart(measured: Mapping[str, Any], x_title: str = "NDCG@10 with 95 % interval") -> str:
    """Return NDCG@10 of every system with its interval, as a chart; bars would leave out long names."""
    return intervals(
        list(measured),
        [own["ndcg@10"] or 0.0 for own in measured.values()],
        [own["interval"]["ndcg@10"] or (0.0, 0.0) for own in measured.values()],
        x_title=x_title,
        differences=False,
    )


def with_interval(measured: Mapping[str, Any], metric: str) -> str:
    """Return a metric with half the width of its interval."""
    if measured[metric] is None:
        return NO_VALUE
    low, high = measured["interval"][metric]
    return f"{measured[metric]:.4f}\u00a0±\u00a0{(high - low) / 2:.4f}"


def form(value: float | None, pattern: str = "{:.4f}") -> str:
    """Return a number as text."""
    return NO_VALUE if value is None else pattern.format(value)


def by_slice(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the slices that have a session, by their title with the number of sessions."""
    slices = report["slices"].items()
    return {f"{name.replace('_', ' ')} ({part['n']:,})": part for name, part in slices if part["n"]}


def _role(report: Mapping[str, Any], name: str) -> str:
    roles = {report["current"]: " (current)", report["candidate"]: " (candidate)"}
    return name + roles.get(name, "")


def _differences(report: Mapping[str, Any], protocol: str) -> str:
    differences = {name: by_metric["ndcg@10"] for name, by_metric in report["differences"][protocol].items()}
    chart = _difference_chart(differences, f"NDCG@10 minus that of {report['current']}, same users")
    words = "Each line is a system; right of zero it is better than the current one. The line is the 95 % interval."
    rows = [
        (
            name,
            f"{own['difference']:+.4f}",
            f"{own['low']:+.4f} to {own['high']:+.4f}",
            form(own["relative"], "{:+.1%}"),
        )
        for name, own in differences.items()
    ]
    return section(
        "Difference to the current system",
        f"<p>{words}</p>{chart}" + table(("system", "difference", "95 % interval", "change"), rows),
    )


def _difference_chart(differences: Mapping[str, Mapping[str, float]], x_title: str) -> str:
    return intervals(
        list(differences),
        [own["difference"] for own in differences.values()],
        [(own["low"], own["high"]) for own in differences.values()],
        x_title=x_title,
    )


def _by_slice(report: Mapping[str, Any], protocol: str) -> str:
    differences = {name: part["differences"][protocol]["ndcg@10"] for name, part in by_slice(report).items()}
    chart = _difference_chart(differences, f"NDCG@10, {report['candidate']} minus {report['current']}")
    words = "Where the candidate is better (green), worse (red), or not different for sure. Sessions in brackets."
    return section("By kind of session", f"<p>{words}</p>{chart}")


def _slices(report: Mapping[str, Any], protocol: str) -> str:
    names = list(report["protocols"][protocol])
    rows = [(part, *(form(own[protocol][name]["ndcg@10"]) for name in names)) for part, own in by_slice(report).items()]
    inside = f"<p>{SLICE_WORDS}</p>" + table(("sessions (number)", *names), rows)
    return section("NDCG@10 by kind of session", inside, wide=len(names) > _NARROW)


def _beyond(report: Mapping[str, Any], protocol: str) -> str:
    rows = [
        (_role(report, name), *(form(own[measure], pattern) for measure, pattern in _BEYOND.values()))
        for name, own in report["beyond_accuracy"][protocol].items()
    ]
    return section("Beyond accuracy", table(("system", *_BEYOND), rows))


def _cost(report: Mapping[str, Any]) -> str:
    rows, threads, load = [], 0, 0.0
    for name, system in report["systems"].items():
        cost = system["cost"] or {}
        threads, load = cost.get("threads", threads), max(load, cost.get("load", 0.0))
        times = [form(cost.get("milliseconds", {}).get(size), "{:.1f}\u00a0ms") for size in ("1", "64")]
        weights = form(cost.get("parameters") or None, "{:,}")
        rows.append((_role(report, name), *times, weights, _size(cost.get("bytes_in_memory")), _size(system["bytes"])))
    words = (
        f"Median time to score all {report['n_items']:,} items and take the first ten, for one session and for "
        f"64 at once, in this process on this machine (threads: {threads}), not by a server. -: not called here."
    )
    if load > _BUSY:
        words += f" The machine had {load:.1f} times the work that its cores can do: the times are too long, unevenly."
    head = ("system", "1 session", "64 sessions", "trained weights", "in memory", "on disk")
    return section("Latency, memory and size", f"<p>{words}</p>" + table(head, rows))


def _size(size: int | None) -> str:
    return form(None if size is None else size / 1e6, "{:.1f}\u00a0MB")


class Pictures:
    """Pictures of the examples; each stands once in the page, however often its item is shown."""

    def __init__(self, uris: Mapping[str, str]) -> None:
        self.number = {item: number for number, item in enumerate(uris)}
        rules = [f".p{number}{{background-image:url({uri})}}" for number, uri in enumerate(uris.values())]
        self.style = f"<style>{''.join(rules)}</style>" if rules else ""

    def __call__(self, item: str | None) -> str:
        """Return the picture of an item as HTML; empty if it has none."""
        return f'<i class="pic p{self.number[item]}"></i>' if item in self.number else ""


def _examples(report: Mapping[str, Any], pictures: Pictures) -> str:
    shown = [example_card(example, f"Better: {example['better']}", pictures) for example in report["examples"]]
    words = (
        f"The sessions on which {report['candidate']} is most ahead of {report['current']}, then those on which it is "
        "most behind: as many of each, however many there are. The item that came next is green."
    )
    return wide_section("Examples", words, shown, pictures)


def wide_section(title: str, words: str, cards: Sequence[str], pictures: Pictures) -> str:
    """Return a section of the page's whole width with examples; ``cards`` are HTML, ``words`` are escaped here."""
    inside = f"<p>{escape(words)}</p>{''.join(cards)}" if cards else "<p>There is none.</p>"
    return section(title, pictures.style + inside, wide=True)


def example_card(example: Mapping[str, Any], heading: str, pictures: Pictures) -> str:
    """Return one session of `missrec_t4r.comparison.examples.described` as HTML: its items, and the lists beside."""
    known = zip(example["history"], example["history_ids"], strict=True)
    had = "".join(_item(title, item, False, pictures) for title, item in known) or "<li>nothing known</li>"
    came = _item(example["target"], example["target_id"], True, pictures)
    earlier = f", after {example['earlier']} earlier" if example["earlier"] else ""
    session = f"<div>User {escape(str(example['user']))} had{earlier}:<ul>{had}</ul>and next came:<ul>{came}</ul></div>"
    lists = "".join(_list(name, shown, pictures) for name, shown in example["systems"].items())
    return f'<div class="example"><b>{escape(heading)}</b><div class="lists">{session}{lists}</div></div>'


def _list(name: str, shown: Mapping[str, Any], pictures: Pictures) -> str:
    items = "".join(_item(item["title"], item["id"], item["hit"], pictures) for item in shown["list"])
    return f"<div>{escape(name)}: {place(shown['rank'])}<ol>{items}</ol></div>"


def place(rank: int | None) -> str:
    """Return the rank of the item that came next as text."""
    return "not among the first fifty" if rank is None else f"at place {rank}"


def _item(title: str, item: str | None, hit: bool, pictures: Pictures) -> str:
    short = title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 1].rstrip() + "…"
    return (
        f'<li{" class=hit" if hit else ""} title="{escape(title)}">'  # the whole title is shown by the mouse
        f'<span class="item">{pictures(item)}<span>{escape(short)}</span></span></li>'
    )


def _left_out(report: Mapping[str, Any]) -> str:
    rows = [("all systems", f"data folder {report['data']}", "")]
    rows += [("all systems", _SESSIONS[name], f"{value:,}") for name, value in report["sessions"].items()]
    for name, system in report["systems"].items():
        rows += [(name, what.replace("_", " "), f"{value:,}") for what, value in system["counts"].items() if value]
        rows += [(name, note, "") for note in system["notes"]]
        if system["ranked_items"] != report["n_items"]:
            rows.append((name, "ranks among another number of items", f"{system['ranked_items']:,}"))
    return section("What was compared, and what was left out", table(("system", "what", "number"), rows))
