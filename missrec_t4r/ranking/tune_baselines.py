"""Tune a baseline's settings on the validation split, for each protocol by its own NDCG@10.

Comparison with an untuned baseline overstates a model; so each grid holds the settings that are best on the data sets
that we have measured (docs/experiments.md), and the report has the chosen settings and their validation NDCG@10.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, Scorer, quick_metrics, rank_systems
from missrec_t4r.evaluation.metrics import CRITERION, metrics
from missrec_t4r.progress import track
from missrec_t4r.ranking.baselines import ContentKNN, CoOccurrence, ItemKNN

MOST_SESSIONS: Final = 3000
"""Validation sessions that tuning looks at; a seeded sample where there are more."""
DECAYS: Final = (0.3, 0.5, 0.7, 0.8, 0.9)
POWERS: Final = (0.1, 0.2, 0.3, 0.5)
FOLLOW_WITHIN: Final = (0, 5)
"""Whole sessions, or the five events that follow."""


@dataclass(frozen=True)
class Tuned:
    """The chosen settings for one protocol."""

    scorer: Scorer
    settings: Mapping[str, Any]
    criterion: float
    """Validation NDCG@10 of the chosen settings; optimistic, since they were chosen by it."""

    def describe(self) -> dict[str, Any]:
        """Return plain values for the report."""
        return {**self.settings, f"valid_{CRITERION}": self.criterion}


def tune(trials: Iterable[tuple[Mapping[str, Any], Scorer]], valid: Sessions, n_rows: int) -> dict[str, Tuned]:
    """Return the best trial per protocol, the earlier one where two are equal.

    Parameters
    ----------
    trials : iterable of (settings, scorer)
        The grid.
    valid : Sessions
        Validation rows, history and target.
    """
    best: dict[str, Tuned] = {}
    for settings, scorer in trials:
        _keep_better(best, settings, scorer, quick_metrics(scorer, valid, n_rows))
    return best


def _keep_better(
    best: dict[str, Tuned],
    settings: Mapping[str, Any],
    scorer: Scorer,
    measured: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Put a trial in place of the best one of every protocol under which it is better."""
    for protocol in measured:
        value = measured[protocol][CRITERION] or 0.0
        if protocol not in best or value > best[protocol].criterion:
            best[protocol] = Tuned(scorer, settings, value)


def tuned_item_knn(train: Sessions, valid: Sessions, catalogue: Catalogue) -> dict[str, Tuned]:
    """Tune `ItemKNN`: whole sessions or followers, decay, power, with its diagonal or without (preferred if equal)."""
    histories, targets = sample_sessions(valid, MOST_SESSIONS, seed=0).split_last()
    counted = {within: CoOccurrence.count(train, catalogue.n_rows, within) for within in FOLLOW_WITHIN}
    best: dict[bool, dict[str, Tuned]] = {False: {}, True: {}}
    for within, decay, power in track(list(itertools.product(FOLLOW_WITHIN, DECAYS, POWERS)), "tuning item-kNN"):
        item_knn = ItemKNN(counted[within], decay, power)
        ranked = rank_systems(item_knn.with_and_without_diagonal, histories, targets, catalogue.n_rows)
        for diagonal in best:
            scorer = replace(item_knn, diagonal=diagonal)
            settings = {"follow_within": within, "decay": decay, "power": power, "diagonal": diagonal}
            ranks = ranked[str(diagonal)].ranks if ranked else dict.fromkeys(scorer.protocols, np.empty(0, np.int64))
            _keep_better(best[diagonal], settings, scorer, {name: metrics(own, (10,)) for name, own in ranks.items()})
    better = {name: tuned for name, tuned in best[True].items() if tuned.criterion > best[False][name].criterion}
    return best[False] | better


def tuned_content_knn(valid: Sessions, catalogue: Catalogue) -> dict[str, Tuned] | None:
    """Tune `ContentKNN`: all modalities or one of them, decay. None for a catalogue without modality vectors."""
    fitted = ContentKNN.fit(catalogue)
    names = list(fitted.vectors)
    if not names:
        return None
    choices = [names, *([name] for name in names)] if len(names) > 1 else [names]
    grid = [
        ({"modalities": chosen, "decay": decay}, fitted.using(chosen, decay)) for chosen in choices for decay in DECAYS
    ]
    sample = sample_sessions(valid, MOST_SESSIONS, seed=0)
    return tune(track(grid, "tuning content-kNN"), sample, catalogue.n_rows)


def content_gain(valid: Sessions, catalogue: Catalogue, name: str) -> tuple[float, float]:
    """Return NDCG@10 of content-kNN on validation, seen items excluded, without the modality ``name`` and with it.

    Whether its vectors say more of what is bought together than they blur, before anything is trained.
    """
    fitted, sample = ContentKNN.fit(catalogue), sample_sessions(valid, MOST_SESSIONS, seed=0)
    names = list(fitted.vectors)
    choices = ([other for other in names if other != name], names)
    systems = [quick_metrics(fitted.using(chosen, 0.7), sample, catalogue.n_rows)[EXCLUDED] for chosen in choices]
    without, together = (system[CRITERION] or 0.0 for system in systems)
    return without, together


def sample_sessions(sessions: Sessions, most: int, seed: int) -> Sessions:
    """Return a seeded sample without replacement, in the original order; all where there are no more than ``most``."""
    if len(sessions) <= most:
        return sessions
    chosen = np.random.default_rng(seed).choice(len(sessions), most, replace=False)
    return sessions.take(np.sort(chosen))
