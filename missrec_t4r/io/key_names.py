"""Keys of JSON files of earlier versions, and what they are called now.

Of a run's `run.json`, a bundle's `model.json` and the `report.json` of `missrec report`.

Names of settings in them are translated by `missrec_t4r.config.renamed`. `docs/migration.md` lists the keys for users.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from missrec_t4r.io.json_files import read_json

_RENAMED: Final = {
    "made_from": "data_digest",
    "prior": "score_terms",
    "shown": "distributions",
    "side_features": "event_features",
    "start": "weight_loading",
    "without": "ignored_settings",
}
"""Earlier key -> today's, at the top of a file."""
_TERMS: Final = {"lookalikes": "content_knn", "newcomers": "cold_start", "without": "valid_ndcg@10_without_terms"}
_ITEM_KNN: Final = ("weight", "decay", "power", "window", "directed")
"""Keys that stood beside the other terms and are those of ``item_knn``."""
_COLD_START: Final = {"bar": "threshold", "level": "bias"}
_KINDS: Final = {"continue": "warm_start"}


def read_with_current_keys(file: Path) -> dict[str, Any]:
    """Return the content of one of these files under today's keys."""
    return with_current_keys(read_json(file))


def with_current_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of one of these files under today's keys; those of today stay as they are.

    Examples
    --------
    >>> with_current_keys({"epochs": 2, "prior": {"weight": 3.0, "decay": 0.7, "lookalikes": {"weight": 0.0}}})
    {'epochs': 2, 'score_terms': {'item_knn': {'weight': 3.0, 'decay': 0.7}, 'content_knn': {'weight': 0.0}}}
    """
    current = _renamed(content, _RENAMED)
    if isinstance(terms := content.get("prior"), Mapping):
        current["score_terms"] = with_current_terms(terms)
    if isinstance(report := content.get("start"), Mapping) and "kind" in report:
        current["weight_loading"] = {**report, "kind": _KINDS.get(report["kind"], report["kind"])}
    return current


def with_current_terms(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of score terms, ``score_terms`` of a run, under today's keys."""
    item_knn = {name: terms[name] for name in _ITEM_KNN if name in terms}
    others = _renamed({name: value for name, value in terms.items() if name not in _ITEM_KNN}, _TERMS)
    if others.get("cold_start"):
        others["cold_start"] = _renamed(others["cold_start"], _COLD_START)
    return ({"item_knn": item_knn} if item_knn else {}) | others


def _renamed(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in content.items()}
