"""Rare-item term: what ranking adds to items with few events, by how many they have (E21; ours).

The ID embedding and the item-kNN term know little about an item with fewer than five training events, so that it loses
to well-known items even where its content fits the session. The weight of content and an offset depend on the number of
events here, and are chosen on validation (`missrec_t4r.ranking.tune_rare_items`). Other items keep their scores to the
bit. Its effect: docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.evaluation.slices import RARE_BELOW
from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.ranking.terms.item_content import ItemContentTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.schema import FIRST_ITEM_ROW

GROUP_OF_COUNT: Final = (0, 1, 1, 2, 2)
"""Number of training events -> group that has its own settings: cold, one or two, three or four events."""
N_GROUPS: Final = max(GROUP_OF_COUNT) + 1
_MOST_ROWS = 1 << 14
"""Rare items beyond which the term is off."""


class RareItemTerm(ItemContentTerm):
    """Score of the items with fewer than five training events, on top of all other terms.

    ``term(s, j) = content[g(j)] * cos(q(s), g[j]) + offset[g(j)]``

    ``g(j)`` is the group of item j by its number of events, ``g[j]`` its raw vectors around their centre, ``q(s) =
    sum_i .7**age(i) unit(g[i])`` over the session; the cosine is the mean over the modalities that validation chose and
    that session and item have. An item of the session gets nothing.

    Parameters
    ----------
    item_encoder : ItemEncoder
        Of the network: has the modality vectors.
    item_knn : ItemKNNTerm
        Has the event counts. Both stay the parts of others; no weight of theirs is saved with this term.
    cold : bool
        False leaves cold items alone, where the cold-start term scores them.
    itself : bool
        An item of the session is treated as any other: for the protocol ``kept_strict``.
    """

    settings: Tensor
    groups: Tensor
    column: Tensor
    factors: Tensor
    offsets: Tensor

    def __init__(
        self, item_encoder: ItemEncoder, item_knn: ItemKNNTerm, *, cold: bool = True, itself: bool = False
    ) -> None:
        super().__init__(item_encoder, item_knn, save_centres=True)
        self.cold, self.itself = cold, itself
        self.register_buffer("settings", torch.zeros(2, N_GROUPS))
        for name in self.names:
            self.register_buffer(f"used_{name}", torch.ones(1))
        for name in ("groups", "column"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        for name in ("factors", "offsets"):
            self.register_buffer(name, torch.zeros(0), persistent=False)

    @torch.no_grad()
    def fit(self) -> None:
        """Compute the centres of the modality vectors over the items with events.

        They are saved with the term: items that are added or changed later change no score of another item.
        """
        known = self.item_knn.frequency > 0
        for index, name in enumerate(self.names):
            table, here = self.table(index), torch.nonzero(known & self.item_encoder.presence[index]).flatten()
            if len(here):
                centre = torch.stack([table[part].double().sum(0) for part in here.split(1 << 16)]).sum(0) / len(here)
                self.get_buffer(f"centre_{name}").copy_(centre)

    @torch.no_grad()
    def choose(self, settings: Tensor, modalities: Sequence[float]) -> None:
        """Use these settings [2, group] (content weights, offsets) and modalities [modality], 1 or 0, from now on."""
        self.settings.copy_(settings)
        self.compare_by(modalities)
        self.refresh()

    @torch.no_grad()
    def compare_by(self, modalities: Sequence[float]) -> None:
        """Use these modalities, 1 or 0 for each, in the cosine from now on."""
        for name, used in zip(self.names, modalities, strict=True):
            self.get_buffer(f"used_{name}").fill_(used)
        self._read_used()

    def switch_off(self) -> None:
        """Add nothing from now on."""
        self.choose(torch.zeros(2, N_GROUPS), [1.0] * len(self.names))

    def refresh(self) -> None:
        """Find the rare items; after tuning and after loading weights."""
        self.find(self.rare() if bool(self.settings.any()) else self.rare()[:0])

    def rare(self) -> Tensor:
        """Return the rows of the rare items that have content; none where they are too many."""
        frequency = self.item_knn.frequency
        few = (frequency < RARE_BELOW) & frequency.any() & self.item_encoder.presence.any(0)
        few[:FIRST_ITEM_ROW] = False
        rows = torch.nonzero(few if self.cold else few & (frequency > 0)).flatten()
        return rows if len(rows) <= _MOST_ROWS else rows[:0]

    @torch.no_grad()
    def find(self, rows: Tensor) -> None:
        """Take ``rows`` [item], ascending, as the rare items and compute what their scores need."""
        self._read_used()
        self.score_rows(rows, range(len(self.names)))
        self.column = rows.new_full((self.item_encoder.n_rows,), len(rows))
        self.column[rows] = torch.arange(len(rows), device=rows.device)
        counts = self.item_knn.frequency[rows].long().clamp_max(len(GROUP_OF_COUNT) - 1)
        self.groups = torch.tensor(GROUP_OF_COUNT, device=rows.device)[counts]
        self.factors, self.offsets = self.settings[:, self.groups]

    def add_to(self, scores: Tensor, item_ids: Tensor, earlier: dict[str, Tensor]) -> Tensor:
        """Return scores plus term: the columns of the rare items alone change."""
        added = self.likeness_to(item_ids).mul_(self.factors).add_(self.offsets)  # [batch, rare]
        return scores.index_add_(1, self.rows, self.without_seen(added, item_ids).to(scores.dtype))

    def without_seen(self, added: Tensor, item_ids: Tensor) -> Tensor:
        """Return ``added`` [batch, rare] with 0 for the items of the session, unless they are treated as any other."""
        if self.itself:
            return added
        padded = F.pad(added, (0, 1)).scatter_(1, self.column[item_ids], 0.0)  # all other items: the last column
        return padded[:, :-1]

    def _read_used(self) -> None:
        self._used = [index for index, name in enumerate(self.names) if self.get_buffer(f"used_{name}").any()]
