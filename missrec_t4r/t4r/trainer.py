"""``missrec train --trainer t4r``: train a recipe by ``tr.Trainer`` and write a run folder like that of our trainer.

Arguments, checkpoints and early stopping on NDCG@10 are those of T4R and transformers. Settings of the recipe that
T4R's Trainer does not have are listed in the log and in `run.json` (``ignored_settings``), never dropped silently.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers4rec.torch as tr
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers4rec.config.trainer import T4RecTrainingArguments

from missrec_t4r.config import Recipe, TrainConfig
from missrec_t4r.config.checks import changed_settings
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.tensors_only import tensors_only
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.runs.run_folder import CHECKPOINT_FOLDER, LOG_FILE, RUN_FILE, begin_training, save_run
from missrec_t4r.t4r.block import InterestRefresh
from missrec_t4r.t4r.build import build_model, missrec_block, to_core
from missrec_t4r.t4r.columns import event_feature_name, item_column, load_schema
from missrec_t4r.t4r.loader import PrefixLoader
from missrec_t4r.training.curves import Curves
from missrec_t4r.training.distributed import launched, own_device
from missrec_t4r.training.fit import read_training_data
from missrec_t4r.training.memory import translate_out_of_memory
from missrec_t4r.training.state import content_checksum

log = logging.getLogger(__name__)

_CONTENT = "content"
"""Key of the checksum of the data beside the recipe of the checkpoints."""
NDCG = "eval_/next-item/ndcg_at_10"
"""T4R's name for validation NDCG@10 of a task called ``next-item``."""

_RANDOM_STATE: list[Any] = [np.ndarray, np.dtype, type(np.dtype(np.uint32)), np.zeros(0, np.uint32).__reduce__()[0]]
"""What the state of NumPy's random numbers is made of."""

_UNSUPPORTED = (
    "next_items",
    "ema_decay",
    "validation_sessions",
    "softmax",
    "accumulate",
    "precision",
    "compile",
    "checkpoint_minutes",
    "tensorboard",
    "group_by_length",
)


@translate_out_of_memory("halve train.batch_size, or leave --trainer out: the other trainer has train.accumulate")
def train_t4r(
    data: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = True,
    device: str = "auto",
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train a recipe through ``tr.Trainer`` and write a run folder.

    Examples are prefixes, whatever the recipe's attention. Event features are those of `missrec train`, with statistics
    of the same sessions.

    Parameters
    ----------
    data : path
        Folder written by ``missrec etl``.
    recipe : Recipe
        Settings of the model and the training.
    out : path
        Run folder; T4R's checkpoints are in its folder ``checkpoint`` until the run is finished.
    resume : bool
        Continue from the last checkpoint in ``out``; False starts over.
    device : str
        ``"auto"`` uses the first GPU if there is one, ``"cuda"`` requires it, ``"cpu"`` does not use it.
    dry_run : bool
        Read and check the data, return what would be trained, write nothing.

    Returns
    -------
    dict
        Validation NDCG@10, best epoch, what ended the training (``stopped_by``: ``epochs``, ``patience`` or
        ``max_minutes``), seconds, and the recipe's settings that this trainer does not have.

    Raises
    ------
    DataError, SchemaError, ConfigError
        Unusable data, a schema that does not fit the catalogue, a checkpoint of another recipe, a device that is not
        there, has not enough memory or is not the one that T4R's Trainer chooses, or several processes.
    """
    started = time.perf_counter()
    _require_one_device(device)
    data, out = Path(data), Path(out)
    catalogue, train, valid, event_features = read_training_data(data, recipe)
    schema = _read_schema(data, catalogue, event_features)
    published = TrainConfig.paper()
    ignored = [name for name in _UNSUPPORTED if getattr(recipe.train, name) != getattr(published, name)]
    if ignored:
        log.info(f"the T4R trainer has no {', '.join(ignored)}: trained without")
    if dry_run:
        return {
            "dry_run": True,
            "trainer": "t4r",
            "data": str(data),
            "run": str(out),
            "items": catalogue.n_items,
            "event_features": [column.name for column in event_features],
            "sessions": {"train": len(train), "valid": len(valid)},
            "epochs_at_most": recipe.train.epochs,
            "ignored_settings": ignored,
            "resumes": resume and (out / CHECKPOINT_FOLDER).is_dir(),
            "would_replace": (out / RUN_FILE).is_file(),
        }
    checkpoints = _checkpoint_folder(out, recipe, content_checksum(catalogue, [train, valid]), resume)
    arguments = _arguments(recipe, checkpoints, catalogue, device)
    torch.manual_seed(recipe.train.seed)
    model = build_model(recipe, schema, catalogue, event_features=event_features)
    report = _Report(out, recipe.train.max_minutes)
    patience = _EarlyStopping(early_stopping_patience=recipe.train.patience)
    callbacks = [InterestRefresh(missrec_block(model), recipe.train.refresh_interests_every), patience, report]
    trainer = tr.Trainer(model=model, args=arguments, schema=schema, callbacks=callbacks, compute_metrics=True)
    trainer.remove_callback(PrinterCallback)  # standard output belongs to the command line
    trainer.train_dataloader = _loader(recipe, schema, data / "train", shuffle=True)
    trainer.eval_dataloader = _loader(recipe, schema, data / "valid", shuffle=False)
    last = get_last_checkpoint(str(checkpoints)) if resume else None
    with contextlib.nullcontext() if last is None else _own_checkpoints(Path(last)):
        trainer.train(resume_from_checkpoint=last)
    epochs = math.ceil(trainer.state.epoch)
    if epochs >= recipe.train.epochs and not report.is_cut_short:
        stopped_by = "epochs"
    elif patience.early_stopping_patience_counter >= recipe.train.patience:
        stopped_by = "patience"
    else:
        stopped_by = "max_minutes"
    log.info(f"training ended by train.{stopped_by} = {getattr(recipe.train, stopped_by)}")
    best = max(_evaluations(trainer.state), key=lambda line: line[NDCG])
    core = to_core(model)
    info = {
        "trainer": "t4r",
        "best_epoch": math.ceil(best["epoch"]) - 1,
        "epochs": epochs,
        "stopped_by": stopped_by,
        "valid_ndcg@10": trainer.state.best_metric,
        "score_terms": fit_terms(core, catalogue, train, valid),
        "ignored_settings": ignored,
        "seconds": round(time.perf_counter() - started, 1),
        "device": str(arguments.device),
    }
    save_run(out, core, recipe, data, info, catalogue, [train, valid])
    shutil.rmtree(checkpoints)
    return {"run": str(out), **info}


def _require_one_device(device: str) -> None:
    """Refuse several processes, a device that is not there, and one that T4R's Trainer would not take.

    Raises
    ------
    ConfigError
    """
    if (size := launched().size) > 1:
        raise ConfigError(
            f"--trainer t4r in {size} processes of torchrun, each of which would train on all sessions",
            "one process",
            "leave --trainer out, or write a script with tr.Trainer and mr.save_run",
        )
    where = own_device(device)
    if ":" in device and where.index:
        cure = f"set CUDA_VISIBLE_DEVICES={where.index} in the environment, and --device cuda"
        raise ConfigError(f"--device {device} with --trainer t4r, which takes the first GPU", "auto, cpu or cuda", cure)


def _read_schema(data: Path, catalogue: Catalogue, event_features: Sequence[EventColumn]) -> Any:
    """Return the schema of the item column and the event features."""
    schema = load_schema(data)
    names = {column.name for column in event_features}
    others = [name for name in schema.column_names if event_feature_name(name) in names]
    return schema.select_by_name([item_column(schema, catalogue.n_rows).name, *others])


def _checkpoint_folder(out: Path, recipe: Recipe, content: int, resume: bool) -> Path:
    """Return the folder of T4R's checkpoints; empty it without ``resume``, refuse one of another recipe or other data.

    Raises
    ------
    ConfigError
    """
    folder = out / CHECKPOINT_FOLDER
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        (out / LOG_FILE).unlink(missing_ok=True)
    owner = folder / "recipe.json"
    stored = read_json(owner) if owner.is_file() else {}
    changed = changed_settings(stored, json.loads(json.dumps(recipe.to_dict()))) if stored else []
    if stored.get(_CONTENT, content) != content:  # earlier versions did not store it
        changed.append("the data")
    if changed:
        raise ConfigError(
            f"{out} holds an interrupted T4R run with other settings or data: {', '.join(changed)}",
            "the same recipe and data",
            "give another --out, or --restart to discard it",
        )
    begin_training(out)
    folder.mkdir(exist_ok=True)
    write_json(owner, {**recipe.to_dict(), _CONTENT: content})
    return folder


def _arguments(recipe: Recipe, folder: Path, catalogue: Catalogue, device: str) -> T4RecTrainingArguments:
    train = recipe.train
    arguments = T4RecTrainingArguments(
        output_dir=str(folder),
        data_loader_engine="missrec",
        max_sequence_length=recipe.model.max_sequence_length,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        num_train_epochs=train.epochs,
        learning_rate=train.learning_rate,
        weight_decay=train.weight_decay,
        max_grad_norm=train.clip_norm,  # 0, as published: no clipping
        lr_scheduler_type="cosine" if train.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=train.warmup_steps,
        seed=train.seed,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model=NDCG,
        greater_is_better=True,
        predict_top_k=min(100, catalogue.n_rows),
        no_cuda=device == "cpu",
        report_to=[],
        disable_tqdm=True,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # of several, transformers would make threads that share one step
    return arguments


def _loader(recipe: Recipe, schema: Any, folder: Path, *, shuffle: bool) -> PrefixLoader:
    train = recipe.train
    return PrefixLoader.from_schema(
        schema,
        folder,
        train.batch_size,
        recipe.model.max_sequence_length,
        shuffle=shuffle,
        seed=train.seed,
        per_session=train.windows_per_session,
        last_probability=train.last_window_probability,
        reverse_probability=train.reverse_probability,
    )


class _EarlyStopping(EarlyStoppingCallback):
    """Patience that counts the epochs before a resume as well, which transformers 4.30 forgets."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Count the epochs since the best one that the checkpoint knows of."""
        super().on_train_begin(args, state, control, **more)
        if values := [line[NDCG] for line in _evaluations(state)]:
            self.early_stopping_patience_counter = len(values) - 1 - int(np.argmax(values))


class _Report(TrainerCallback):
    """Log an epoch's line to the user and the log file, and stop at the time limit."""

    def __init__(self, out: Path, max_minutes: float) -> None:
        self.out, self.limit = out, 60 * max_minutes
        self.started, self.is_cut_short = time.perf_counter(), False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the log's lines after the checkpoint of a resumed run; its time is the last line's."""
        self.curves = Curves(self.out, len(_evaluations(state)))
        self.started -= self.curves.seconds()

    @property
    def is_over_time(self) -> bool:
        """Whether the time limit has passed."""
        return 0 < self.limit < time.perf_counter() - self.started

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after the step in which the time limit passes; the epoch's end evaluates and saves what was trained."""
        if self.is_over_time:
            control.should_training_stop = self.is_cut_short = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Write the epoch's line; stop if the time limit has passed."""
        epoch = math.ceil(state.epoch) - 1
        loss = next((line["loss"] for line in reversed(state.log_history) if "loss" in line), float("nan"))
        line = {"epoch": epoch, "loss": loss, "valid_ndcg@10": metrics[NDCG]}
        line["valid_recall@10"] = metrics[NDCG.replace("ndcg", "recall")]
        line["seconds"] = round(time.perf_counter() - self.started, 1)
        self.curves.epoch(line, state.global_step)
        log.info(f"epoch {epoch:>3}  loss {loss:.3f}  valid ndcg@10 {metrics[NDCG]:.4f}")
        if self.is_over_time:
            control.should_training_stop = True


def _evaluations(state: Any) -> list[dict[str, float]]:
    """Return the log's lines with validation metrics, one for each epoch so far."""
    return [line for line in state.log_history if NDCG in line]


@contextlib.contextmanager
def _own_checkpoints(folder: Path) -> Iterator[None]:
    """Let torch read tensors and NumPy's random state from checkpoints and nothing else.

    transformers 4.30 stores NumPy's random state as an array, which torch's safe loading refuses unless it is named.
    """
    try:
        with tensors_only(), torch.serialization.safe_globals(_RANDOM_STATE):
            yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # of a module that no code of ours imports
            raise
        raise CheckpointError(
            f"{folder} holds a file that could run code when it is read ({str(error)[:200]})",
            "tensors and the state of random numbers, as Transformers4Rec's trainer writes them",
            "train from the start with --restart",
        ) from error
