"""Quality of a recipe on a data set over several seeds: mean and spread of the test metrics under three protocols.

    make bench-quality DATA=path/to/amazon_scientific RECIPE=default SEEDS=3
    python -m benchmarks.quality.bench --data path/to/amazon_scientific --interactions interactions_mm_subset.parquet \
        --modality text=text_clip.npy --modality image=image_clip.npy --recipe paper --name scientific_mm

Every training runs until its patience ends it (``train.max_minutes=0``). Ends with one JSON line. Finished seeds are
kept in ``--out`` and not trained again; one whose evaluation is of an earlier version is evaluated again, or read under
today's keys where those alone have changed. Seeds of other data, files or modalities are not mixed with them: another
``--out`` or ``--name`` is asked for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import report, run_as_command
from benchmarks.quality.datasets import INTERACTIONS, prepare_named
from missrec_t4r import commands
from missrec_t4r.config import Recipe
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.key_names import with_current_keys, with_current_terms
from missrec_t4r.ranking.tune import NDCG
from missrec_t4r.runs.run_folder import RUN_FILE, read_info
from missrec_t4r.training.auto import choose
from missrec_t4r.training.state import INTERRUPT

METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
FIRST_SEED = 2020
SEEDED = ("model", "exported", "network")
"""Systems that depend on the seed; terms without network and baselines do not."""
TO_THE_END = {"train.max_minutes": 0}
"""No result depends on the clock."""


def bench(
    data: Path,
    recipe: str,
    seeds: int,
    out: Path,
    *,
    name: str | None = None,
    interactions: str = INTERACTIONS,
    modality: dict[str, str] | None = None,
    words: bool = True,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train and evaluate a recipe with several seeds.

    Returns
    -------
    dict
        ``protocols[protocol][system][metric]``: mean and standard deviation over seeds (of the baselines, which have no
        seed, one value); ``valid_ndcg@10``; ``checklist`` of the first seed, with the seeds of all; ``runs``: every
        seed.
    """
    settings = {**TO_THE_END, **(settings or {})}
    name, folder = prepare_named(data, out, name=name, interactions=interactions, modality=modality, words=words)
    done = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        done.append(
            _one(
                folder,
                out / name / _label(recipe, settings) / f"seed-{seed}",
                recipe,
                {**settings, "train.seed": seed},
                done[0] if done else None,
            )
        )
    return {
        "data": name,
        "recipe": recipe,
        "settings": settings,
        "seeds": seeds,
        "n_users": done[0]["n_users"],
        "n_items": done[0]["n_items"],
        "protocols": {
            protocol: {
                system: _summary([one["test"][protocol][system] for one in done if system in one["test"][protocol]])
                for system in done[0]["test"][protocol]
            }
            for protocol in PROTOCOLS
        },
        "checklist": _checklist([one["checklist"] for one in done]),
        "valid_ndcg@10": spread([one["run"]["valid_ndcg@10"] for one in done]),
        "runs": [{**one["run"], "protocols": _of_run(one["test"])} for one in done],
        "blend_settings": [one["blend_settings"] for one in done],
        "baseline_settings": done[0]["baseline_settings"],
        "resolved": (choose(folder, settings).recipe if recipe == AUTO else Recipe.load(recipe, settings)).to_dict(),
    }


def _one(
    data: Path, run: Path, recipe: str, settings: dict[str, Any], first: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Train and evaluate one seed, unless it is done; the systems that have no seed are those of the ``first``."""
    finished = run / "bench.json"
    if finished.is_file() and "checklist" in (stored := read_json(finished)):
        current = {
            "run": with_current_keys(stored["run"]),
            "blend_settings": with_current_blends(stored["blend_settings"]),
        }
        return stored | current
    if not (run / RUN_FILE).is_file() or read_json(run / RUN_FILE).get("stopped_by") == INTERRUPT:
        commands.train(data, run, recipe=recipe, settings=settings)
    trained = read_info(run)
    if trained.get("stopped_by") == INTERRUPT:
        raise KeyboardInterrupt  # a training that was cut is no measurement; the same command goes on
    found = commands.evaluate(run, baselines=first is None)
    kept = ("best_epoch", "epochs", "stopped_by", "valid_ndcg@10", "seconds", "precision", "score_terms")
    one = {
        "run": {"seed": settings["train.seed"], **{key: trained[key] for key in kept if key in trained}},
        "test": {
            protocol: {
                system: {metric: values[metric] for metric in METRICS}
                for system, values in found["protocols"][protocol].items()
            }
            for protocol in PROTOCOLS
        },
        **{key: found[key] for key in ("n_users", "n_items", "checklist", "blend_settings", "baseline_settings")},
    }
    write_json(finished, one)
    return one


def with_current_blends(settings: Any) -> Any:
    """Return blend settings, by system and protocol or by protocol, with today's keys of their score terms."""
    if not isinstance(settings, Mapping):
        return settings  # not recorded
    if NDCG in settings:
        return with_current_terms(settings)
    return {name: with_current_blends(inner) for name, inner in settings.items()}


def _of_run(test: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics of the systems that depend on the seed."""
    return {
        protocol: {name: {m: round(v, 5) for m, v in of[name].items()} for name in SEEDED if name in of}
        for protocol, of in test.items()
    }


def _checklist(of: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the checklist of the first seed with what differs between seeds as lists."""
    chosen = {
        **of[0]["epochs_chosen_on"],
        **{key: [one["epochs_chosen_on"][key] for one in of] for key in ("best_epoch", "epochs")},
    }
    return {
        **of[0],
        "epochs_chosen_on": chosen,
        "seeds": {**of[0]["seeds"], "training": [one["seeds"]["training"] for one in of]},
        "stopped_by": [one["stopped_by"] for one in of],
    }


def _label(recipe: str, settings: dict[str, Any] | None) -> str:
    """Return a name for files and folders: the recipe and the changed settings, but for training to the end.

    Examples
    --------
    >>> _label("default", {"model.history_bias": False})
    'default-history_bias-false'
    """
    changed = {key: value for key, value in (settings or {}).items() if TO_THE_END.get(key) != value}
    changes = [f"{key.partition('.')[2]}-{value}".lower() for key, value in sorted(changed.items())]
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


def arguments(about: str | None = None, *, prepared: bool = True) -> argparse.ArgumentParser:
    """Return the options that name a data set, shared by the quality benchmarks; most of `prepare` if it is used."""
    parser = argparse.ArgumentParser(description=(about or __doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions, items and vectors")
    if prepared:
        parser.add_argument("--interactions", default=INTERACTIONS, help="file of the folder")
        parser.add_argument("--modality", action="append", default=[], help="NAME=FILE of the folder; repeatable")
        no_words_option(parser)
    parser.add_argument("--name", help="of the data set in results; the folder's by default")
    parser.add_argument("--out", type=Path, default=Path("work/bench"), help="where data folders and runs are kept")
    return parser


def no_words_option(parser: argparse.ArgumentParser) -> None:
    """Add the option against the words of titles and brands, which `prepare` else adds where they help."""
    parser.add_argument(
        "--no-words", dest="words", action="store_false", help="leave out the words of titles and brands"
    )


def data_set(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `arguments` say of the data set, for `prepare_named`."""
    chosen = {name: getattr(options, name) for name in ("name", "interactions", "words")}
    return chosen | {"modality": pairs(options.modality) or None}


def main() -> None:
    """Run from the command line."""
    parser = arguments()
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="such as model.d_model=128")
    options = parser.parse_args()
    settings = {key: parse_yaml(value) for key, value in pairs(options.settings).items()}
    found = bench(options.data, options.recipe, options.seeds, options.out, settings=settings, **data_set(options))
    report(f"quality-{found['data']}-{_label(options.recipe, settings)}", found)


if __name__ == "__main__":
    run_as_command(main)
