"""The summary that a command prints on a terminal when it has finished.

The whole result is the line of JSON of ``--json``, and it is in the files that the command writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

_LONGEST_LIST = 6
"""Entries of a list that are printed; of a longer one their number."""


def summary(command: str, result: Any) -> RenderableType:
    """Return what to print for the result of a command, by its name such as ``catalogue update``."""
    if not isinstance(result, Mapping):
        return str(result)
    special = None if result.get("dry_run") else _SPECIAL.get(command)
    return special(result) if special else facts(result)


def facts(result: Mapping[str, Any], leave_out: Sequence[str] = ()) -> Table:
    """Return a mapping as lines of name and value; nested mappings as dotted names."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in _flat({key: value for key, value in result.items() if key not in leave_out}):
        table.add_row(name, value)
    return table


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in result.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            if any(isinstance(part, Mapping | list) for part in value) or len(value) > _LONGEST_LIST:
                yield name, f"{len(value):,} entries"
            elif value:
                yield name, ", ".join(map(_text, value))
        elif value is not None:
            yield name, _text(value)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _evaluation(result: Mapping[str, Any]) -> RenderableType:
    from missrec_t4r.evaluation.report import table

    return Group(table(result), facts({name: result[name] for name in ("data", "seconds", "file") if name in result}))


def _comparison(result: Mapping[str, Any]) -> RenderableType:
    from missrec_t4r.evaluation.report import metrics_table, slices_table

    verdict, protocols = result["verdict"], list(result["protocols"])
    differences, rows = result["differences"][verdict["protocol"]], []
    for name, beyond in result["beyond_accuracy"][verdict["protocol"]].items():
        found = differences[name]["ndcg@10"] if name in differences else {}
        signed = {end: f"{found[end]:+.4f}" for end in ("difference", "low", "high") if found}
        cost = result["systems"][name]["cost"] or {}
        times = {f"ms{size}": value for size, value in cost.get("milliseconds", {}).items()}
        rows.append({"system": name, **signed, **beyond, **times})
    columns = {"system": "system", "difference": "ndcg@10 to current", "low": "low", "high": "high"}
    columns |= {name: name.replace("_", " ") for name in ("coverage@10", "novelty", "popularity_bias", "diversity")}
    columns |= {"ms1": "ms for 1", "ms64": "ms for 64"}
    return Group(
        *(metrics_table({**result, "coverage": result["beyond_accuracy"]}, name) for name in protocols),
        slices_table(result, verdict["protocol"]),
        rows_table(rows, columns),
        facts({"sessions": result["sessions"], **{name: result[name] for name in ("report", "page")}}),
        verdict["summary"],
    )


def _etl(result: Mapping[str, Any]) -> RenderableType:
    findings = rows_table(
        result.get("findings", ()), {"check": "data-quality finding", "count": "count", "message": ""}
    )
    return Group(facts(result, ("findings", "settings", "format")), findings)


def _features(result: Mapping[str, Any]) -> RenderableType:
    rows = [{"modality": name, **part, "encoder": result.get("encoder")} for name, part in result["modalities"].items()]
    table = rows_table(rows, {name: name for name in ("modality", "items", "missing", "broken", "width", "encoder")})
    return Group(table, facts(result, ("modalities", "encoder")))


def _training(result: Mapping[str, Any]) -> RenderableType:
    terms = result.get("score_terms") or {}
    network = terms.get("valid_ndcg@10_without_terms", result.get("valid_ndcg@10"))
    read = {"valid ndcg@10, network alone": network, "valid ndcg@10, with score terms": terms.get("valid_ndcg@10")}
    report = result.get("weight_loading") or {}
    started = {"started from": report.get("run"), "frozen": report.get("freeze")}
    return facts(
        {"run": result.get("run"), **read, **started, **result},
        ("score_terms", "weight_loading", "valid_ndcg@10", "domains", "chosen"),
    )


def _recommendations(result: Mapping[str, Any]) -> RenderableType:
    rows = [{"rank": rank, **row} for rank, row in enumerate(result["recommendations"], 1)]
    names = {name: name.replace("_", " ") for name in ("rank", "item_id", "title", "score", "because_of", "modality")}
    return Group(rows_table(rows, names), facts(result, ("recommendations",)))


def _similar(result: Mapping[str, Any]) -> RenderableType:
    if "similar" not in result:
        return facts(result)
    rows = [{"to": item, **row} for item, others in result["similar"].items() for row in others]
    return rows_table(rows, {"to": "item", "item_id": "similar item", "title": "title", "score": "score"})


def _quality(result: Mapping[str, Any]) -> RenderableType:
    gate = [{**line, **line["bounds"], "passed": "passed" if line["passed"] else "violated"} for line in result["gate"]]
    return Group(
        rows_table(gate, {name: name for name in ("measure", "value", "min", "max", "passed")}),
        facts(result, ("gate",)),
    )


def _serving(result: Mapping[str, Any]) -> RenderableType:
    names = {"instances": "instances", "threads": "threads", "max_batch_size": "batch", "queue_delay_us": "delay us"}
    names |= {"preferred_batch_size": "preferred", "sessions_per_s": "sessions/s", "chosen": ""}
    for sessions in (1, 64):
        names |= {f"{kind}_{sessions}": f"{kind} {sessions}, ms" for kind in ("p50", "p99")}
    return Group(rows_table(result["tried"], names), facts(result, ("tried",)))


_SPECIAL: dict[str, Callable[[Mapping[str, Any]], RenderableType]] = {
    "evaluate": _evaluation,
    "compare": _comparison,
    "etl": _etl,
    "catalogue adopt": _etl,
    "recommend": _recommendations,
    "similar": _similar,
    "report": _quality,
    "demo": lambda result: facts(result, ("recommendations",)),
    "features": _features,
    "tune serving": _serving,
    "train": _training,
    "pretrain": _training,
}


def rows_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table | str:
    """Return rows as a table with the columns that any of them has; an empty text without rows."""
    if not rows:
        return ""
    shown = [name for name in columns if any(row.get(name) is not None for row in rows)]
    table = Table()
    for name in shown:
        table.add_column(columns[name], overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(name) is None else _text(row[name]) for name in shown))
    return table
