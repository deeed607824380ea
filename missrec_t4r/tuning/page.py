"""The HTML page of a search: learning curves of all trials, and what each of them changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from missrec_t4r.pages.charts import bars, curves
from missrec_t4r.pages.document import STYLE, document, section, table

_STYLE: Final = """
polyline.other{fill:none;stroke:var(--soft);stroke-width:1;opacity:.5}polyline.best{fill:none;stroke:var(--good);stroke-width:3}
"""
_VALUE: Final = "validation NDCG@10"


class Tried(NamedTuple):
    """A trial with at least one epoch."""

    number: int
    ended: str
    """By what: ``epochs``, ``patience``, ``max_minutes``, ``interrupt``, ``pruned``, ``refused`` (no room on the GPU)
    or ``killed``; else ``running``."""
    epochs: Sequence[float]
    """Validation NDCG@10 after every epoch."""
    changes: Mapping[str, Any]
    """Settings that differ from the recipe."""


def page(trials: Sequence[Tried], best: int, recipe: str) -> str:
    """Return the page.

    Parameters
    ----------
    trials : sequence of Tried
    best : int
        Number of the best trial.
    recipe : str
        Name of the recipe that the search started from.
    """
    lines = {f"trial {trial.number}": trial.epochs for trial in trials}
    learning = curves(lines, f"trial {best}", x_title="epoch", y_title=_VALUE)
    by_trial = bars(
        [str(trial.number) for trial in trials],
        [max(trial.epochs) for trial in trials],
        x_title="trial",
        y_title=_VALUE,
    )
    ordered = sorted(trials, key=lambda trial: max(trial.epochs), reverse=True)
    rows = [
        (
            f"{trial.number}{' (best)' if trial.number == best else ''}",
            f"{max(trial.epochs):.4f}",
            str(len(trial.epochs)),
            trial.ended,
            ", ".join(f"{name}={_short(value)}" for name, value in trial.changes.items()) or "the recipe itself",
        )
        for trial in ordered
    ]
    title = f"Search around the recipe {recipe}"
    words = "Each line is a trial, the thick one the best: the network alone, on validation sessions. No test is read."
    sections = [
        section("Learning curves", learning),
        section("Best epoch of every trial", by_trial),
        section("Trials", table(("trial", _VALUE, "epochs", "ended by", "changes"), rows)),
    ]
    return document(title, title, words, sections, style=STYLE + _STYLE)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
