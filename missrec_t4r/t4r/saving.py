"""Write what a T4R script trained as a run folder: the same files that ``missrec train`` writes.

`save_run` is the last line of a script with ``tr.Trainer``; evaluation, export and deployment continue from the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers4rec.torch as tr
from torch import Tensor
from transformers4rec.config.trainer import T4RecTrainingArguments
from transformers4rec.torch.utils.data_utils import dataloader_registry

from missrec_t4r.config import Recipe, TrainConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions, stored_encodings
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, ParityError
from missrec_t4r.evaluation.full_ranking import quick_metrics
from missrec_t4r.io.atomic import exchange, recover, temporary_dir
from missrec_t4r.io.lock import locked
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.runs import run_folder
from missrec_t4r.schema import CATALOGUE_FOLDER, NULL_ROW, PADDING_ROW
from missrec_t4r.t4r.build import missrec_block, to_core
from missrec_t4r.t4r.loader import PrefixLoader
from missrec_t4r.t4r.task import MISSRecNextItemTask
from missrec_t4r.training import distributed

log = logging.getLogger(__name__)

_SPLITS = ("train", "valid")
_TRANSFORMERS_RATE = 5e-5
"""Learning rate of transformers' arguments where a script gives none: a twentieth of the recipe's."""
_COMPARED = 256
_TOLERANCE = 1e-5
"""Largest accepted difference of a score, as in `missrec_t4r.export.parity`."""


def save_run(
    model: tr.Model,
    *,
    out: str | Path,
    trainer: tr.Trainer | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fit the score terms of a trained T4R model, and write the run folder that ``missrec train`` writes.

    The terms are counted on the split ``train`` and tuned on ``valid``; from then on ``model`` has them too, so that
    ``trainer.evaluate()`` gives the figures of the run. Under torchrun every process calls it, the first one writes.

    Parameters
    ----------
    model : tr.Model
        With our inputs, block and task (`build_model`, or written by hand).
    out : path
        Run folder, for ``missrec evaluate``, ``missrec export`` and `load_run`. A run that it holds is kept beside it,
        as ``OUT-earlier-1`` and so on, since a refusal at the end of a script would lose what was trained; replaced
        where the data folder, or the working directory, is in it, or the folder cannot be renamed, as a mounted one.
    trainer : tr.Trainer, optional
        That trained the model: its arguments are recorded, and the data folder is found beside its training split.
    data : path, optional
        Data folder with ``train``, ``valid`` and ``catalogue``, as ``missrec etl`` or ``missrec catalogue adopt`` write
        it, where the trainer's data lies elsewhere.
    overwrite : bool
        Replace the files of a run that ``out`` holds in place of keeping it.

    Returns
    -------
    dict
        ``run``, the settings of the score terms with validation NDCG@10 with and without them (``score_terms``), the
        metrics of all validation sessions (``valid``), and what the trainer did.

    Raises
    ------
    DataError
        No data folder, or one without a split.
    ConfigError
        The model was built for another catalogue, or has another module between inputs and block.
    ParityError
        The written run scores validation sessions in another way than the model: ``out`` stays as it was.
    """
    out = Path(out)
    folder = _data_folder(trainer, data)
    core = to_core(model)
    catalogue = Catalogue.load(folder / CATALOGUE_FOLDER)
    if core.item_encoder.n_rows != catalogue.n_rows:
        raise ConfigError(
            f"a model of {core.item_encoder.n_rows} rows and a catalogue of {catalogue.n_rows} in {folder}",
            "the catalogue that the model was built with",
            "give the data folder of the training: save_run(..., data=...)",
        )
    _take_encodings(core, folder)
    train, valid = (load_sessions(folder, split, core.event_columns) for split in _SPLITS)
    train, valid = train.known(), valid.with_known_target()
    tasks = {name: task for head in model.heads for name, task in head.prediction_task_dict.items()}
    if others := [name for name, task in tasks.items() if not isinstance(task, MISSRecNextItemTask)]:
        log.warning(f"{out} holds the next-item task alone; model.save(folder) also keeps {', '.join(others)}")
    if trainer is not None:
        _warn_of_short_rows(trainer, core, train)
    info: dict[str, Any] = {"trainer": "t4r"}
    settings = dataclasses.replace(TrainConfig.paper(), id_init=missrec_block(model).id_init)
    if trainer is not None:
        state = trainer.state
        info |= {"epochs": round(state.epoch or 0), "steps": state.global_step, "best_metric": state.best_metric}
        settings = _with_arguments(settings, trainer.args)
    info |= {
        "score_terms": fit_terms(core, catalogue, train, valid),
        "valid": quick_metrics(ModelScorer.with_popularity(core, catalogue), valid, catalogue.n_rows),
        "device": str(next(core.parameters()).device),
    }
    if rank := distributed.launched().rank or distributed.world().rank:
        log.info(f"process {rank} of several: the first one writes {out}")
    else:
        recipe = Recipe(name="t4r", model=core.config, train=settings)
        alone = locked(out) if os.access(out.parent, os.W_OK) else contextlib.nullcontext()  # as of a mounted folder
        with alone, _place(out, folder, overwrite) as place:
            run_folder.save_run(
                place,
                core,
                recipe,
                folder,
                info,
                catalogue,
                (train, valid),
                check=lambda written: _require_parity(core, catalogue, written, folder, valid),
            )
    return {"run": str(out), **info}  # without waiting: a script may call this in its first process alone


def _take_encodings(core: MISSRec, data: Path) -> None:
    """Give event features that were built from a schema the raw values and steps of the data folder's workflow.

    Without them the folder's numbers would be taken back to raw ones, which the model was not trained on, and requests
    would have to hold codes. With raw values a null is a missing one (`load_sessions`), and gets the vector that it has
    been trained with, as a category of its own.
    """
    if core.event_features is None:
        return
    stored, encoder = stored_encodings(data), core.event_features.encoder
    columns = []
    for column, embedding, missing in zip(encoder.columns, encoder.encoders, encoder.absent, strict=True):
        values, steps = stored.get(column.name, ((), ()))
        if (values or steps) and not (column.values or column.steps):
            column = dataclasses.replace(column, values=values, steps=steps)
            codes = Sessions.load(data / "train", [column.name]).features[column.name] if values else np.empty(0)
            if (codes == NULL_ROW).sum() > (codes == PADDING_ROW).sum():  # the latter have been missing in training too
                with torch.no_grad():
                    missing.copy_(cast(Tensor, embedding.weight)[NULL_ROW])
        columns.append(column)
    encoder.columns = tuple(columns)


def _warn_of_short_rows(trainer: tr.Trainer, core: MISSRec, train: Sessions) -> None:
    """Warn where the trainer's loader gave the model less of a session than the run reads."""
    most, engine = trainer.args.max_sequence_length, trainer.args.data_loader_engine
    if most is None or trainer.train_dataloader is not None:
        return
    seen = most if dataloader_registry.parse(engine) is PrefixLoader else most - 1
    reads = min(core.config.max_sequence_length, int(train.lengths.max(initial=1)) - 1)
    if seen < reads:
        log.warning(
            f"trained on at most {seen} items of a session (max_sequence_length={most} of T4RecTrainingArguments), and "
            f"the run reads up to {reads}: later positions are untrained. Give both the same length"
        )


@contextlib.contextmanager
def _place(out: Path, data: Path, overwrite: bool) -> Iterator[Path]:
    """Yield where to write a run that is ``out`` after the block, if that succeeds.

    A run that ``out`` holds is then kept beside it, unless it is to be replaced, or something there has to stay. At
    every moment ``out`` is the one or the other, whatever ends the process.
    """
    recover(out)
    run_folder.complete(out)
    if not (out / run_folder.RUN_FILE).is_file():
        yield out
        return
    others = [path for path in (data.resolve(), Path.cwd()) if path.is_relative_to(out.resolve())]
    can_be_renamed = os.access(out.parent, os.W_OK) and not out.is_mount()
    if overwrite or others or not can_be_renamed:
        yield out
        what = f"{others[0]} could not stay if {out} were" if others else f"{out.absolute()} cannot be"
        why = "" if overwrite else f": {what} renamed"
        log.log(logging.INFO if overwrite else logging.WARNING, f"{out} held a finished run, which is replaced{why}")
        return
    with temporary_dir(out) as new:
        yield new
        new.chmod(stat.S_IMODE(out.stat().st_mode))
        kept = _free_name(out)
        new.rename(kept)
        try:
            exchange(kept, out)
        except OSError:
            kept.rename(new)
            raise
    log.warning(f"{out} held a finished run, which is kept as {kept}; save_run(..., overwrite=True) replaces a run")


def _free_name(out: Path) -> Path:
    """Return the first free name beside a folder, from where its data folder is found as before."""
    names = (out.with_name(f"{out.name}-earlier-{number}") for number in itertools.count(1))
    return next(folder for folder in names if not folder.exists())


def _data_folder(trainer: tr.Trainer | None, data: str | Path | None) -> Path:
    source = getattr(trainer, "train_dataset_or_path", None) if data is None else data
    if not isinstance(source, str | Path):
        raise DataError(
            "no data folder: " + ("no trainer" if trainer is None else f"a trainer on {type(source).__name__}"),
            "a folder with train, valid and catalogue",
            'pass it: save_run(model, out="work/run", data="work/data")',
        )
    start = Path(source)
    for folder in [start, *start.parents][: 3 if data is None else 1]:
        if all((folder / name).is_dir() for name in (*_SPLITS, CATALOGUE_FOLDER)):
            return folder
    raise DataError(
        f"{start} and the folders above it hold no {', '.join((*_SPLITS, CATALOGUE_FOLDER))}",
        "a data folder of `missrec etl` or `missrec catalogue adopt`",
        'pass it: save_run(model, out="work/run", data="work/data")',
    )


def _with_arguments(settings: TrainConfig, arguments: T4RecTrainingArguments) -> TrainConfig:
    """Return the settings with the arguments of T4R's trainer that ours has too; warn of an untouched learning rate."""
    rate = float(arguments.learning_rate)
    if rate <= _TRANSFORMERS_RATE:
        log.warning(
            f"trained with learning_rate={rate:g}, transformers' default; the recipe default has "
            f"{TrainConfig.learning_rate:g}: pass learning_rate={TrainConfig.learning_rate:g} to T4RecTrainingArguments"
        )
    return dataclasses.replace(
        settings,
        learning_rate=rate,
        weight_decay=float(arguments.weight_decay),
        batch_size=int(arguments.per_device_train_batch_size),
        epochs=max(1, round(arguments.num_train_epochs)),
        warmup_steps=int(arguments.warmup_steps),
        clip_norm=float(arguments.max_grad_norm),
        seed=int(arguments.seed),
    )


def _require_parity(core: MISSRec, catalogue: Catalogue, run: Path, data: Path, valid: Sessions) -> None:
    """Require that the run, read back, scores validation sessions like the model.

    Raises
    ------
    ParityError
    """
    histories, _ = valid.slice(0, min(_COMPARED, len(valid))).split_last()
    written = run_folder.load_run(run, data).model.to(next(core.parameters()).device)
    expected, scores = (ModelScorer.with_popularity(model, catalogue)(histories) for model in (core, written))
    finite = torch.isfinite(expected)
    largest = float((expected - scores)[finite].abs().max()) if finite.any() else 0.0
    if largest > _TOLERANCE or not torch.equal(finite, torch.isfinite(scores)):
        raise ParityError(
            f"the run read back scores validation sessions by up to {largest:.3g} differently",
            f"score differences up to {_TOLERANCE:g}",
            "report a bug: nothing was kept",
        )
