"""The swap in a Transformers4Rec script: XLNet, ours with T4R's stock loader, ours with our loader, same script.

    python -m benchmarks.quality.t4r_swap --data path/to/amazon_scientific [--seeds 3] [--only xlnet swap]

One script (`script`) for all: early stopping on T4R's validation NDCG@10 of every epoch, learning rate decaying
linearly to the last epoch, T4R's default. Ours has the learning rate of the recipe `default` and 128 rows a step.
XLNet has the tutorial's blocks (two layers, four heads, `mlm`, tied weights), trained to the end with every setting of
`XLNET` with the first seed; the one that is best on validation is reported and has the other seeds. Items alone are
read. Ranked like everything else in this repository (`evaluate_sessions`), by the scores at inference. Our history
bias knows the seen items, so that ours is trained without it for a figure under *kept, strict* (``swap_strict``). An
interrupted training goes on from its last epoch, and finished seeds are kept, both in ``--out``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers4rec.torch as tr
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers4rec.config.trainer import T4RecTrainingArguments

import missrec_t4r.t4r as mr  # before anything of Merlin that imports dask
from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, arguments, data_set
from benchmarks.quality.datasets import prepare_named
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.t4r.columns import item_column
from missrec_t4r.t4r.scorer import T4RScorer

METRICS = ("recall@10", "ndcg@10")
NDCG = "eval_/next-item/ndcg_at_10"
LENGTH, WIDTH = 20, 64
"""Last items of a session that a model reads, and XLNet's width, as in T4R's end-to-end tutorial."""
LOADERS = {"xlnet": "merlin", "swap": "merlin", "swap_our_loader": "missrec", "swap_strict": "merlin"}
"""Systems and T4R's name of the loader that feeds them."""
OURS = {"learning_rate": 1e-3, "batch_size": 128, "epochs": 40, "patience": 5}
XLNET = ((3e-3, 0.3), (1e-3, 0.3), (3e-3, 0.15))
"""Learning rates and `mlm_probability` that are tried."""


def xlnet_settings(epochs: int, patience: int) -> list[dict[str, Any]]:
    """Return what is tried of XLNet."""
    fixed = {"batch_size": 64, "epochs": epochs, "patience": patience}
    return [{"learning_rate": rate, **fixed, "mlm_probability": probability} for rate, probability in XLNET]


def xlnet(schema: Any, mlm_probability: float) -> tr.Model:
    """T4R's tutorial model; causal attention fails in the installed transformers."""
    inputs = tr.TabularSequenceFeatures.from_schema(schema, max_sequence_length=LENGTH, d_output=WIDTH, masking="mlm")
    inputs.masking.mlm_probability = mlm_probability
    config = tr.XLNetConfig.build(d_model=WIDTH, n_head=4, n_layer=2, total_seq_length=LENGTH)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([WIDTH]), tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def missrec(schema: Any, catalogue: Catalogue, *, history_bias: bool) -> tr.Model:
    """Ours in the places of the three objects."""
    inputs = mr.MultiModalSequenceFeatures.from_schema(schema, catalogue=catalogue, max_sequence_length=LENGTH)
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(d_model=300, n_head=4, history_bias=history_bias))
    return tr.Model(tr.Head(body, [mr.MISSRecNextItemTask()], inputs=inputs))


def script(
    model: tr.Model, schema: Any, data: Path, engine: str, seed: int, settings: dict[str, Any], folder: Path
) -> tr.Trainer:
    """Train, from the last epoch in ``folder`` on, and return the trainer with the best epoch's weights."""
    args = T4RecTrainingArguments(
        output_dir=str(folder),
        data_loader_engine=engine,
        max_sequence_length=LENGTH + 1,
        num_train_epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        per_device_train_batch_size=settings["batch_size"],
        per_device_eval_batch_size=512,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model=NDCG,
        greater_is_better=True,
        seed=seed,
        report_to=[],
        no_cuda=True,
        disable_tqdm=True,
    )
    paths = {"train_dataset_or_path": data / "train", "eval_dataset_or_path": data / "valid"}
    files = {name: str(next(folder.glob("*.parquet"))) for name, folder in paths.items()}
    stopping = EarlyStoppingCallback(early_stopping_patience=settings["patience"])
    trainer = tr.Trainer(model=model, args=args, schema=schema, compute_metrics=True, callbacks=[stopping], **files)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last:
        stopping.early_stopping_patience_counter = _epochs_since_best(read_json(Path(last) / "trainer_state.json"))
    with _random_state_is_readable():
        trainer.train(resume_from_checkpoint=last)
    return trainer


def curve(state: dict[str, Any]) -> list[float]:
    """Return T4R's validation NDCG@10 after each epoch."""
    return [round(float(line[NDCG]), 5) for line in state["log_history"] if NDCG in line]


def _epochs_since_best(state: dict[str, Any]) -> int:
    seen = curve(state)
    return len(seen) - 1 - int(np.argmax(seen))


@contextlib.contextmanager
def _random_state_is_readable() -> Iterator[None]:
    """Let torch's safe loading read NumPy's random state, which transformers 4.30 stores as an array."""
    parts: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), np.zeros(0, np.uint32).__reduce__()[0]]
    with torch.serialization.safe_globals(parts):
        yield


def train(name: str, data: Path, seed: int, settings: dict[str, Any], folder: Path) -> tuple[tr.Model, dict[str, Any]]:
    """Return one trained system and what is known of its training."""
    catalogue = Catalogue.load(data / "catalogue")
    schema = mr.load_schema(data)
    schema = schema.select_by_name([item_column(schema, catalogue.n_rows).name])
    torch.manual_seed(seed)
    if name == "xlnet":
        model = xlnet(schema, settings["mlm_probability"])
    else:
        model = missrec(schema, catalogue, history_bias=name != "swap_strict")
    started = time.perf_counter()
    trainer = script(model, schema, data, LOADERS[name], seed, settings, folder)
    state = {"log_history": trainer.state.log_history}
    return model, {
        "system": name,
        "seed": seed,
        "settings": settings,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "epochs": len(curve(state)),
        "best_epoch": int(np.argmax(curve(state))) + 1,
        "steps": trainer.state.global_step,
        "seconds_since_last_start": round(time.perf_counter() - started, 1),
        "t4r_valid_ndcg@10": round(float(trainer.state.best_metric), 5),
        "t4r_valid_ndcg@10_each_epoch": curve(state),
    }


def measure(name: str, data: Path, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train one system with one seed, save it to ``out`` (for `missrec compare`) and rank the test split."""
    epochs = out.with_name(out.name + "-epochs")
    model, known = train(name, data, seed, settings, epochs)
    out.mkdir(parents=True, exist_ok=True)
    model.save(out)
    catalogue = Catalogue.load(data / "catalogue")
    scorers = {name: T4RScorer(model, catalogue, LENGTH)}
    found = evaluate_sessions(scorers, Sessions.load(data / "test", ()), catalogue)
    shutil.rmtree(epochs)
    ranked = {p: {m: systems[name][m] for m in METRICS} for p, systems in found["protocols"].items() if systems}
    return {**known, "test": ranked}


def kept(name: str, data: Path, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return what `measure` found, now or before."""
    file = out / f"{name}-{'-'.join(map(str, settings.values()))}-{seed}.json"
    if not file.is_file():
        write_json(file, measure(name, data, seed, settings, file.with_suffix("")))
    return dict(read_json(file))


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--xlnet-epochs", type=int, default=60, help="XLNet needs some thousand steps")
    parser.add_argument("--xlnet-patience", type=int, default=12)
    parser.add_argument("--xlnet-tried", type=int, default=len(XLNET), help="how many of its settings")
    parser.add_argument("--only", nargs="+", choices=LOADERS, default=list(LOADERS))
    options = parser.parse_args()
    name, data = prepare_named(options.data, options.out, **data_set(options))
    out = options.out / name / "t4r_swap"
    out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, dict[str, Any]] = dict.fromkeys(LOADERS, OURS)
    tried: list[dict[str, Any]] = []
    if "xlnet" in options.only:
        tried = [
            kept("xlnet", data, FIRST_SEED, setting, out)
            for setting in xlnet_settings(options.xlnet_epochs, options.xlnet_patience)[: options.xlnet_tried]
        ]
        settings["xlnet"] = max(tried, key=lambda one: float(one["t4r_valid_ndcg@10"]))["settings"]
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        for system in options.only:
            runs.append(kept(system, data, seed, settings[system], out))
            print(json.dumps(runs[-1]), flush=True)
    on_validation = [{key: one[key] for key in ("settings", "epochs", "t4r_valid_ndcg@10")} for one in tried]
    report(f"t4r-swap-{name}", {"data": name, "length": LENGTH, "xlnet_tried": on_validation, "runs": runs})


if __name__ == "__main__":
    run_as_command(main)
