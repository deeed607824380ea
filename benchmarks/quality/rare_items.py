"""Rare and cold items: the rare-item term of trained runs, with and without it, beside content-kNN.

    python -m benchmarks.quality.rare_items --run subset=work/bench/scientific_mm/default/seed-2020 --run shop=work/run
    python -m benchmarks.quality.rare_items --as-exported --run …

All terms are tuned on validation, for each protocol alone (*model*) and as exported (*exported*: for the mean of two
protocols), the rare-item term last. With ``--as-exported`` nothing is tuned, and the model is ranked with the terms
that its training left. The test split is ranked once. One result file for all runs.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import report, run_as_command
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.score_terms import ScoreTerms
from missrec_t4r.ranking.hybrid import build_terms, terms_of, with_terms
from missrec_t4r.ranking.protocols import EXPORTED, MODEL, Blend, BlendScorer, blends_of
from missrec_t4r.ranking.tune import TUNED_FOR, Validation, tune_terms
from missrec_t4r.runs.evaluate import evaluate_sessions, fitted_baselines
from missrec_t4r.runs.run_folder import load_run

_SLICES: Final = ("all", "rare", "cold")
_PROTOCOLS: Final = (EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM)
_METRICS: Final = ("recall@10", "ndcg@10")


def measure(run: Path, cost: float, *, tune: bool) -> dict[str, Any]:
    """Rank a run with and without the term, with its terms as they are or tuned anew."""
    loaded = load_run(run)
    model = loaded.model
    train, valid, test = (load_sessions(loaded.data, name, model.event_columns) for name in ("train", "valid", "test"))
    validation = Validation(model, loaded.catalogue, train.known(), valid.with_known_target())
    model.config = dataclasses.replace(model.config, rare_item_cost=cost)
    of_systems, settings = {EXPORTED: dict.fromkeys(TUNED_FOR, Blend(model.terms))}, {}
    if tune:
        tuned, settings = blends_of(model, validation, alone=False)
        exported, settings["exported"] = _exported(model, validation)
        of_systems = {MODEL: tuned[MODEL], EXPORTED: exported}
    blends: dict[str, dict[str, Blend]] = {}
    for name, of in of_systems.items():
        blends[f"{name}_without"] = {protocol: _without(blend) for protocol, blend in of.items()}
        blends[f"{name}_with"] = of
    rivals, _ = fitted_baselines(loaded.data, loaded.catalogue, names=("content_knn",))
    found = evaluate_sessions(rivals, test, loaded.catalogue, together=BlendScorer(validation.scorer, blends))
    return {
        "n": {name: found["slices"][name]["n"] for name in _SLICES},
        **{
            protocol: {
                system: {
                    name: {metric: round(metrics[metric], 4) for metric in _METRICS}
                    for name in _SLICES
                    if found["slices"][name]["n"] and (metrics := found["slices"][name][protocol].get(system))
                }
                for system in found["protocols"][protocol]
            }
            for protocol in _PROTOCOLS
        },
        "settings": settings,
    }


def _without(blend: Blend) -> Blend:
    """Return the same terms, whose weights are tuned before it, without the rare-item term."""
    return Blend(ScoreTerms({name: term for name, term in blend.terms.items() if name != "rare_items"}))  # type: ignore[misc]


def _exported(model: MISSRec, validation: Validation) -> tuple[dict[str, Blend], dict[str, Any]]:
    """Return the model as a training would export it, under the protocols that it is tuned for."""
    fresh = with_terms(model, build_terms(model.config, model.item_encoder))
    trained, own = terms_of(model).history_bias, terms_of(fresh).history_bias
    if trained is not None and own is not None:
        own.bias.data.copy_(trained.bias.data)
    settings = tune_terms(fresh, validation, TUNED_FOR, history=True)
    blend = Blend(fresh.terms)
    return dict.fromkeys(TUNED_FOR, blend), settings


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="label=run folder")
    parser.add_argument("--cost", type=float, default=0.005, help="model.rare_item_cost")
    parser.add_argument("--as-exported", action="store_true", help="tune nothing")
    parser.add_argument("--name", default="rare-items", help="of the result file")
    options = parser.parse_args()
    runs = dict(one.split("=", 1) for one in options.run)
    found = {label: measure(Path(run), options.cost, tune=not options.as_exported) for label, run in runs.items()}
    report(options.name, {"cost": options.cost, "runs": found})


if __name__ == "__main__":
    run_as_command(main)
