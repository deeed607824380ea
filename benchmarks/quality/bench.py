"""Quality of a recipe on a data set over several seeds: mean and spread of the test metrics, and tuned baselines.

    make bench-quality DATA=path/to/amazon_scientific RECIPE=default SEEDS=3
    python -m benchmarks.quality.bench --data path/to/amazon_scientific --interactions interactions_mm_subset.parquet \
        --modality text=text_clip.npy --modality image=image_clip.npy --recipe paper --name scientific_mm

Ends with one JSON line. Finished seeds are kept in ``--out`` and not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import report
from benchmarks.quality.datasets import INTERACTIONS, prepare
from missrec_t4r import commands
from missrec_t4r.config import Recipe
from missrec_t4r.progress import reporting

METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
KEPT, EXCLUDED = "seen_kept", "seen_excluded"
FIRST_SEED = 2020


def bench(
    data: Path,
    recipe: str,
    seeds: int,
    out: Path,
    *,
    name: str | None = None,
    interactions: str = INTERACTIONS,
    modality: dict[str, str] | None = None,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and evaluate a recipe with several seeds.

    Returns
    -------
    dict
        Per metric mean and standard deviation over seeds: with seen items kept (the published protocol) at the top,
        with seen items excluded under ``seen_excluded``; ``valid`` NDCG@10; the baselines' test metrics; every seed.
    """
    name = name or data.resolve().name
    folder = prepare(data, out / name / "data", interactions=interactions, modality=modality)
    done = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        overrides = {**(settings or {}), "train.seed": seed}
        done.append(_one(folder, out / name / _label(recipe, settings) / f"seed-{seed}", recipe, overrides))
    return {
        "data": name,
        "recipe": recipe,
        "settings": settings or {},
        "seeds": seeds,
        **_summary([one["test"][KEPT]["model"] for one in done]),
        EXCLUDED: _summary([one["test"][EXCLUDED]["model"] for one in done]),
        "valid_ndcg@10": spread([one["run"]["valid_ndcg@10"] for one in done]),
        "baselines": {
            protocol: {
                system: {metric: round(values[metric], 4) for metric in METRICS}
                for system, values in done[0]["test"][protocol].items()
                if system != "model"
            }
            for protocol in (KEPT, EXCLUDED)
        },
        "runs": [one["run"] for one in done],
        "resolved": Recipe.load(recipe, settings).to_dict(),
    }


def _one(data: Path, run: Path, recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    finished = run / "bench.json"
    if finished.is_file():
        stored: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
        return stored
    trained = commands.train(data, run, recipe=recipe, settings=settings)
    found = commands.evaluate(run)
    kept = ("best_epoch", "epochs", "valid_ndcg@10", "seconds", "prior")
    one = {
        "run": {"seed": settings["train.seed"], **{key: trained[key] for key in kept if key in trained}},
        "test": {
            protocol: {
                system: {metric: values[metric] for metric in METRICS}
                for system, values in found["protocols"][protocol].items()
            }
            for protocol in (KEPT, EXCLUDED)
        },
    }
    finished.write_text(json.dumps(one, default=float), encoding="utf-8")
    return one


def _label(recipe: str, settings: dict[str, Any] | None) -> str:
    """Return a name for files and folders: the recipe and the changed settings.

    Examples
    --------
    >>> _label("default", {"model.history_bias": False})
    'default-history_bias-false'
    """
    changes = [f"{key.partition('.')[2]}-{value}".lower() for key, value in sorted((settings or {}).items())]
    return "-".join([Path(recipe).stem, *changes])


def _summary(seeds: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    return {metric: spread([one[metric] for one in seeds]) for metric in METRICS}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and sample standard deviation (0 for one value)."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 5), "std": round(std, 5)}


def pairs(options: Sequence[str]) -> dict[str, str]:
    """Return NAME=VALUE options as a mapping."""
    return dict(option.split("=", 1) for option in options)


def arguments(words: str | None = None) -> argparse.ArgumentParser:
    """Return the options that name a data set, shared by the quality benchmarks."""
    parser = argparse.ArgumentParser(description=(words or __doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions, items and vectors")
    parser.add_argument("--interactions", default=INTERACTIONS, help="file of the folder")
    parser.add_argument("--modality", action="append", default=[], help="NAME=FILE of the folder; repeatable")
    parser.add_argument("--name", help="of the data set in results; the folder's by default")
    parser.add_argument("--out", type=Path, default=Path("work/bench"), help="where data folders and runs are kept")
    return parser


def main() -> None:
    """Run from the command line."""
    parser = arguments()
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="such as model.d_model=128")
    options = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, value in pairs(options.settings).items()}
    found = bench(
        options.data,
        options.recipe,
        options.seeds,
        options.out,
        name=options.name,
        interactions=options.interactions,
        modality=pairs(options.modality) or None,
        settings=settings,
    )
    report(f"quality-{found['data']}-{_label(options.recipe, settings)}", found)


if __name__ == "__main__":
    with reporting():
        main()
