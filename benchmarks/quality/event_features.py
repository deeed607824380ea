"""Effect of event features on the generated shop: the same recipe without them, with all, and with each alone.

    python -m benchmarks.quality.event_features --users 3000 --items 1200 --recipe default --seeds 3
    python -m benchmarks.quality.event_features --users 400 --items 200 --recipe tiny --set train.epochs=8 --each

The shop's event type and dwell time tell of the user and the item of their event, the category of the item
(`missrec_t4r/etl/sources/synthetic/shop.py`). Results of 2026-11-21 are of version 1 of the shop, whose columns were
drawn from the next move. ``without in requests`` is the model trained with all of them and ranked without any, as for a
client that sends item ids alone.
Test split (``--split valid`` where a setting is to be chosen), whole catalogue, seen items kept; one shop, so that the
spread is that of training.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import report, run_as_command
from missrec_t4r import commands
from missrec_t4r.config import Recipe
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.data.event_features import event_columns, load_sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.training.fit import train

_WITHOUT, _WITH, _ASKED_WITHOUT = "without", "with", "with, without in requests"
_SHOWN = (f"{KEPT_WITH_HISTORY_TERM}.ndcg@10", f"{KEPT_WITH_HISTORY_TERM}.recall@10", f"{EXCLUDED}.ndcg@10")


def make_data(folder: Path, users: int, items: int, seed: int) -> Path:
    """Generate the shop and run ETL and feature extraction on it."""
    shop, data = folder / "shop", folder / "data"
    commands.generate(shop, users=users, items=items, seed=seed)
    commands.etl([shop / "interactions.parquet"], shop / "items.parquet", data)
    commands.features(data, text_columns=["title", "description"], image_column="image", images=shop)
    return data


def measure(data: Path, run: Path, recipe: Recipe, split: str) -> dict[str, dict[str, float]]:
    """Train once and rank a split's sessions, with the event features and, if there are any, without them."""
    if not (run / "run.json").is_file():
        train(data, run, recipe=recipe)
    loaded = load_run(run)
    columns = loaded.model.event_columns
    asked_with = load_sessions(data, split, columns)
    scorer = ModelScorer.with_popularity(loaded.model, loaded.catalogue)
    asked = {_WITHOUT: asked_with}
    if columns:
        asked = {_WITH: asked_with, _ASKED_WITHOUT: dataclasses.replace(asked_with, features={})}
    found = {}
    for name, sessions in asked.items():
        ranked = quick_metrics(scorer, sessions, loaded.catalogue.n_rows)
        found[name] = {
            f"{protocol}.{key}": value or 0.0 for protocol in ranked for key, value in ranked[protocol].items()
        }
    return found


def compare(
    data: Path,
    runs: Path,
    recipe: Recipe,
    choices: Mapping[str, str],
    seeds: Sequence[int],
    split: str,
) -> dict[str, dict[str, list[float]]]:
    """Return every system's metrics, one value per seed."""
    results: dict[str, dict[str, list[float]]] = {}
    for name, setting in choices.items():
        for seed in seeds:
            chosen = dataclasses.replace(
                recipe,
                model=dataclasses.replace(recipe.model, event_features=setting),
                train=dataclasses.replace(recipe.train, seed=seed),
            )
            run = runs / f"{name.replace(' ', '-')}-{seed}"
            for system, metrics in measure(data, run, chosen, split).items():
                label = name if system == _WITH or setting == "none" else system
                if label == _ASKED_WITHOUT and name != _WITH:
                    continue
                for metric, value in metrics.items():
                    results.setdefault(label, {}).setdefault(metric, []).append(value)
    return results


def main() -> None:
    """Parse the options, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--items", type=int, default=1200)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", action="store_true", help="also each feature alone")
    parser.add_argument("--work", type=Path, help="keep shop and runs here, and go on where an earlier call stopped")
    parser.add_argument("--split", choices=("valid", "test"), default="test", help="ranked: valid to choose settings")
    parser.add_argument("--shop-seed", type=int, default=7)
    parser.add_argument("--name", default="event-features", help="of the result")
    options = parser.parse_args()
    settings = {key: parse_yaml(value) for key, _, value in (item.partition("=") for item in options.settings)}
    recipe = Recipe.load(options.recipe, settings)
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        data = work / "data"
        if not (work / "runs").is_dir():
            make_data(work, options.users, options.items, options.shop_seed)
            (work / "runs").mkdir()
        names = [column.name for column in event_columns(data, "auto", 1)]
        choices = {
            _WITHOUT: "none",
            _WITH: "auto",
            **({f"only {name}": name for name in names} if options.each else {}),
        }
        seeds = [recipe.train.seed + index for index in range(options.seeds)]
        results = compare(data, work / "runs", recipe, choices, seeds, options.split)
    report(options.name, payload(results, options, names, seeds))


def payload(
    results: Mapping[str, Mapping[str, Sequence[float]]], options: argparse.Namespace, names: Sequence[str], seeds: Any
) -> dict[str, Any]:
    """Return means, deviations and the single values."""
    table = {
        system: {
            metric: {
                "mean": round(statistics.mean(values[metric]), 4),
                "std": round(statistics.stdev(values[metric]), 4) if len(seeds) > 1 else 0.0,
                "seeds": [round(value, 4) for value in values[metric]],
            }
            for metric in _SHOWN
        }
        for system, values in results.items()
    }
    ndcg = {system: table[system][_SHOWN[0]]["mean"] for system in (_WITHOUT, _WITH)}
    return {
        "data": f"generated shop, {options.users} users, {options.items} items, seed {options.shop_seed}",
        "split": options.split,
        "recipe": options.recipe,
        "settings": options.settings,
        "event_features": list(names),
        "seeds": list(seeds),
        "ndcg@10_gain": round(ndcg[_WITH] / max(ndcg[_WITHOUT], 1e-9) - 1, 4),
        "systems": table,
    }


if __name__ == "__main__":
    run_as_command(main)
