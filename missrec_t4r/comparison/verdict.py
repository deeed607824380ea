"""Ship or not: the candidate's paired difference to the current system, or the bounds of a gate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from missrec_t4r.evaluation.metrics import CRITERION

SHIP: Final = "ship"
OPEN: Final = "no difference shown"
REFUSED: Final = "do not ship"


def decide(measures: Mapping[str, Any], protocol: str, gate: Path | None) -> tuple[str, list[dict[str, Any]]]:
    """Return the decision and the checked bounds.

    Without a gate: ship if the 95 % interval of the difference in NDCG@10 is above zero, "no difference shown" if it
    holds zero, "do not ship" if it is below. With a gate: ship if every bound holds, else "do not ship".

    Parameters
    ----------
    measures : mapping of str to float or None
        As `measures_of` returns them.
    protocol : str
        Of the difference.
    gate : Path or None
        YAML of bounds: ``measure: {min: number, max: number}``.

    Raises
    ------
    ConfigError
        The gate cannot be read, or names an unknown measure.
    """
    low, high = (measures[f"{protocol}.difference_{end}.{CRITERION}"] for end in ("low", "high"))
    if gate is None:
        if low > 0:
            return SHIP, []
        return (REFUSED if high < 0 else OPEN), []
    from missrec_t4r.etl.quality.report import check_bounds, read_gate

    checks = check_bounds(measures, read_gate(gate))
    return (SHIP if all(check["passed"] for check in checks) else REFUSED), checks


def measures_of(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what a gate may bound, of the candidate, by dotted names such as excluded.difference.ndcg@10."""
    return dict(_measures(report))


def _measures(report: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    candidate = report["candidate"]
    for protocol, differences in report["differences"].items():
        yield from _metrics(protocol, report["protocols"][protocol][candidate], differences[candidate])
        for name, value in report["beyond_accuracy"][protocol][candidate].items():
            yield f"{protocol}.{name}", value
        for name, part in report["slices"].items():
            if name != "all":
                prefix, by_protocol = f"slice.{name}.{protocol}", part["differences"]
                yield from _metrics(prefix, part[protocol][candidate], by_protocol[protocol])
    yield "n_users", report["n_users"]
    yield "bytes", report["systems"][candidate]["bytes"]
    cost = report["systems"][candidate]["cost"] or {}
    yield "bytes_in_memory", cost.get("bytes_in_memory")
    for size, milliseconds in cost.get("milliseconds", {}).items():
        yield f"milliseconds.{size}", milliseconds


def _metrics(
    prefix: str, measured: Mapping[str, Any], differences: Mapping[str, Any] | None
) -> Iterator[tuple[str, float | None]]:
    for metric, value in measured.items():
        if "@" in metric:
            yield f"{prefix}.{metric}", value
            difference = (differences or {}).get(metric) or {}
            for name in ("difference", "low", "high", "relative"):
                kind = f"difference_{name}" if name in ("low", "high") else name
                yield f"{prefix}.{kind}.{metric}", difference.get(name)


def sentence(report: Mapping[str, Any], decision: str, protocol: str) -> str:
    """Return the verdict in one sentence, with its numbers."""
    candidate, current = report["candidate"], report["current"]
    values = [report["protocols"][protocol][name][CRITERION] for name in (candidate, current)]
    difference = report["differences"][protocol][candidate][CRITERION]
    change = "" if difference["relative"] is None else f" ({difference['relative']:+.1%})"
    start = {
        SHIP: f"Ship {candidate}",
        OPEN: f"No difference shown between {candidate} and {current}",
        REFUSED: f"Do not ship {candidate}",
    }[decision]
    return (
        f"{start}: NDCG@10 {values[0]:.4f} against {values[1]:.4f} of {current}{change}, difference "
        f"{difference['difference']:+.4f}, 95 % interval {difference['low']:+.4f} to {difference['high']:+.4f}, "
        f"{report['n_users']:,} sessions"
    )


def explanation(report: Mapping[str, Any], protocol: str) -> list[str]:
    """Return what the verdict's figures mean, in sentences for a reader who knows no metric."""
    candidate, current = report["candidate"], report["current"]
    measured, counts = report["protocols"][protocol], report["outcomes"][protocol]
    shares = [f"{100 * measured[name]['recall@10']:.1f}" for name in (candidate, current)]
    sentences = [
        f"The item that came next is among the first ten recommendations of {candidate} in {shares[0]} of 100 "
        f"sessions, among those of {current} in {shares[1]}.",
        f"It stands higher with {candidate} in {counts['candidate_better']:,} sessions and with {current} in "
        f"{counts['current_better']:,}; in {counts['equal']:,} there is no difference (in {counts['neither_found']:,} "
        "of them neither has it among its first ten).",
    ]
    best = max(measured, key=lambda name: measured[name][CRITERION])
    if best not in (candidate, current):
        sentences.append(f"Of all that are compared, {best} has the highest NDCG@10: {measured[best][CRITERION]:.4f}.")
    return sentences
