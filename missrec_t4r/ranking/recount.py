"""Count the items and pairs of the score terms again, in more sessions than the training split has.

Weights are tuned with the counts of the training split, which a model keeps. The training split lacks the last events
of every user, those that validation and test ask for: a model that is evaluated must not have counted them, one that is
served may. The weights stay as they were tuned. Its effect: docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of


@torch.no_grad()
def recount(model: MISSRec, sessions: Sessions, tuned: Mapping[str, Any]) -> None:
    """Count co-occurrences and events of items in these sessions instead, for all terms that depend on them.

    Parameters
    ----------
    model : MISSRec
        Its terms are tuned.
    sessions : Sessions
        Every user once, with all events that may be counted.
    tuned : mapping
        What `fit_terms` returned: ``window`` and ``directed`` say which pairs count.

    Raises
    ------
    ConfigError
        The model has no item-kNN term, or it was not tuned.
    DataError
        There are fewer events than the model has counted already.
    """
    item_knn = terms_of(model).item_knn
    if item_knn is None or not {"window", "directed"} <= tuned.keys():
        raise ConfigError(
            f"a model {'without' if item_knn is None else 'with an untuned'} item-kNN term",
            "counts of co-occurrences and the window in which they were counted",
            "export it without --recount, or train with model.n_neighbours above 0 and validation sessions",
        )
    if len(sessions.values) < (counted := int(item_knn.frequency.sum())):
        raise DataError(
            f"{len(sessions.values):,} events in sessions of which each user has one",
            f"at least the {counted:,} that training counted",
            "export without --recount: the data folder has lost events, or has several rows per user",
        )
    item_knn.fit(sessions, int(tuned["window"]), directed=bool(tuned["directed"]))
    model.terms.refresh()
