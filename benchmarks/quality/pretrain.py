"""Effect of pre-training on other data sets: training from scratch against transfer, by variant and seed, with curves.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.pretrain --shared path/to/data     # everything, resumable, in work/
    python -m benchmarks.quality.pretrain --shared … --step pretrain:contrastive --minutes 30     # one step of it
    python -m benchmarks.quality.pretrain --shared … --step train:frozen:2020 --minutes 10
    python -m benchmarks.quality.pretrain --shared … --step report

Sources: amazon_instruments_mql, amazon14_beauty and ml100k_posters, text only; target: amazon_scientific, text only, or
a ``--share`` of its training sessions. All texts are MiniLM's, so their fingerprints are stated to be equal. Finished
steps are kept; ``--minutes`` limits a training (after the epoch that passes it), so compare runs of equal epochs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, spread
from missrec_t4r import commands
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.evaluation.report import with_current_names
from missrec_t4r.io.json_files import read_json
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW
from missrec_t4r.training.warm_start.transfer import load_pretrained, read_source

ENCODER = "all-MiniLM-L6-v2"
SOURCES = ("amazon_instruments_mql", "amazon14_beauty", "ml100k_posters")
TARGET = "amazon_scientific"
LEAST_EVENTS = 5
METRICS = ("recall@10", "ndcg@10", "recall@50", "ndcg@50")
ALONE: dict[str, Any] = {"model.n_neighbours": 0, "model.n_similar_items": 0, "train.max_minutes": 0}
"""The model without its score terms: the comparison is of the trained network alone."""
_SOFTMAX = {"pretrain.objective": "full_softmax", "train.softmax": "sampled", "train.negatives": 2048}
PRETRAININGS: dict[str, dict[str, Any]] = {
    "contrastive": {},
    "short": {"train.epochs": 5},
    "corrected": {"pretrain.popularity_correction": True},
    "refreshed": {"pretrain.refresh_interests": True},
    "softmax": _SOFTMAX,
    "kept": {**_SOFTMAX, "pretrain.keep_adapters": True},
}


class Variant(NamedTuple):
    """One way to initialise training."""

    pretraining: str | None = None
    freeze: str = "none"
    take: str = "all"
    ids: str = "random"
    settings: dict[str, Any] = {}  # noqa: RUF012  # never changed


VARIANTS: dict[str, Variant] = {
    "scratch": Variant(),
    "frozen": Variant("contrastive", "encoder_decoder"),
    "full": Variant("contrastive"),
    "adapters": Variant("contrastive", take="adapters"),
    "tokens": Variant("contrastive", ids="content"),
    "tokens_frozen": Variant("contrastive", "encoder_decoder", ids="content"),
    "scratch_tokens": Variant(ids="content"),
    "corrected": Variant("corrected", ids="content"),
    "short": Variant("short"),
    "refreshed": Variant("refreshed"),
    "refreshed_frozen": Variant("refreshed", "encoder_decoder"),
    "softmax": Variant("softmax"),
    "softmax_tokens": Variant("softmax", ids="content"),
    "kept_tokens": Variant("kept", ids="content"),
    "softmax_frozen": Variant("softmax", "encoder_decoder"),
    "scratch_inductive": Variant(settings={"model.item_ids": False}),
    "full_inductive": Variant("contrastive", settings={"model.item_ids": False}),
    "softmax_inductive": Variant("softmax", settings={"model.item_ids": False}),
}


def prepare(shared: Path, out: Path, share: float) -> Path:
    """Build the missing data folders; return the target's."""
    for name in (*SOURCES, TARGET):
        if not (out / "data" / name / "etl.json").is_file():
            raw = shared / name
            commands.etl(
                [raw / "interactions.parquet"],
                raw / "items.parquet",
                out / "data" / name,
                modality={"text": raw / "text_minilm.npy"},
                fingerprint={"text": ENCODER},
                min_item_count=LEAST_EVENTS,
            )
    whole = out / "data" / TARGET
    return whole if share == 1.0 else _with_fewer_sessions(whole, out / "data" / f"{TARGET}-{share:g}", share)


def _with_fewer_sessions(data: Path, out: Path, share: float) -> Path:
    """Copy a data folder with a random share of its training sessions: a new shop."""
    if out.is_dir():
        return out
    temporary = out.with_name(f".{out.name}")
    shutil.copytree(data, temporary, dirs_exist_ok=True)
    file = next((temporary / "train").glob("*.parquet"))
    table = pq.read_table(file)
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[: round(share * len(table))])
    pq.write_table(table.take(chosen), file)
    catalogue = Catalogue.load(temporary / CATALOGUE_FOLDER)
    values = Sessions.load(temporary / "train", []).values
    counts = np.bincount(values, minlength=catalogue.n_rows)[FIRST_ITEM_ROW:]
    index = catalogue.items.column_names.index("train_count")
    items = catalogue.items.set_column(index, "train_count", [counts])
    Catalogue(items, catalogue.modalities).save(temporary / CATALOGUE_FOLDER)
    temporary.rename(out)
    return out


def pretraining(name: str, out: Path, minutes: float, settings: dict[str, Any]) -> Path:
    """Pre-train one variant, unless it is done."""
    run = out / "pre" / name
    if not (run / "run.json").is_file():
        chosen = {**ALONE, **settings, **PRETRAININGS[name], "train.max_minutes": minutes}
        folders: list[str | Path] = [out / "data" / source for source in SOURCES]
        commands.pretrain(folders, run, settings=chosen)
    return run


def training(name: str, seed: int, data: Path, out: Path, minutes: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Train and rank one variant with one seed, unless it is done; return its curve and metrics."""
    variant, run = VARIANTS[name], out / data.name / name / f"seed-{seed}"
    finished = run / "bench.json"
    if finished.is_file():
        return with_current_names(read_json(finished))
    chosen = {**ALONE, **settings, **variant.settings, "train.seed": seed, "train.max_minutes": minutes}
    chosen["train.id_init"] = variant.ids
    start: dict[str, Any] = {}
    if variant.pretraining is not None:
        start = {"source": out / "pre" / variant.pretraining, "freeze": variant.freeze, "take": variant.take}
    trained = commands.train(data, run, settings=chosen, **start)
    ranked = commands.evaluate(run, baselines=False)["protocols"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    one = {
        "seed": seed,
        "curve": [round(line["valid_ndcg@10"], 5) for line in lines],
        "valid_ndcg@10": trained["valid_ndcg@10"],
        "best_epoch": trained["best_epoch"],
        "seconds": trained["seconds"],
        "trainable_share": trained.get("weight_loading", {}).get("trainable_share", 1.0),
        "test": {protocol: {key: found["model"][key] for key in METRICS} for protocol, found in ranked.items()},
    }
    finished.write_text(json.dumps(one, default=float), encoding="utf-8")
    return one


@torch.no_grad()
def before_training(run: Path, data: Path, settings: dict[str, Any]) -> float:
    """Rank the validation sessions of a data set that the pre-trained model has not seen, without IDs or training."""
    source, catalogue = read_source(run), Catalogue.load(data / CATALOGUE_FOLDER)
    changes = {key: value for key, value in {**ALONE, **settings}.items() if key.startswith("model.")}
    recipe = Recipe.load("default", changes | {"model.item_ids": False})
    torch.manual_seed(0)
    model = build_missrec(recipe.model, catalogue)
    load_pretrained(model, catalogue, source)
    model.discover_interests(0)
    scorer = ModelScorer.with_popularity(model.eval(), catalogue)
    found = quick_metrics(scorer, Sessions.load(data / "valid", []).known(), catalogue.n_rows)
    return round(found[KEPT_WITH_HISTORY_TERM]["ndcg@10"] or 0.0, 5)


def summary(data: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Collect the finished runs: curves, means and spreads, and differences to the same seeds from scratch."""
    found = {name: _finished(out / data.name / name) for name in VARIANTS}
    rows = {name: _row(name, runs, found) for name, runs in found.items() if runs}
    pre = {}
    for name in PRETRAININGS:
        file = out / "pre" / name / "run.json"
        if file.is_file():
            info = json.loads(file.read_text(encoding="utf-8"))
            pre[name] = {key: info[key] for key in ("epochs", "best_epoch", "valid_ndcg@10", "seconds")}
            pre[name]["target_before_training"] = before_training(out / "pre" / name, data, settings)
    return {"target": data.name, "settings": settings, "pretrainings": pre, "variants": rows}


def _finished(folder: Path) -> dict[int, dict[str, Any]]:
    runs = [with_current_names(read_json(file)) for file in sorted(folder.glob("seed-*/bench.json"))]
    return {run["seed"]: run for run in runs}


def _row(name: str, runs: dict[int, dict[str, Any]], found: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    scratch = found["scratch_inductive" if name.endswith("inductive") else "scratch"]
    pairs = [(run, scratch[seed]) for seed, run in runs.items() if seed in scratch]
    row: dict[str, Any] = {
        "seeds": sorted(runs),
        "valid_ndcg@10": spread([run["valid_ndcg@10"] for run in runs.values()]),
        "seconds": spread([run["seconds"] for run in runs.values()]),
        "trainable_share": next(iter(runs.values()))["trainable_share"],
        "curves": {seed: run["curve"] for seed, run in runs.items()},
    }
    for protocol in (KEPT_WITH_HISTORY_TERM, EXCLUDED):
        row[protocol] = {key: spread([run["test"][protocol][key] for run in runs.values()]) for key in METRICS}
    if pairs and name not in ("scratch", "scratch_inductive"):
        row["gain_valid_ndcg@10"] = spread([run["valid_ndcg@10"] - other["valid_ndcg@10"] for run, other in pairs])
        kept = [(run["test"][KEPT_WITH_HISTORY_TERM], other["test"][KEPT_WITH_HISTORY_TERM]) for run, other in pairs]
        gains = [run["ndcg@10"] - other["ndcg@10"] for run, other in kept]
        row["gain_test_ndcg@10"] = spread(gains)
        row["epochs_to_scratch_best"] = [_first_at(run["curve"], other["valid_ndcg@10"]) for run, other in pairs]
        row["epochs_of_scratch_best"] = [other["best_epoch"] + 1 for _, other in pairs]
    return row


def _first_at(curve: list[float], level: float) -> int | None:
    """Return the number of epochs after which the curve first reaches a level, None if it never does."""
    return next((epoch for epoch, value in enumerate(curve, start=1) if value >= level), None)


def main() -> None:
    """Run from the command line."""
    words = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    words.add_argument("--shared", type=Path, required=True, help="folder of the benchmark data sets")
    words.add_argument("--out", type=Path, default=Path("work/pretrain"))
    words.add_argument("--step", action="append", default=[], help="pretrain:NAME, train:VARIANT:SEED, report; all")
    words.add_argument("--variants", default=",".join(VARIANTS), help="names, comma-separated")
    words.add_argument("--seeds", type=int, default=3)
    words.add_argument("--share", type=float, default=1.0, help="of the target's training sessions")
    words.add_argument("--minutes", type=float, default=0.0, help="limit of one training; 0 for none")
    words.add_argument("--epochs", type=int, default=20, help="upper limit of fine-tuning")
    words.add_argument("--pre-epochs", type=int, default=20, help="upper limit of pre-training, except `short`")
    words.add_argument("--d-model", type=int, default=300)
    options = words.parse_args()
    size = {"model.d_model": options.d_model}
    data = prepare(options.shared, options.out, options.share)
    chosen = options.variants.split(",")
    needed = {VARIANTS[name].pretraining for name in chosen} - {None}
    steps = options.step or [
        *(f"pretrain:{name}" for name in PRETRAININGS if name in needed),
        *(f"train:{name}:{FIRST_SEED + seed}" for seed in range(options.seeds) for name in chosen),
        "report",
    ]
    for step in steps:
        kind, *names = step.split(":")
        if kind == "pretrain":
            settings = {**size, "train.epochs": options.pre_epochs}
            pretraining(names[0], options.out, options.minutes, settings)
        elif kind == "train":
            settings = {**size, "train.epochs": options.epochs}
            training(names[0], int(names[1]), data, options.out, options.minutes, settings)
        else:
            share = "" if options.share == 1.0 else f"-{options.share:g}"
            width = "" if options.d_model == Recipe.load("default").model.d_model else f"-d{options.d_model}"
            report(f"pretrain{share}{width}", summary(data, options.out, size))


if __name__ == "__main__":
    run_as_command(main)
