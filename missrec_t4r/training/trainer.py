"""State of one training run: epochs, parts of batches, averaged weights, early stopping, saved states.

A run depends on nothing but its last saved state, and that is on disk every few minutes: killed at any moment and
started again it goes on within the epoch and ends as if it had never stopped. Under torchrun every process does a part
of each batch, the first one ranks the validation sessions and writes.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import Examples, TrainingBatch, iterate, training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.evaluation.full_ranking import SEEN_KEPT, quick_metrics
from missrec_t4r.model.missrec import MISSRec, build_missrec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.runs.run_folder import (
    RUN_FILE,
    STATE_FILE,
    load_metadata,
    load_strictly,
    load_tensors,
    save_run,
    save_tensors,
)
from missrec_t4r.training import distributed
from missrec_t4r.training import precision as arithmetic
from missrec_t4r.training.loss.full import FullSoftmax, Softmax
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.optim import AveragedWeights, Optimiser, learning_rate
from missrec_t4r.training.step import Totals, batch_totals, choose_softmax, places_of_random_batches, training_loss
from missrec_t4r.training.warm_start.id_init import ids_from_content

Prepare = Callable[[MISSRec, Catalogue], dict[str, Any]]
_HARMLESS = ("checkpoint_minutes", "tensorboard")
"""Settings that an interrupted run may change: no number depends on them."""


class Trainer:
    """State of one training run; `missrec_t4r.training.fit.train` is the way in.

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
        Receives the fresh model and the catalogue before the optimiser is made: loads an earlier run's weights, freezes
        parts. What it returns goes into `run.json` and tells interrupted runs apart.
    event_features : sequence of EventColumn
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
        event_features: Sequence[EventColumn] = (),
    ) -> None:
        self.recipe, self.catalogue, self.sessions = recipe, catalogue, sessions
        self.world = distributed.world()
        self.out, self.progress = out, progress if self.world.rank == 0 else quiet
        settings = recipe.train
        self.device = distributed.own_device(device)
        arithmetic.check(settings, self.device)
        self.rng = np.random.default_rng(settings.seed)
        torch.manual_seed(settings.seed)
        self.model = build_missrec(recipe.model, catalogue, event_features)
        if settings.id_init == "content":
            ids_from_content(self.model)
        self.facts = prepare(self.model, catalogue) if prepare else {}
        self.model.to(self.device)
        if settings.compile:
            arithmetic.compile_(self.model)
        distributed.broadcast_([weight.data for weight in self.model.parameters()])
        if self.world.rank:
            torch.manual_seed(settings.seed + self.world.rank)  # from here on every process draws its own dropout
        self.softmax = self._softmax()
        self.places: int | None = None
        self.optimizer = Optimiser(self.model, settings, self._by_rows(), self.device)
        self.average = AveragedWeights(self.model, settings.ema_decay)
        self.best: dict[str, Tensor] = {}
        self.status: dict[str, Any] = {"epoch": 0, "step": 0, "best_epoch": -1, "best": -1.0, "seconds": 0.0}
        self.status |= {"done": 0, "positions": 0, "spent": 0.0}  # of the epoch that runs: steps, positions, seconds
        self.total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.planned = self.rng.bit_generator.state
        self.saved = time.perf_counter()
        self.curves: Curves | None = None
        sample = settings.validation_sessions
        chosen = (
            np.random.default_rng(settings.seed).permutation(len(valid))[:sample] if sample else np.arange(len(valid))
        )
        chosen = chosen[np.argsort(valid.lengths[chosen], kind="stable")]  # equal lengths in a chunk: little padding
        self.valid, self.all_valid = valid.take(chosen), valid

    def run(self, data: Path) -> dict[str, Any]:
        """Train to the end, weigh the priors and write the run."""
        first = self.world.rank == 0
        if first:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / RUN_FILE).unlink(missing_ok=True)
        self.curves = self._curves() if first else None
        if not isinstance(self.softmax, FullSoftmax):
            self.progress.say(f"{type(self.softmax).__name__} over {self.catalogue.n_items:,} items (train.softmax)")
        while not self._finished():
            line = self._epoch()
            if self.curves is not None:
                self.curves.epoch(line, self.status["step"])
            self.progress.say(
                f"epoch {line['epoch']:>3}  loss {line['loss']:.3f}  valid ndcg@10 {line['valid_ndcg@10']:.4f}  "
                f"recall@10 {line['valid_recall@10']:.4f}  {line['positions_per_s']:,.0f} positions/s"
            )
            self.save_checkpoint()
        if self.curves is not None:
            self.curves.close()
        return distributed.share(self._finish(data) if first else {})

    def _finish(self, data: Path) -> dict[str, Any]:
        load_strictly(self.model, self.best, "the best epoch")
        prior = fit_terms(self.model, self.catalogue, self.sessions, self.all_valid, progress=self.progress)
        info = {
            "best_epoch": self.status["best_epoch"],
            "epochs": self.status["epoch"],
            "valid_ndcg@10": self.status["best"],
            "prior": prior,
            **self.facts,
            "seconds": round(self.status["seconds"], 1),
            "device": str(self.device),
            "precision": arithmetic.resolved(self.recipe.train.precision, self.device),
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
        status, epoch = self.status, self.status["epoch"]
        started = time.perf_counter() - status["spent"]
        if not status["done"]:
            self.refresh_interests(epoch)
            distributed.broadcast_([self.model.interests.centroids, self.model.interests.assignment])
        self.places = places_of_random_batches(self.model, self.sessions, self.recipe.train, epoch)
        plan = self._plan()
        self.model.train()
        batches = iterate(self.sessions, plan[status["done"] :], self.recipe.model, self.recipe.train)
        for batch in self.progress.track(batches, f"epoch {epoch}", len(plan) - status["done"]):
            status["positions"] += int((batch.targets[..., 0] > 0).sum())
            loss = self._step(batch.to(self.device), (epoch + status["done"] / len(plan)) / self.recipe.train.epochs)
            loss, due = self._agreed(loss, self._due())
            self.total += loss
            status["done"] += 1
            if self.curves is not None and self.recipe.train.tensorboard:
                self.curves.step(status["step"], {"loss": float(loss), "learning_rate": self.optimizer.rate})
            if due and status["done"] < len(plan):
                status["spent"] = time.perf_counter() - started
                self.save_checkpoint()
        trained = time.perf_counter() - started
        found = distributed.share(self._validate() if self.world.rank == 0 else {})
        seconds = time.perf_counter() - started
        line = {
            "epoch": epoch,
            "loss": float(self.total) / max(len(plan), 1),
            "positions_per_s": status["positions"] / trained,
            "seconds": round(seconds, 2),
            **{f"valid_{name}": value for name, value in found.items()},
        }
        self.total.zero_()
        status.update(epoch=epoch + 1, seconds=status["seconds"] + seconds, done=0, positions=0, spent=0.0)
        self.status = distributed.share(status)
        return line

    def _plan(self) -> list[tuple[Examples, bool]]:
        """Return the epoch's batches; an epoch that was interrupted is planned again as it was."""
        now = self.rng.bit_generator.state
        interrupted = self.status["done"] > 0
        if interrupted:
            self.rng.bit_generator.state = self.planned
        else:
            self.planned = now
        plan = training_batches(self.sessions, self.recipe.model, self.recipe.train, self.rng)
        if interrupted:
            self.rng.bit_generator.state = now
        return plan

    def _validate(self) -> dict[str, float | None]:
        """Rank the validation sessions with the averaged weights and keep these where they are the best so far."""
        with self.average.swapped_in():
            scorer = ModelScorer.with_popularity(self.model, self.catalogue)
            found = quick_metrics(scorer, self.valid, self.catalogue.n_rows)[SEEN_KEPT]
            if (found["ndcg@10"] or 0.0) > self.status["best"]:
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
                self.status.update(best=found["ndcg@10"], best_epoch=self.status["epoch"])
        return found

    def refresh_interests(self, epoch: int) -> None:
        """Cluster the catalogue's tokens where this epoch is due (pre-training has another rhythm)."""
        if epoch % self.recipe.train.refresh_interests_every == 0:
            self.model.discover_interests(self.recipe.train.seed)

    def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> Tensor:
        """Return the objective of a batch (pre-training has another one), or of a part of one that ``totals`` counts.

        The losses of all parts, in all processes, add up to that of the whole batch.
        """
        return training_loss(
            self.model, batch, self.recipe.train, totals=totals, softmax=self.softmax, places=self.places
        )

    def _step(self, batch: TrainingBatch, share: float) -> Tensor:
        """Take a step on the whole batch, ``share`` of training being done; return this process's part of the loss."""
        settings, world, status = self.recipe.train, self.world, self.status
        status["step"] += 1
        self.optimizer.zero_grad()
        parts = settings.accumulate * world.size
        totals = batch_totals(self.model, batch) if parts > 1 else None
        total = torch.zeros_like(self.total)
        for number in range(world.rank, parts, world.size):
            with arithmetic.compiling(settings.compile):
                loss = self.loss(batch if parts == 1 else batch.part(number, parts), totals)
                self.optimizer.backward(loss)
            total += loss.detach()
        self.optimizer.step(learning_rate(settings, status["step"], share))
        self.average.update(status["step"])
        return total

    def _softmax(self) -> Softmax:
        settings, n_rows = self.recipe.train, self.catalogue.n_rows
        later = np.delete(self.sessions.values, self.sessions.offsets[:-1][self.sessions.lengths > 0])
        frequency = torch.from_numpy(np.bincount(later, minlength=n_rows)).to(self.device)
        at_once = settings.batch_size // (settings.accumulate * self.world.size)
        return choose_softmax(settings, n_rows, at_once, frequency, self.device)

    def _by_rows(self) -> frozenset[Tensor]:
        table = self.model.item_encoder.id_embedding
        sparse = table is not None and isinstance(self.softmax, SampledSoftmax) and table.weight.requires_grad
        return frozenset({table.weight}) if table is not None and sparse else frozenset()

    def _agreed(self, loss: Tensor, due: bool) -> tuple[Tensor, bool]:
        """Return the loss summed over the processes, and whether one of them says that a state is due."""
        if self.world.size == 1:
            return loss, due
        loss, votes = distributed.sum_(torch.stack([loss, loss.new_tensor(due)]))
        return loss, bool(votes)

    def _due(self) -> bool:
        """Whether it is time to save a state; the first process's clock counts."""
        minutes = self.recipe.train.checkpoint_minutes
        return self.world.rank == 0 and minutes > 0 and time.perf_counter() - self.saved > 60 * minutes

    def save_checkpoint(self) -> None:
        """Write all that the next step depends on into one file, by rename; all processes call it together."""
        random = distributed.collect(random_state(self.device))
        self.saved = time.perf_counter()
        if self.world.rank:
            return
        parts = {
            "model": self.model.state_dict(),
            "best": self.best,
            "average": self.average.weights,
            "optimizer": self.optimizer.state(),
            "progress": {"total": self.total},
            **{f"random{rank}": states for rank, states in enumerate(random)},
        }
        facts = {"status": self.status, "numpy": self.rng.bit_generator.state, "planned": self.planned}
        save_state(self.out / STATE_FILE, parts, facts, self._fingerprint())

    def resume(self) -> None:
        """Continue from the run folder's state, if there is one.

        Raises
        ------
        ConfigError
            It belongs to another recipe, data set or number of processes.
        """
        file = self.out / STATE_FILE
        if not file.is_file():
            self.start_over()
            return
        parts, facts = load_state(file, self._fingerprint())
        load_strictly(self.model, parts["model"], str(file))
        self.best = parts.get("best", {})
        self.average.load(parts.get("average", {}))
        self.optimizer.load(parts.get("optimizer", {}))
        self.total.copy_(parts["progress"]["total"])
        set_random_state(parts[f"random{self.world.rank}"], self.device)
        self.rng.bit_generator.state, self.planned = facts["numpy"], facts["planned"]
        self.status = facts["status"]
        self.progress.say(f"resuming in epoch {self.status['epoch']}, after {self.status['done']} steps of it")

    def start_over(self) -> None:
        """Discard an older state and the curves of the run folder."""
        if self.world.rank == 0:
            for name in (STATE_FILE, LOG_FILE):
                (self.out / name).unlink(missing_ok=True)
            shutil.rmtree(self.out / TENSORBOARD_FOLDER, ignore_errors=True)

    def _curves(self) -> Curves:
        settings, status = self.recipe.train, self.status
        return Curves(self.out, status["epoch"], status["step"], tensorboard=settings.tensorboard)

    def _fingerprint(self) -> str:
        recipe = dataclasses.asdict(self.recipe)
        recipe["train"] = {name: value for name, value in recipe["train"].items() if name not in _HARMLESS}
        facts = [recipe, self.catalogue.n_rows, len(self.sessions.values), len(self.all_valid)]
        facts += [self.world.size] if self.world.size > 1 else []
        return json.dumps([*facts, self.facts] if self.facts else facts, sort_keys=True, default=str)


# A run's curves: a JSON line per epoch, and TensorBoard's event files on request

LOG_FILE, TENSORBOARD_FOLDER = "log.jsonl", "tensorboard"


class Curves:
    """Where the numbers of a training run go.

    Parameters
    ----------
    out : Path
        Run folder.
    epoch, step : int
        Where the run goes on. What an interrupted process wrote from there on is dropped, since it comes again.
    tensorboard : bool
        Also write every step's loss and learning rate, and every epoch's line, for TensorBoard.

    Raises
    ------
    ConfigError
        TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, epoch: int = 0, step: int = 0, *, tensorboard: bool = False) -> None:
        self.file = out / LOG_FILE
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < epoch]
            if kept != lines:
                self.file.write_text("".join(kept), encoding="utf-8")
        self.writer = _writer(out / TENSORBOARD_FOLDER, step) if tensorboard else None

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Note a step's numbers for TensorBoard."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"step/{name}", value, number)

    def epoch(self, line: Mapping[str, Any], step: int) -> None:
        """Append an epoch's line."""
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(dict(line)) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"epoch/{name}", value, step)
            self.writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self.writer is not None:
            self.writer.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        cure = "pip install 'missrec-t4r[tensorboard]', or --set train.tensorboard=false"
        raise ConfigError("train.tensorboard is on and TensorBoard is not installed", "the package", cure) from error
    return SummaryWriter(str(folder), purge_step=step or None)


# State of an interrupted run in one file: tensors by part, facts as JSON, written aside and renamed

Parts = Mapping[str, Mapping[str, Tensor]]


def save_state(file: Path, parts: Parts, facts: Mapping[str, Any], fingerprint: str) -> None:
    """Write the state.

    Parameters
    ----------
    file : Path
    parts : mapping of str to mapping of str to Tensor
        Weights, averages, moments, random states: each under its own names.
    facts : mapping
        What JSON can hold.
    fingerprint : str
        Of settings and data; `load_state` refuses another one.
    """
    tensors = {f"{part}/{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
    save_tensors(file, tensors, {"facts": json.dumps(facts), "fingerprint": fingerprint})


def load_state(file: Path, fingerprint: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the parts and the facts of a state.

    Raises
    ------
    ConfigError
        It belongs to another recipe or data set.
    CheckpointError
        The file is damaged.
    """
    tensors, metadata = load_tensors(file), load_metadata(file)
    if metadata.get("fingerprint") != fingerprint:
        raise ConfigError(
            f"{file.parent} holds an interrupted run with other settings or data",
            "the same recipe, data and number of processes",
            "give another --out, or --restart to discard it",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    facts: dict[str, Any] = json.loads(metadata["facts"])
    return parts, facts


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Return the state of torch's random numbers, those of the GPU in use among them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on with the random numbers of a saved state."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
