"""Protocol checklist of an evaluation: what was decided on which data, so that its figures can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM, PROTOCOLS
from missrec_t4r.io.json_files import read_json
from missrec_t4r.runs.run_folder import LoadedRun

NOT_RECORDED: Final = "not recorded"
_SEEN_ITEMS: Final = {
    EXCLUDED: "removed before ranking; a target that was seen is a miss",
    KEPT_STRICT: "ranked; no part of the score depends on what was seen (own pairs count, an item may resemble itself)",
    KEPT_WITH_HISTORY_TERM: "ranked; the model's score may depend on what was seen (history bias, own pairs taken off)",
}
_HISTORY_BIAS: Final = {
    KEPT_STRICT: "left out of a network that was trained with it (without: --set model.history_bias=false)",
    KEPT_WITH_HISTORY_TERM: "as trained; in the row model tuned around that value",
}
_TRAINED_WITHOUT: Final = "none: trained without it"


def checklist(loaded: LoadedRun, info: Mapping[str, Any], n_valid: int) -> dict[str, Any]:
    """Return the checklist of a run.

    Parameters
    ----------
    loaded : LoadedRun
    info : mapping
        Its `run.json`.
    n_valid : int
        Validation sessions on which blend weights were tuned.
    """
    config = loaded.recipe.model
    return {
        "seen_items": _SEEN_ITEMS,
        "history_bias": _HISTORY_BIAS if config.history_bias else dict.fromkeys(_HISTORY_BIAS, _TRAINED_WITHOUT),
        "item_filter": _item_filter(loaded),
        "ties": "equal scores in the order of catalogue rows",
        "history_length": {
            "model": f"the last {config.max_sequence_length} known items",
            "baselines": "all known items",
        },
        "epochs_chosen_on": {
            "split": "valid",
            "metric": "ndcg@10 of the network, before terms are tuned",
            "protocol": KEPT_WITH_HISTORY_TERM if config.history_bias else KEPT_STRICT,
            "best_epoch": info.get("best_epoch", NOT_RECORDED),
            "epochs": info.get("epochs", NOT_RECORDED),
        },
        "blend_weights_tuned_on": {
            "split": "valid",
            "metric": "ndcg@10",
            "sessions": n_valid,
            **dict.fromkeys(PROTOCOLS, "this protocol"),
            "exported": f"mean of {EXCLUDED} and {KEPT_WITH_HISTORY_TERM}, after training",
        },
        "seeds": {"training": loaded.recipe.train.seed, "bootstrap": 0, "validation_sample": 0},
        "stopped_by": info.get("stopped_by", NOT_RECORDED),
    }


def _item_filter(loaded: LoadedRun) -> dict[str, Any]:
    file = loaded.data / "etl.json"
    settings = read_json(file).get("settings", {}) if file.is_file() else {}
    return {
        "ranked": int(loaded.model.recommendable.sum()),
        "catalogue": loaded.catalogue.n_items,
        **{name: settings.get(name, NOT_RECORDED) for name in ("min_item_count", "k_core")},
    }
