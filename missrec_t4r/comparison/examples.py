"""Example sessions: those on which two systems differ most, with the titles of the items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.titles import title_column
from missrec_t4r.evaluation.metrics import metric_values
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, UNKNOWN_ROW

EACH: Final = 5
"""Examples for each of the two systems."""
SHOWN: Final = 5
"""Last items of a session, and first items of a list."""


def examples(
    catalogue: Catalogue,
    histories: Sessions,
    targets: Ints,
    systems: Mapping[str, tuple[Ints, Ints]],
    *,
    users: Sessions,
) -> list[dict[str, Any]]:
    """Return the sessions with the largest differences in NDCG@10, first those that the second system does better on.

    Parameters
    ----------
    catalogue, histories, targets
        The sessions that were compared.
    systems : mapping of str to (ranks [session], lists [session, place])
        The current system and the candidate.
    users : Sessions
        The same sessions with their users.
    """
    (_, (first, _)), (_, (second, _)) = systems.items()
    gain = metric_values(second, [10])[:, 1] - metric_values(first, [10])[:, 1]
    order = np.argsort(-gain, kind="stable")
    chosen = [index for index in order[:EACH] if gain[index] > 0]
    chosen += [index for index in order[::-1][:EACH] if gain[index] < 0]
    shown = described(catalogue, histories, targets, systems, chosen, users=users)
    return [
        {**example, "better": list(systems)[int(gain[index] > 0)]} for example, index in zip(shown, chosen, strict=True)
    ]


def outcomes(current: Ints, candidate: Ints) -> dict[str, int]:
    """Return how many sessions each of two systems does better on by NDCG@10, and how many neither finds a hit in.

    Parameters
    ----------
    current, candidate : ndarray [session] or [session, seed]
        Ranks; those of several seeds are averaged as NDCG@10.

    Examples
    --------
    >>> outcomes(np.array([1, 2, 3, 50]), np.array([2, 1, 3, 11]))
    {'candidate_better': 1, 'current_better': 1, 'equal': 2, 'neither_found': 1}
    """
    first, second = (metric_values(ranks, [10])[:, 1] for ranks in (current, candidate))
    return {
        "candidate_better": int((second > first).sum()),
        "current_better": int((second < first).sum()),
        "equal": int((second == first).sum()),
        "neither_found": int(((first == 0) & (second == 0)).sum()),
    }


def described(
    catalogue: Catalogue,
    histories: Sessions,
    targets: Ints,
    systems: Mapping[str, tuple[Ints, Ints]],
    chosen: Iterable[int],
    *,
    users: Sessions,
) -> list[dict[str, Any]]:
    """Return some sessions as text: user, last items, the item that came next, and the lists of the systems.

    Titles, and beside them ids: ``history_ids``, ``target_id``, ``id``.

    Parameters
    ----------
    catalogue, histories, targets, users
        As in `examples`.
    systems : mapping of str to (ranks [session], lists [session, place])
    chosen : iterable of int
        Indices of the sessions.
    """
    title = _Items(catalogue)
    return [
        {
            "user": None if users.users is None else str(users.users[int(index)].as_py()),
            "history": [title(row) for row in histories[index][-SHOWN:]],
            "history_ids": [title.id(row) for row in histories[index][-SHOWN:]],
            "earlier": max(0, len(histories[index]) - SHOWN),
            "target": title(targets[index]),
            "target_id": title.id(targets[index]),
            "systems": {
                name: {
                    "rank": int(ranks[index]) if ranks[index] <= lists.shape[1] else None,
                    "list": [
                        {"title": title(row), "id": title.id(row), "hit": bool(row == targets[index])}
                        for row in lists[index][:SHOWN]
                        if row >= UNKNOWN_ROW
                    ],
                }
                for name, (ranks, lists) in systems.items()
            },
        }
        for index in chosen
    ]


class _Items:
    """Titles of rows, the id where there is none; ids as text."""

    def __init__(self, catalogue: Catalogue) -> None:
        encoders = [modality.encoder for modality in catalogue.modalities.values()]
        column = title_column(catalogue.items.column_names, encoders)
        self.column, self.ids = catalogue.items[column or ITEM_ID], catalogue.items[ITEM_ID]

    def __call__(self, row: Any) -> str:
        index = int(row) - FIRST_ITEM_ROW
        if index < 0:
            return "an item that the catalogue lacks"
        return str(self.column[index].as_py() or self.ids[index].as_py())

    def id(self, row: Any) -> str | None:
        """Return the id as text; None for a row that is not an item."""
        index = int(row) - FIRST_ITEM_ROW
        return None if index < 0 else str(self.ids[index].as_py())


def shown_ids(shown: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the ids in the examples, targets first, then histories, then lists."""
    shown = list(shown)
    ids = [example["target_id"] for example in shown]
    ids += [item for example in shown for item in example["history_ids"]]
    ids += [item["id"] for example in shown for system in example["systems"].values() for item in system["list"]]
    return [item for item in dict.fromkeys(ids) if item is not None]
