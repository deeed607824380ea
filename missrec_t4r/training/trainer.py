"""Training loop: epochs, gradient accumulation, averaged weights, early stopping. Beside it: `curves` and `state`.

A checkpoint with everything that the next step depends on is written every few minutes: a run that is killed and
started again resumes within the epoch and ends with the same weights, bit for bit (on a GPU up to the order of sums).
Under torchrun every process computes a part of each batch; rank 0 ranks the validation sessions and writes.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import Examples, TrainingBatch, iterate, training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import target_counts
from missrec_t4r.errors import DataError
from missrec_t4r.evaluation.full_ranking import KEPT_WITH_HISTORY_TERM, quick_metrics
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import NDCG, NDCG_WITHOUT, fit_terms
from missrec_t4r.runs.extend import load_strictly
from missrec_t4r.runs.run_folder import begin_training, save_run
from missrec_t4r.training import distributed
from missrec_t4r.training.curves import Curves
from missrec_t4r.training.graphed_step import GraphedSteps, Shapes
from missrec_t4r.training.loss.full import FullSoftmax, Softmax
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.memory import release_freed_memory
from missrec_t4r.training.optim import AveragedWeights, Optimiser, learning_rate
from missrec_t4r.training.precision import check_precision, compile_blocks, resolve_precision, translate_compile_errors
from missrec_t4r.training.state import INTERRUPT, Checkpoint, TrainingData, random_state, set_random_state
from missrec_t4r.training.step import (
    Totals,
    batch_totals,
    choose_softmax,
    slots_of_random_batches,
    training_loss,
    with_interests_counted,
)
from missrec_t4r.training.warm_start.id_init import ids_from_content

log = logging.getLogger(__name__)

Prepare = Callable[[MISSRec, Catalogue], dict[str, Any]]
_CURE = "check the split: a validation target must be an item with training events, or one of the item table"


class Trainer:
    """Training loop and state of one run; `missrec_t4r.training.fit.train` prepares its arguments.

    Parameters
    ----------
    recipe : Recipe
    data : TrainingData
    out : Path
        Run folder.
    device : str
    prepare : function, optional
        Called with the new model and the catalogue before the optimiser is made, to load an earlier run's weights and
        to freeze parts. Its result is stored in `run.json` and is part of the checkpoint's fingerprint.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        out: Path,
        device: str = "auto",
        prepare: Prepare | None = None,
    ) -> None:
        self.catalogue, self.sessions, self.all_valid, event_features = data
        if not len(self.all_valid):
            raise DataError("no validation session has a known target", "sessions to choose the best epoch by", _CURE)
        self.recipe = recipe
        self.world = distributed.world()
        self.out = out
        settings = recipe.train
        self.device = distributed.own_device(device)
        check_precision(settings, self.device)
        self.rng = np.random.default_rng(settings.seed)
        torch.manual_seed(settings.seed)
        self.model = build_missrec(recipe.model, self.catalogue, event_features)
        if settings.id_init == "content":
            ids_from_content(self.model)
        self.facts = prepare(self.model, self.catalogue) if prepare else {}
        self.checkpoint = Checkpoint(out, recipe, data, self.facts)
        self.model.to(self.device)
        if settings.compile:
            compile_blocks(self.model)
        distributed.broadcast_([weight.data for weight in self.model.parameters()])
        if self.world.rank:
            torch.manual_seed(settings.seed + self.world.rank)  # from here on every process draws its own dropout
        self.softmax = self._softmax()
        self.n_slots: int | None = None
        self.assignment: Tensor | None = None  # of the interests, on the host, where the model is on a GPU
        is_graphed = self.device.type == "cuda" and settings.cuda_graphs and self.can_be_recorded()
        self.optimizer = Optimiser(self.model, settings, self._sparse_weights(), self.device, graphed=is_graphed)
        shapes = Shapes(recipe.model.max_sequence_length, settings.batch_size)
        self.graphed = GraphedSteps(self.optimizer, shapes, self.device) if is_graphed else None
        self.average = AveragedWeights(self.model, settings.ema_decay)
        self.best: dict[str, Tensor] = {}
        self.status: dict[str, Any] = {"epoch": 0, "step": 0, "best_epoch": -1, "best": -1.0, "seconds": 0.0}
        self.status |= {"done": 0, "positions": 0, "spent": 0.0}  # steps, positions, seconds of the current epoch
        self.total_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.plan_state = self.rng.bit_generator.state
        self.saved_at = time.perf_counter()
        self.curves: Curves | None = None
        self.is_interrupted = False
        indices = np.arange(len(self.all_valid))
        if settings.validation_sessions:
            indices = np.random.default_rng(settings.seed).permutation(indices)[: settings.validation_sessions]
        lengths = self.all_valid.lengths[indices]
        self.valid = self.all_valid.take(indices[np.argsort(lengths, kind="stable")])  # by length: little padding

    def run(self, data: Path) -> dict[str, Any]:
        """Train to the end, tune the score terms on validation, and write the run.

        Ctrl-C ends training after the current step: the best weights so far are written as a run, with the checkpoint
        from which the same call goes on. A second Ctrl-C ends the process at once.

        Parameters
        ----------
        data : Path
            Data folder, stored in `run.json`.

        Returns
        -------
        dict
            ``run`` and the facts of `run.json`.
        """
        is_first = self.world.rank == 0
        if is_first:
            begin_training(self.out)
            is_kept, status = self.recipe.train.tensorboard, self.status
            self.curves = Curves(self.out, status["epoch"], status["step"], tensorboard=is_kept)
        if not isinstance(self.softmax, FullSoftmax):
            log.info(f"{type(self.softmax).__name__} over {self.catalogue.n_items:,} items (train.softmax)")
        stopped_by = self.fit()
        if stopped_by == INTERRUPT:
            so_far = "the best weights so far" if self.status["epoch"] else "weights of a part of the first epoch"
            log.warning(f"interrupted: writing {so_far} to {self.out}; the same command continues from here")
        else:
            log.info(f"training ended by train.{stopped_by} = {getattr(self.recipe.train, stopped_by)}")
        if self.curves is not None:
            self.curves.close()
        return distributed.share(self._finish(data, stopped_by) if is_first else {})

    def fit(self) -> str:
        """Train epoch after epoch; return the setting that ended it, or ``interrupt``."""
        self.status.pop("is_cut_short", None)  # goes on with a higher limit
        with self._finishing_the_step_on_interrupt():
            while self._stopped_by() is None and not self.is_interrupted:
                record = self._epoch()
                if record is None:
                    break
                if self.curves is not None:
                    self.curves.epoch(record, self.status["step"])
                log.info(
                    f"epoch {record['epoch']:>3}  loss {record['loss']:.3f}  "
                    f"valid ndcg@10 {record['valid_ndcg@10']:.4f}  recall@10 {record['valid_recall@10']:.4f}  "
                    f"{record['positions_per_s']:,.0f} positions/s  {record['steps_per_s']:.1f} steps/s  "
                    f"{self._time_left()}"
                )
                self.save_checkpoint()
                release_freed_memory()
        return self._stopped_by() or INTERRUPT

    @contextlib.contextmanager
    def _finishing_the_step_on_interrupt(self) -> Iterator[None]:
        """Let the first Ctrl-C set a flag only; torchrun ends its processes itself."""
        if self.world.size > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def note(*_: Any) -> None:
            self.is_interrupted = True
            signal.signal(signal.SIGINT, before)
            log.warning("interrupted: ending after this step; Ctrl-C again ends at once")

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _finish(self, data: Path, stopped_by: str) -> dict[str, Any]:
        """Load the best epoch's weights, tune the score terms and write the run folder.

        The checkpoint stays unless validation stopped improving: a run may go on with higher limits.
        """
        load_strictly(self.model, self.best, "the best epoch")
        terms = fit_terms(self.model, self.catalogue, self.sessions, self.all_valid)
        info = {
            "best_epoch": self.status["best_epoch"],
            "epochs": self.status["epoch"],
            "valid_ndcg@10": self.status["best"],
            "stopped_by": stopped_by,
            "score_terms": terms,
            **self.facts,
            "seconds": round(self.status["seconds"], 1),
            "device": str(self.device),
            "precision": resolve_precision(self.recipe.train.precision, self.device),
        }
        save_run(self.out, self.model, self.recipe, data, info, self.catalogue, (self.sessions, self.all_valid))
        log.info(headline(terms, self.status["best"]))
        if stopped_by == "patience":
            self.checkpoint.file.unlink(missing_ok=True)
        return {"run": str(self.out), **info}

    def _stopped_by(self) -> str | None:
        """Return the setting that ends training now: ``epochs``, ``patience`` or ``max_minutes``; None to go on."""
        settings, status = self.recipe.train, self.status
        if not status["epoch"]:
            return None
        if status.get("is_cut_short"):
            return "max_minutes"
        if status["epoch"] >= settings.epochs:
            return "epochs"
        if status["epoch"] - 1 - status["best_epoch"] >= settings.patience:
            return "patience"
        return "max_minutes" if self._is_over_time(status["seconds"]) else None

    def _is_over_time(self, seconds: float) -> bool:
        return 0 < 60 * self.recipe.train.max_minutes < seconds

    def _time_left(self) -> str:
        """Return how long the remaining epochs would take at the mean pace so far, or until the time limit."""
        settings, status = self.recipe.train, self.status
        seconds = status["seconds"] / status["epoch"] * (settings.epochs - status["epoch"])
        if settings.max_minutes:
            seconds = min(seconds, max(60 * settings.max_minutes - status["seconds"], 0))
        return f"at most {seconds / 60:.0f} min left" if seconds >= 60 else f"at most {seconds:.0f} s left"

    def _epoch(self) -> dict[str, Any] | None:
        """Train an epoch, or the rest of an interrupted one, validate, and return its record for the log.

        None if the user interrupts within the epoch: then a checkpoint is written, and the first epoch validated.
        """
        status, epoch = self.status, self.status["epoch"]
        started = time.perf_counter() - status["spent"]
        if not status["done"]:
            self.refresh_interests(epoch)
            distributed.broadcast_([self.model.interests.centroids, self.model.interests.assignment])
        self.count_slots(epoch)
        if not self._train_batches(started):
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the host is some steps ahead: without it the rate would be too high
        train_seconds = time.perf_counter() - started
        metrics = distributed.share(self._validate() if self.world.rank == 0 else {})
        seconds = time.perf_counter() - started
        record = {
            "epoch": epoch,
            "loss": float(self.total_loss) / max(status["done"], 1),
            "positions_per_s": status["positions"] / train_seconds,
            "steps_per_s": status["done"] / train_seconds,
            "seconds": round(seconds, 2),
            **{f"valid_{name}": value for name, value in metrics.items()},
        }
        self.total_loss.zero_()
        status.update(epoch=epoch + 1, seconds=status["seconds"] + seconds, done=0, positions=0, spent=0.0)
        self.status = distributed.share(status)
        return record

    def _train_batches(self, started: float) -> bool:
        """Train the batches of the epoch that are left; return False if the user interrupts.

        Parameters
        ----------
        started : float
            When the epoch would have started in this process, in seconds of `time.perf_counter`.
        """
        status, settings, plan = self.status, self.recipe.train, self._plan()
        self.model.train()
        batches = iterate(self.sessions, plan[status["done"] :], self.recipe.model, settings)
        for batch in track(batches, f"epoch {status['epoch']}", len(plan) - status["done"]):
            status["positions"] += int((batch.targets[..., 0] > 0).sum())
            loss = self._step(batch, (status["epoch"] + status["done"] / len(plan)) / settings.epochs)
            spent = time.perf_counter() - started
            is_over = self._is_over_time(status["seconds"] + spent)
            loss, is_due, is_over = self._over_processes(loss, self._is_checkpoint_due(), is_over)
            self.total_loss += loss
            status["done"] += 1
            if self.curves is not None and settings.tensorboard:
                self.curves.step(status["step"], {"loss": float(loss), "learning_rate": self.optimizer.rate})
            if status["done"] == len(plan):
                break
            if is_over:
                status["is_cut_short"] = True
                break
            if is_due or self.is_interrupted:
                status["spent"] = time.perf_counter() - started
                self.save_checkpoint()
            if self.is_interrupted:
                if not self.best:
                    self._validate()
                return False
        return True

    def _plan(self) -> list[tuple[Examples, bool]]:
        """Return the epoch's batches."""
        self.plan_state = self.rng.bit_generator.state  # from which an interrupted epoch is planned again
        return training_batches(self.sessions, self.recipe.model, self.recipe.train, self.rng)

    def _validate(self) -> dict[str, float | None]:
        """Rank the validation sessions with the averaged weights; store the weights if NDCG@10 is the best so far."""
        with self.average.swapped_in():
            scorer = ModelScorer.with_popularity(self.model, self.catalogue)
            protocol = KEPT_WITH_HISTORY_TERM  # with a history bias, if the network has one
            metrics = quick_metrics(scorer, self.valid, self.catalogue.n_rows, protocols=[protocol])[protocol]
            if (metrics["ndcg@10"] or 0.0) > self.status["best"]:
                self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}
                self.status.update(best=metrics["ndcg@10"], best_epoch=self.status["epoch"])
        return metrics

    def refresh_interests(self, epoch: int) -> None:
        """Discover interests in every ``refresh_interests_every``-th epoch; pre-training has another schedule."""
        if epoch % self.recipe.train.refresh_interests_every == 0:
            self.model.discover_interests(self.recipe.train.seed)

    def count_slots(self, epoch: int) -> None:
        """Note what the steps of an epoch need of its interests, so that none has to ask the device for it."""
        self.n_slots = slots_of_random_batches(self.model, self.sessions, self.recipe.train, epoch)
        self.assignment = self.model.interests.assignment.cpu() if self.device.type == "cuda" else None

    def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> Tensor:
        """Return the fine-tuning loss of a batch, or of a part of it; pre-training overrides this.

        The losses of all parts, in all processes, add up to that of the whole batch, for which ``totals`` are needed.
        """
        return training_loss(
            self.model, batch, self.recipe.train, totals=totals, softmax=self.softmax, n_slots=self.n_slots
        )

    def _step(self, batch: TrainingBatch, share: float) -> Tensor:
        """Take one optimiser step on the whole batch and return this process's part of the loss.

        ``share`` of the training is done before the step (`learning_rate`). On a GPU the host waits for nothing here.
        """
        self.status["step"] += 1
        rate = learning_rate(self.recipe.train, self.status["step"], share)
        if self.graphed is None:
            total = self._take(batch, rate)
        else:
            total = torch.zeros_like(self.total_loss) + self.graphed(self._counted(batch), rate, self.loss)
        self.average.update(self.status["step"])
        return total

    def _take(self, batch: TrainingBatch, rate: float) -> Tensor:
        """Take a step, in parts if ``train.accumulate`` or several processes ask for it, and return the loss."""
        settings, world = self.recipe.train, self.world
        self.optimizer.zero_grad()
        parts = settings.accumulate * world.size
        totals = batch_totals(self.model, batch.to(self.device)) if parts > 1 else None
        total = torch.zeros_like(self.total_loss)
        for number in range(world.rank, parts, world.size):
            with translate_compile_errors(settings.compile):
                part = self._counted(batch if parts == 1 else batch.part(number, parts))
                loss = self.loss(part.to(self.device), totals)
                self.optimizer.backward(loss)
            total += loss.detach()
        self.optimizer.step(rate)
        return total

    def can_be_recorded(self) -> bool:
        """Whether the work of a step depends on nothing but the shape of its batch.

        Losses other than the full softmax look for the distinct items of a batch, and processes send messages; with the
        padding as a candidate the history bias would count a batch's padding.
        """
        settings, model = self.recipe.train, self.recipe.model
        is_one_part = settings.accumulate == 1 and not distributed.is_grouped()
        is_plain = not settings.compile and settings.precision != "fp16"
        has_candidate_padding = model.history_bias and model.padding_candidate
        return is_one_part and is_plain and isinstance(self.softmax, FullSoftmax) and not has_candidate_padding

    def _counted(self, batch: TrainingBatch) -> TrainingBatch:
        """Return a batch of the host with all that a step would otherwise have to ask the device for."""
        if self.assignment is None:
            return batch
        return with_interests_counted(batch, self.model, self.assignment, self.n_slots)

    def _softmax(self) -> Softmax:
        settings, n_rows = self.recipe.train, self.catalogue.n_rows
        frequency = torch.from_numpy(target_counts(self.sessions, n_rows)).to(self.device)
        positions = settings.batch_size // (settings.accumulate * self.world.size)  # per forward pass
        return choose_softmax(settings, n_rows, positions, frequency, self.device)

    def _sparse_weights(self) -> frozenset[Tensor]:
        """Return the ID tables if the softmax is sampled: then their gradients have few rows."""
        tables = self.model.item_encoder.id_tables if isinstance(self.softmax, SampledSoftmax) else []
        return frozenset(table for table in tables if table.requires_grad)

    def _over_processes(self, loss: Tensor, is_due: bool, is_over: bool) -> tuple[Tensor, bool, bool]:
        """Return the loss summed over the processes, and whether rank 0 wants a checkpoint or the end: one message."""
        if not distributed.is_grouped():
            return loss, is_due, is_over
        flags = loss.new_tensor([is_due, is_over and self.world.rank == 0])
        loss, n_due, n_over = distributed.sum_(torch.cat([loss.unsqueeze(0), flags]))
        return loss, bool(n_due), bool(n_over)

    def _is_checkpoint_due(self) -> bool:
        """Return whether ``checkpoint_minutes`` have passed by the clock of rank 0."""
        minutes = self.recipe.train.checkpoint_minutes
        return self.world.rank == 0 and minutes > 0 and time.perf_counter() - self.saved_at > 60 * minutes

    def save_checkpoint(self) -> None:
        """Write everything that the next step depends on into one file, atomically; all processes call it together."""
        random = distributed.collect(random_state(self.device))
        self.saved_at = time.perf_counter()
        if self.world.rank:
            return
        parts = {
            "model": self.model.state_dict(),
            "best": self.best,
            "average": self.average.weights,
            "optimizer": self.optimizer.state(),
            "progress": {"total": self.total_loss},
            **{f"random{rank}": states for rank, states in enumerate(random)},
        }
        facts = {"status": self.status, "numpy": self.rng.bit_generator.state, "planned": self.plan_state}
        self.checkpoint.save(parts, facts)

    def resume(self) -> None:
        """Restore the run folder's checkpoint, if there is one that can go on (`Checkpoint.load`)."""
        found = self.checkpoint.load()
        if found is None:
            return
        parts, facts = found
        load_strictly(self.model, parts["model"], str(self.checkpoint.file))
        self.best = parts.get("best", {})
        self.average.load(parts.get("average", {}))
        self.optimizer.load(parts.get("optimizer", {}))
        self.total_loss.copy_(parts["progress"]["total"])
        set_random_state(parts[f"random{self.world.rank}"], self.device)
        self.status = facts["status"]
        self.rng.bit_generator.state = facts["planned" if self.status["done"] else "numpy"]
        log.info(f"resuming in epoch {self.status['epoch']} after {self.status['done']} of its steps")


def headline(terms: Mapping[str, Any], network: float) -> str:
    """Return the result of a training in one sentence: validation NDCG@10, and what the score terms added to it.

    Examples
    --------
    >>> headline({"valid_ndcg@10_without_terms": 0.12, "valid_ndcg@10": 0.125}, 0.121)
    'validation NDCG@10 0.1250: 0.1200 by the network, +0.0050 by the score terms'
    >>> headline({}, 0.121)
    'validation NDCG@10 0.1210, of the network alone'
    """
    if NDCG_WITHOUT not in terms:
        return f"validation NDCG@10 {network:.4f}, of the network alone"
    before, after = terms[NDCG_WITHOUT], terms[NDCG]
    return f"validation NDCG@10 {after:.4f}: {before:.4f} by the network, {after - before:+.4f} by the score terms"
