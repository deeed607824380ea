"""Count the items and pairs of the score terms again, in more sessions than the training split has.

A run counts the events of the training split, and its weights are tuned with these counts. That split lacks the events
that validation and test ask for: a model that is evaluated must not have counted them, one that is served may. The
weights stay as they were tuned. Its effect: docs/experiments.md.
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
    """Count the pairs and the events of items in these sessions from now on, for all terms that depend on them.

    These are the item-kNN term, the cold-start term (an item with an event is no longer cold) and the rare-item term
    (one with five events is no longer rare). Popularity for sessions without a known item stays that of training.

    Parameters
    ----------
    model : MISSRec
        Its terms are tuned.
    sessions : Sessions
        Every session once, with all events that may be counted.
    tuned : mapping
        What `fit_terms` returned: ``window`` and ``directed`` of ``item_knn`` say which pairs count.

    Raises
    ------
    ConfigError
        The model has no item-kNN term, or it was not tuned.
    DataError
        There are fewer events than the model has counted already.
    """
    item_knn, counting = terms_of(model).item_knn, tuned.get("item_knn", {})
    if item_knn is None or not {"window", "directed"} <= counting.keys():
        raise ConfigError(
            f"a model {'without' if item_knn is None else 'with an untuned'} item-kNN term",
            "counts of co-occurrences and the window in which they were counted",
            "export it without --recount, or train with model.n_neighbours above 0 and validation sessions",
        )
    if len(sessions.values) < (counted := int(item_knn.frequency.sum())):
        raise DataError(
            f"{len(sessions.values):,} events in the data folder",
            f"at least the {counted:,} that training counted",
            "name the folder of the training, or one that was updated since, with --data; or export without --recount",
        )
    item_knn.fit(sessions, int(counting["window"]), directed=bool(counting["directed"]))
    model.terms.refresh()
