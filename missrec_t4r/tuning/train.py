"""``missrec tune train``: search for settings of a training by Optuna, within minutes, on validation sessions alone.

Every trial is a training as `missrec train` runs it, with its early stopping; a trial whose validation NDCG@10 is below
the median of the others at the same epoch is pruned. The first trial is the recipe itself. Trials are kept in
``study.db`` (SQLite): the same command goes on from there, and several processes share one folder. After every trial
the best settings are written as a recipe, with a page of all learning curves.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import changed_settings, require_at_least, require_positive
from missrec_t4r.config.recipe import AUTO, SECTIONS
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.atomic import is_running, write_text
from missrec_t4r.io.lock import locked
from missrec_t4r.runs.run_folder import require_run_folder
from missrec_t4r.training import distributed
from missrec_t4r.training.auto import choose
from missrec_t4r.training.fit import read_training_data
from missrec_t4r.training.memory import TooLargeError, translate_out_of_memory
from missrec_t4r.training.state import INTERRUPT, TrainingData
from missrec_t4r.training.trainer import Trainer
from missrec_t4r.tuning.page import Tried, page
from missrec_t4r.tuning.space import Space, space_around, values_of

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)

STUDY_FILE, BEST_FILE, PAGE_FILE = "study.db", "best.yaml", "trials.html"
_MADE_FROM, _BY, _ENDED = "made_from", "process", "ended"
"""Attributes of a study and of its trials."""
_REFUSED: Final = "refused"
"""What ended a trial whose settings do not fit together, or not into the GPU."""
_WITHOUT_PRUNING: Final = 4
"""Finished trials before any is pruned."""
_FIRST_EPOCHS: Final = 2
"""Epochs of a trial that are never compared."""
_MOST_FAILURES: Final = 10
"""Refused draws in a row after which the search ends."""


def tune_train(
    data: str | Path,
    out: str | Path,
    *,
    minutes: float = 60.0,
    recipe: str | Path = AUTO,
    settings: Mapping[str, Any] | None = None,
    space: str | Path | None = None,
    trials: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Search for better settings of a training by Optuna, on validation sessions; write a recipe and a page of curves.

    Parameters
    ----------
    data : path
        Data folder written by `missrec etl`; its test split is not read.
    out : path
        Folder of the search. The same command goes on with the trials that are there; several processes may share it.
    minutes : float
        Time of this call, inf for no limit. A trial that it cuts short counts with what it reached.
    recipe : str or path
        Recipe to start from: auto, a shipped recipe or a YAML file.
    settings : mapping, optional
        Setting that overrides the recipe and is not varied, such as train.epochs=10; repeatable.
    space : path, optional
        YAML file of what is varied, such as `model.dropout: {low: 0.1, high: 0.6}` or `train.batch_size: [256, 512]`;
        by default ten settings of model and training.
    trials : int
        At most this many trials in this call; 0 for no limit.
    device : str
        auto (a GPU if there is one), cpu or cuda.

    Returns
    -------
    dict
        Files, number of trials by their end, the best trial, its validation NDCG@10 and that of the recipe, and the
        settings that it changes.

    Raises
    ------
    ConfigError
        The folder holds a search of other data or settings, or every draw is refused.
    """
    require_positive(minutes=minutes)
    require_at_least(0, trials=trials)
    if distributed.launched().size > 1:
        raise ConfigError(
            "missrec tune train under torchrun",
            "one process per trial",
            "start the command several times with one --out",
        )
    data, out = Path(data), Path(out)
    require_run_folder(out, "search", {STUDY_FILE})
    base = choose(data, settings, device).recipe if str(recipe) == AUTO else Recipe.load(recipe, settings)
    search = _Search(out, base, space_around(base, space, settings or {}), read_training_data(data, base), device)
    stopped_by = search.run(60 * minutes, trials)
    return search.result(data, stopped_by)


class _Trial(Trainer):
    """A training that reports every epoch, ends when its trial is pruned, and writes nothing."""

    trial: optuna.Trial
    is_pruned = False

    def save_checkpoint(self) -> None:
        """Write nothing: a trial that is killed is tried again."""

    def _epoch(self) -> dict[str, Any] | None:
        record = super()._epoch()
        if record is not None:
            self.trial.report(record["valid_ndcg@10"] or 0.0, record["epoch"])
            self.is_pruned = self.trial.should_prune()
        return record

    def _stopped_by(self) -> str | None:
        return "pruned" if self.is_pruned else super()._stopped_by()


class _Search:
    """An Optuna study in a folder.

    Parameters
    ----------
    out : Path
    base : Recipe
        What the first trial trains.
    space : mapping
    read : TrainingData
    device : str
    """

    def __init__(self, out: Path, base: Recipe, space: Space, read: TrainingData, device: str) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # trials are logged here
        self.out, self.base, self.space, self.read, self.device = out, base, space, read, device
        self.own = values_of(base, space)
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / STUDY_FILE):  # one of several processes creates the study
            self.study = optuna.create_study(
                storage=f"sqlite:///{(out / STUDY_FILE).resolve()}",
                study_name="train",
                load_if_exists=True,
                direction="maximize",
                sampler=optuna.samplers.TPESampler(),
                pruner=optuna.pruners.MedianPruner(_WITHOUT_PRUNING, _FIRST_EPOCHS),
            )
            self._require_same_search()
            self._try_again_what_was_killed()
            if not self.study.trials:
                self.study.enqueue_trial(self.own)

    def run(self, seconds: float, most: int) -> str:
        """Run trials for so many seconds, at least a step of one; return what ended the search."""
        tried, refused, ends = 0, 0, time.monotonic() + seconds
        try:
            while (left := ends - time.monotonic()) > 0:
                if most and tried >= most:
                    return "trials"
                stopped_by = self._try(left)
                tried, refused = tried + 1, refused + 1 if stopped_by is None else 0
                if refused >= _MOST_FAILURES:
                    raise ConfigError(
                        f"the last {refused} draws were refused, see the log",
                        "settings that fit together, and into the GPU",
                        "edit --space",
                    )
                self.write()
                if stopped_by == INTERRUPT:
                    return INTERRUPT
        except KeyboardInterrupt:  # between two trainings
            return INTERRUPT
        return "minutes"

    def _try(self, seconds: float) -> str | None:
        """Train what a trial draws; return what ended it, None for settings that do not fit together or into a GPU."""
        from optuna.trial import TrialState

        trial = self.study.ask()
        trial.set_user_attr(_BY, [socket.gethostname(), os.getpid()])
        drawn = {name: values.draw(trial, name) for name, values in self.space.items()}
        limit = min(seconds / 60, self.base.train.max_minutes or math.inf)
        try:
            recipe = self.base.changed({**drawn, "train.max_minutes": 0.0 if math.isinf(limit) else limit})
            with translate_out_of_memory():
                trainer = _Trial(recipe, self.read, self.out, self.device)
        except ConfigError as error:
            self._refuse(trial, error)
            return None
        trainer.trial = trial
        log.info(f"trial {trial.number}: {_listed(self._changes(trial)) or 'the recipe itself'}")
        try:
            with translate_out_of_memory():
                stopped_by = trainer.fit()
        except TooLargeError as error:
            self._refuse(trial, error)
            return None
        except KeyboardInterrupt:  # the second Ctrl-C
            trial.set_user_attr(_ENDED, INTERRUPT)
            self.study.tell(trial, state=TrialState.PRUNED)
            raise
        best = trainer.status["best"]
        if stopped_by == INTERRUPT and trainer.status["epoch"] == 0 and best >= 0:
            trial.report(best, 0)  # within the first epoch
        is_cut = stopped_by in (INTERRUPT, "pruned") or (stopped_by == "max_minutes" and limit == seconds / 60)
        trial.set_user_attr(_ENDED, stopped_by)
        self.study.tell(trial, *([] if is_cut else [best]), state=TrialState.PRUNED if is_cut else TrialState.COMPLETE)
        leader = self.best()
        words = "none" if leader is None else f"{_value(leader):.4f} (trial {leader.number})"
        log.info(f"trial {trial.number} ended ({stopped_by}): valid ndcg@10 {best:.4f}; best {words}")
        return stopped_by

    def _refuse(self, trial: optuna.Trial, error: ConfigError) -> None:
        """Give up a trial whose settings do not fit together, or not into the GPU."""
        from optuna.trial import TrialState

        log.warning(f"trial {trial.number} is refused: {error}")
        trial.set_user_attr(_ENDED, _REFUSED)
        self.study.tell(trial, state=TrialState.FAIL)

    def best(self) -> optuna.trial.FrozenTrial | None:
        """Return the trial with the best validation epoch, whether it ran to its end or not; none that was refused."""
        kept = (trial for trial in self._measured() if trial.user_attrs.get(_ENDED) != _REFUSED)
        return max(kept, key=_value, default=None)

    def _measured(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials with at least one validation."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.intermediate_values]

    def _changes(self, trial: optuna.trial.BaseTrial | optuna.trial.FrozenTrial) -> dict[str, Any]:
        """Return the settings of a trial that differ from the recipe's."""
        return {name: value for name, value in trial.params.items() if value != self.own[name]}

    def write(self) -> None:
        """Write the best recipe and the page, one process after the other."""
        with locked(self.out / STUDY_FILE):
            best = self.best()
            if best is None:
                return
            recipe = self.base.changed(best.params)
            values = {name: dataclasses.asdict(getattr(recipe, name)) for name in SECTIONS if name != "pretrain"}
            changes = _listed(self._changes(best)) or "nothing"
            head = (
                f"# Trial {best.number} of {STUDY_FILE}: validation NDCG@10 {_value(best):.4f} of the network alone.\n"
                f"# It changes {changes}.\n#\n"
                f"#   missrec train --data DATA --out RUN --recipe {BEST_FILE}\n"
            )
            trials = [
                Tried(
                    trial.number,
                    _ended(trial),
                    [value for _, value in sorted(trial.intermediate_values.items())],
                    self._changes(trial),
                )
                for trial in self._measured()
            ]
            files = {
                BEST_FILE: head + yaml.safe_dump(values, sort_keys=False),
                PAGE_FILE: page(trials, best.number, self.base.name),
            }
            for name, text in files.items():
                write_text(self.out / name, text)

    def result(self, data: Path, stopped_by: str) -> dict[str, Any]:
        """Return what the search has found so far."""
        trials, best = self.study.get_trials(deepcopy=False), self.best()
        counts = dict(Counter(trial.state.name.lower() for trial in trials if trial.state.name != "WAITING"))
        summary: dict[str, Any] = {"out": str(self.out), "stopped_by": stopped_by, "trials": counts}
        if best is None:
            return summary
        first = next((trial for trial in self._measured() if not self._changes(trial)), None)
        return {
            **summary,
            "best_trial": best.number,
            "valid_ndcg@10": _value(best),
            "valid_ndcg@10_of_the_recipe": None if first is None else _value(first),
            "changes": self._changes(best),
            "recipe": str(self.out / BEST_FILE),
            "page": str(self.out / PAGE_FILE),
            "next": f"missrec train --data {data} --recipe {self.out / BEST_FILE} --out RUN",
        }

    def _require_same_search(self) -> None:
        """Refuse trials of other data, of another recipe or space: their values would be compared with these."""
        sizes = [self.read.catalogue.n_rows, len(self.read.train.values), len(self.read.valid)]
        varied = {name: [type(values).__name__, *values] for name, values in self.space.items()}
        recipe = {name: dataclasses.asdict(getattr(self.base, name)) for name in SECTIONS}
        made_from = json.loads(json.dumps({"data": sizes, "recipe": recipe, "space": varied}, default=list))
        stored = self.study.user_attrs.get(_MADE_FROM)
        if stored is None:
            self.study.set_user_attr(_MADE_FROM, made_from)
        elif stored != made_from:
            other = ", ".join(_differences(stored, made_from))
            raise ConfigError(
                f"{self.out} holds a search with other {other}",
                "the same data, recipe, --set and --space",
                "give another --out",
            )

    def _try_again_what_was_killed(self) -> None:
        """Give up trials whose process on this machine has ended, and draw their settings once more."""
        from optuna.trial import TrialState

        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            host, process = trial.user_attrs.get(_BY, [None, 0])
            if host == socket.gethostname() and not is_running(process):
                log.info(f"trial {trial.number} was killed; it is tried again")
                self.study.tell(trial.number, state=TrialState.FAIL)
                self.study.enqueue_trial(trial.params)


def _value(trial: optuna.trial.FrozenTrial) -> float:
    """Return the best validation NDCG@10 of a trial's epochs."""
    return max(trial.intermediate_values.values())


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _ended(trial: optuna.trial.FrozenTrial) -> str:
    """Return what ended a trial, as `stopped_by` of a run says it; a failed one without a note was killed."""
    state: str = trial.state.name.lower()
    return trial.user_attrs.get(_ENDED, "killed" if state == "fail" else state)


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return what a search was made from otherwise: settings by their names, such as ``train.epochs 3 -> 5``."""
    other = [name for name in given if given[name] != stored.get(name)]
    settings = changed_settings(stored.get("recipe", {}), given["recipe"])
    return [f"recipe ({', '.join(settings)})" if name == "recipe" and settings else name for name in other]
