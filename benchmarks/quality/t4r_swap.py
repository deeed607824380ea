"""The swap in a Transformers4Rec script: XLNet, ours with T4R's stock loader, ours with our loader, same script.

    python -m benchmarks.quality.t4r_swap --data path/to/amazon_scientific [--seeds 3] [--only xlnet swap]

One script (`script`) with the same arguments for all: learning rate, batch size, early stopping on T4R's validation
NDCG@10 of every epoch. XLNet learns from the masked items alone, about one per session and step: on Amazon Scientific
it was still rising after 56 epochs (docs/t4r_contract.md), so that it has more epochs and patience (`EPOCHS`).
Items alone are read. Ranked like everything else in this repository (`evaluate_sessions`), by the scores at inference.
Our history bias knows the seen items, so that ours is trained without it for a figure under *kept, strict*
(``swap_strict``). Finished seeds are kept in ``--out``.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers4rec.torch as tr
from transformers import EarlyStoppingCallback
from transformers4rec.config.trainer import T4RecTrainingArguments

import missrec_t4r.t4r as mr  # before anything of Merlin that imports dask
from benchmarks.measure import report
from benchmarks.quality.bench import FIRST_SEED, arguments, pairs
from benchmarks.quality.datasets import prepare
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.progress import reporting
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.t4r.columns import item_column
from missrec_t4r.t4r.scorer import T4RScorer

METRICS = ("recall@10", "ndcg@10")
NDCG = "eval_/next-item/ndcg_at_10"
SYSTEMS = {"xlnet": "merlin", "swap": "merlin", "swap_our_loader": "missrec", "swap_strict": "merlin"}
"""Systems and T4R's name of the loader that feeds them."""
EPOCHS = {"xlnet": (200, 40)}
"""Epochs at most, and epochs without a better validation NDCG@10, where they differ from the options."""


def xlnet(schema: Any, length: int) -> tr.Model:
    """T4R's tutorial model at a width of 128; causal attention fails in the installed transformers."""
    inputs = tr.TabularSequenceFeatures.from_schema(schema, max_sequence_length=length, d_output=128, masking="mlm")
    config = tr.XLNetConfig.build(d_model=128, n_head=4, n_layer=2, total_seq_length=length)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([128]), tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def missrec(schema: Any, catalogue: Catalogue, length: int, *, history_bias: bool) -> tr.Model:
    """Ours in the places of the three objects."""
    inputs = mr.MultiModalSequenceFeatures.from_schema(schema, catalogue=catalogue, max_sequence_length=length)
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(d_model=300, n_head=4, history_bias=history_bias))
    return tr.Model(tr.Head(body, [mr.MISSRecNextItemTask()], inputs=inputs))


def script(
    model: tr.Model, schema: Any, data: Path, engine: str, seed: int, settings: dict[str, Any], folder: str
) -> tr.Trainer:
    """Train and return the trainer with the weights of the best epoch: knows neither model."""
    args = T4RecTrainingArguments(
        output_dir=folder,
        data_loader_engine=engine,
        max_sequence_length=settings["length"] + 1,
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
    trainer = tr.Trainer(
        model=model,
        args=args,
        schema=schema,
        compute_metrics=True,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=settings["patience"])],
        **files,
    )
    trainer.train()
    return trainer


def measure(name: str, data: Path, seed: int, settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train one system with one seed, save it to ``out`` (for `missrec compare`) and rank the test split."""
    catalogue = Catalogue.load(data / "catalogue")
    schema = mr.load_schema(data)
    schema = schema.select_by_name([item_column(schema, catalogue.n_rows).name])
    torch.manual_seed(seed)
    length = settings["length"]
    if name == "xlnet":
        model = xlnet(schema, length)
    else:
        model = missrec(schema, catalogue, length, history_bias=name != "swap_strict")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = script(model, schema, data, SYSTEMS[name], seed, settings, folder)
    seconds = round(time.perf_counter() - started, 1)
    out.mkdir(parents=True, exist_ok=True)
    model.save(out)
    test = Sessions.load(data / "test", ())
    found = evaluate_sessions({name: T4RScorer(model, catalogue, length)}, test, catalogue)
    return {
        "system": name,
        "seed": seed,
        "settings": settings,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "epochs": round(trainer.state.epoch or 0),
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "t4r_valid_ndcg@10": trainer.state.best_metric,
        "test": {p: {m: systems[name][m] for m in METRICS} for p, systems in found["protocols"].items() if systems},
    }


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--length", type=int, default=20, help="last items of a session, as in T4R's tutorials")
    parser.add_argument("--epochs", type=int, default=40, help="at most; XLNet has its own number")
    parser.add_argument("--patience", type=int, default=5, help="epochs without a better validation NDCG@10")
    parser.add_argument("--batch-size", type=int, default=128, help="rows per step, of whatever the loader returns")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options = parser.parse_args()
    name = options.name or options.data.resolve().name
    data = prepare(
        options.data,
        options.out / name / "data",
        interactions=options.interactions,
        modality=pairs(options.modality) or None,
    )
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        for system in options.only:
            epochs, patience = EPOCHS.get(system, (options.epochs, options.patience))
            settings = {key: getattr(options, key) for key in ("length", "batch_size", "learning_rate")}
            settings |= {"epochs": epochs, "patience": patience}
            file = options.out / name / "t4r_swap" / f"{system}-{'-'.join(map(str, settings.values()))}-{seed}.json"
            if not file.is_file():
                measured = measure(system, data, seed, settings, file.with_suffix(""))
                file.write_text(json.dumps(measured), encoding="utf-8")
            runs.append(json.loads(file.read_text(encoding="utf-8")))
            print(json.dumps(runs[-1]))
    report(f"t4r-swap-{name}", {"data": name, "runs": runs})


if __name__ == "__main__":
    with reporting():
        main()
