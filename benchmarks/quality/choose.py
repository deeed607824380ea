"""Compare variants of a recipe on the validation split, to choose one; the test split is not read.

    python -m benchmarks.quality.choose --data path/to/amazon_scientific --variants benchmarks/quality/variants.yaml

Ends with one JSON line; finished variants are not trained again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import report
from benchmarks.quality.bench import FIRST_SEED, arguments, pairs, spread
from benchmarks.quality.datasets import prepare
from missrec_t4r import commands
from missrec_t4r.progress import reporting

log = logging.getLogger(__name__)

_FACTS = ("valid_ndcg@10", "best_epoch", "epochs", "seconds", "prior")


def compare(
    data: Path, out: Path, recipe: str, variants: dict[str, dict[str, Any]], seeds: int
) -> list[dict[str, Any]]:
    """Train every variant with every seed and sort by the validation metric of the model with its score terms.

    Returns
    -------
    list of dict
        ``valid_ndcg@10`` of the network (``kept_with_history_term``) and ``valid_with_priors`` of the exported model
        (mean of ``kept_with_history_term`` and ``excluded``), each with mean and standard deviation over the seeds;
        best first.
    """
    rows = []
    for name, settings in variants.items():
        runs = [
            _one(data, out / name / f"seed-{seed}", recipe, {**settings, "train.seed": seed})
            for seed in range(FIRST_SEED, FIRST_SEED + seeds)
        ]
        rows.append(
            {
                "variant": name,
                "settings": settings,
                "valid_ndcg@10": spread([run["valid_ndcg@10"] for run in runs]),
                "valid_with_priors": spread([run["prior"].get("valid_ndcg@10", float("nan")) for run in runs]),
                "seconds": spread([run["seconds"] for run in runs]),
                "best_epochs": [run["best_epoch"] for run in runs],
            }
        )
        log.info(f"{name}: {rows[-1]['valid_ndcg@10']} with score terms {rows[-1]['valid_with_priors']}")
    return sorted(rows, key=lambda row: -row["valid_with_priors"]["mean"])


def _one(data: Path, run: Path, recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    finished = run / "chosen.json"
    if finished.is_file():
        stored: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return stored
    trained = commands.train(data, run, recipe=recipe, settings=settings)
    facts = {key: trained[key] for key in _FACTS}
    finished.write_text(json.dumps(facts, default=float), encoding="utf-8")
    return facts


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--variants", type=Path, required=True, help="YAML: name -> settings")
    parser.add_argument("--only", action="append", default=[], help="of the variants; repeatable, all by default")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    name = options.name or options.data.resolve().name
    variants = yaml.safe_load(options.variants.read_text(encoding="utf-8"))
    variants = {key: value or {} for key, value in variants.items() if not options.only or key in options.only}
    folder = prepare(
        options.data,
        options.out / name / "data",
        interactions=options.interactions,
        modality=pairs(options.modality) or None,
    )
    where = options.out / name / f"choose-{options.variants.stem}"
    rows = compare(folder, where, options.recipe, variants, options.seeds)
    result = {"data": name, "recipe": options.recipe, "seeds": options.seeds, "variants": rows}
    report(f"choose-{name}-{options.variants.stem}", result)


if __name__ == "__main__":
    with reporting():
        main()
