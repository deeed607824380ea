"""Fine-tuning on one data set: epochs, interest discovery, averaged weights, early stopping, resume (specification 7).

An epoch depends on nothing but the state at its start, and that state is on disk: a killed run that is started again
repeats the epoch it was in and ends as if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.batches import TrainingBatch, iterate, training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.side import SideColumn, fit_side_columns, load_sessions, side_columns
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import SEEN_KEPT, quick_metrics
from missrec_t4r.evaluation.model_scorer import ModelScorer
from missrec_t4r.model.missrec import MISSRec, build_missrec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training.calibrate import fit_prior
from missrec_t4r.training.checkpoint import (
    RUN_FILE,
    STATE_FILE,
    load_metadata,
    load_strictly,
    load_tensors,
    save_run,
    save_tensors,
)
from missrec_t4r.training.ema import AveragedWeights
from missrec_t4r.training.step import training_loss

LOG_FILE = "log.jsonl"
Prepare = Callable[[MISSRec], dict[str, Any]]


def train(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "default",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Train MISSRec on a data folder and write a run folder.

    Parameters
    ----------
    data : path
        Folder written by ``missrec etl``.
    out : path
        Run folder. An interrupted run with the same recipe is continued.
    recipe : str, path or Recipe
        Shipped name, YAML file, or the settings themselves.
    settings : mapping, optional
        Overrides such as ``{"train.epochs": 3}``.
    resume : bool
        False starts over.
    device : str
        ``"auto"`` takes a GPU if there is one.

    Returns
    -------
    dict
        Validation metrics, best epoch, seconds, trained positions per second, and the prior's settings.

    Raises
    ------
    DataError, ConfigError, CheckpointError
        Unusable data, contradictory settings, or a checkpoint of another recipe or data set.
    """
    data, out = Path(data), Path(out)
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    side = side_columns(data, resolved.model.side_features, resolved.model.side_width)
    splits = {name: load_sessions(data, name, side).known() for name in ("train", "valid")}
    if not (splits["train"].lengths >= 2).any():
        raise DataError(f"no training session in {data} has two known items", "sessions to learn from", "check the ETL")
    _check_rows(splits, catalogue)
    side = fit_side_columns(side, splits["train"])
    if side:
        progress.say(f"side features: {', '.join(column.name for column in side)}")
    trainer = Trainer(resolved, catalogue, splits["train"], splits["valid"], out, device, progress, side=side)
    if resume:
        trainer.resume()
    else:
        trainer.start_over()
    return trainer.run(data)


class Trainer:
    """State of one training run; `train` is the way in.

    Parameters
    ----------
    recipe : Recipe
    catalogue : Catalogue
    sessions : Sessions
        Training sessions.
    valid : Sessions
        Histories with their target.
    out : Path
        Run folder.
    device : str
    progress : Progress
    prepare : function, optional
        Receives the fresh model before its optimiser is made: loads an earlier run's weights, freezes parts. What it
        returns goes into `run.json` and tells interrupted runs apart.
    side : sequence of SideColumn
        The measured side features, which the sessions carry.
    """

    def __init__(
        self,
        recipe: Recipe,
        catalogue: Catalogue,
        sessions: Sessions,
        valid: Sessions,
        out: Path,
        device: str = "auto",
        progress: Progress = quiet,
        prepare: Prepare | None = None,
        side: Sequence[SideColumn] = (),
    ) -> None:
        self.recipe, self.catalogue, self.sessions = recipe, catalogue, sessions
        self.out, self.progress = out, progress
        settings = recipe.train
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.rng = np.random.default_rng(settings.seed)
        torch.manual_seed(settings.seed)
        self.model = build_missrec(recipe.model, catalogue, side)
        self.facts = prepare(self.model) if prepare else {}
        self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self.average = AveragedWeights(self.model, settings.ema_decay)
        self.best: dict[str, Tensor] = {}
        self.status: dict[str, Any] = {"epoch": 0, "step": 0, "best_epoch": -1, "best": -1.0, "seconds": 0.0}
        sample = settings.validation_sessions
        chosen = (
            np.random.default_rng(settings.seed).permutation(len(valid))[:sample] if sample else np.arange(len(valid))
        )
        chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
        self.valid, self.all_valid = valid.take(chosen), valid

    def run(self, data: Path) -> dict[str, Any]:
        """Train to the end, weigh the neighbour prior and write the run."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / RUN_FILE).unlink(missing_ok=True)
        while not self._finished():
            line = self._epoch()
            with (self.out / LOG_FILE).open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            self.progress.say(
                f"epoch {line['epoch']:>3}  loss {line['loss']:.3f}  valid ndcg@10 {line['valid_ndcg@10']:.4f}  "
                f"recall@10 {line['valid_recall@10']:.4f}  {line['positions_per_s']:,.0f} positions/s"
            )
            self.save_checkpoint()
        load_strictly(self.model, self.best, "the best epoch")
        prior = fit_prior(self.model, self.catalogue, self.sessions, self.all_valid, progress=self.progress)
        info = {
            "best_epoch": self.status["best_epoch"],
            "epochs": self.status["epoch"],
            "valid_ndcg@10": self.status["best"],
            "prior": prior,
            **self.facts,
            "seconds": round(self.status["seconds"], 1),
            "device": str(self.device),
        }
        save_run(self.out, self.model, self.recipe, data, info, self.catalogue)
        (self.out / STATE_FILE).unlink(missing_ok=True)
        return {"run": str(self.out), **info}

    def _finished(self) -> bool:
        settings, status = self.recipe.train, self.status
        stale = status["epoch"] - 1 - status["best_epoch"]
        late = settings.max_minutes and status["seconds"] > 60 * settings.max_minutes
        return status["epoch"] > 0 and bool(status["epoch"] >= settings.epochs or stale >= settings.patience or late)

    def _epoch(self) -> dict[str, Any]:
        started, settings, epoch = time.perf_counter(), self.recipe.train, self.status["epoch"]
        self.refresh_interests(epoch)
        plan = training_batches(self.sessions, self.recipe.model, settings, self.rng)
        total, positions = torch.zeros((), dtype=torch.float64, device=self.device), 0
        self.model.train()
        batches = iterate(self.sessions, plan, self.recipe.model, settings)
        for batch in self.progress.track(batches, f"epoch {epoch}", len(plan)):
            positions += int((batch.targets[..., 0] > 0).sum())
            total += self._step(batch.to(self.device))
        trained = time.perf_counter() - started
        with self.average.swapped_in():
            scorer = ModelScorer.with_popularity(self.model, self.catalogue)
            found = quick_metrics(scorer, self.valid, self.catalogue.n_rows)[SEEN_KEPT]
            if (found["ndcg@10"] or 0.0) > self.status["best"]:
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
                self.status.update(best=found["ndcg@10"], best_epoch=epoch)
        seconds = time.perf_counter() - started
        self.status.update(epoch=epoch + 1, seconds=self.status["seconds"] + seconds)
        return {
            "epoch": epoch,
            "loss": float(total) / max(len(plan), 1),
            "positions_per_s": positions / trained,
            "seconds": round(seconds, 2),
            **{f"valid_{name}": value for name, value in found.items()},
        }

    def refresh_interests(self, epoch: int) -> None:
        """Cluster the catalogue's tokens where this epoch is due (pre-training has another rhythm)."""
        if epoch % self.recipe.train.refresh_interests_every == 0:
            self.model.discover_interests(self.recipe.train.seed)

    def loss(self, batch: TrainingBatch) -> Tensor:
        """Return the objective of one batch (pre-training has another one)."""
        return training_loss(self.model, batch, self.recipe.train)

    def _step(self, batch: TrainingBatch) -> Tensor:
        settings = self.recipe.train
        self.status["step"] += 1
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, self.status["step"] / max(settings.warmup_steps, 1))
        loss = self.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.average.update(self.status["step"])
        return loss.detach()

    def save_checkpoint(self) -> None:
        """Write all that the next epoch depends on into one file, by rename."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.weights.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
        tensors["random"] = torch.get_rng_state()
        facts = {"status": self.status, "numpy": self.rng.bit_generator.state, "fingerprint": self._fingerprint()}
        save_tensors(self.out / STATE_FILE, tensors, {"facts": json.dumps(facts)})

    def resume(self) -> None:
        """Continue from the run folder's checkpoint, if there is one.

        Raises
        ------
        ConfigError
            It belongs to another recipe or data set.
        """
        file = self.out / STATE_FILE
        if not file.is_file():
            self.start_over()
            return
        tensors = load_tensors(file)
        facts = json.loads(load_metadata(file)["facts"])
        if facts["fingerprint"] != self._fingerprint():
            raise ConfigError(
                f"{self.out} holds an interrupted run with other settings or data",
                "the same recipe and data",
                "give another --out, or --restart to discard it",
            )
        load_strictly(self.model, _part(tensors, "model."), str(file))
        self.best = _part(tensors, "best.")
        self.average.load(_part(tensors, "average."))
        state = self.optimizer.state_dict()
        for name, tensor in _part(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state["state"].setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict(state)
        torch.set_rng_state(tensors["random"])
        self.rng.bit_generator.state = facts["numpy"]
        self.status = facts["status"]
        self.progress.say(f"resuming after epoch {self.status['epoch'] - 1}")

    def start_over(self) -> None:
        """Discard an older checkpoint and log of the run folder."""
        for name in (STATE_FILE, LOG_FILE):
            (self.out / name).unlink(missing_ok=True)

    def _fingerprint(self) -> str:
        facts = [dataclasses.asdict(self.recipe), self.catalogue.n_rows, len(self.sessions.values), len(self.all_valid)]
        return json.dumps([*facts, self.facts] if self.facts else facts, sort_keys=True, default=str)


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_rows(splits: Mapping[str, Sessions], catalogue: Catalogue) -> None:
    for name, sessions in splits.items():
        highest = int(sessions.values.max(initial=0))
        if highest >= catalogue.n_rows:
            raise DataError(
                f"split {name!r} holds row {highest}",
                f"rows below {catalogue.n_rows}",
                "the catalogue is another one's; re-run the ETL",
            )
