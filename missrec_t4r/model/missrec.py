"""MISSRec: multi-modal interest-aware sequence representation for recommendation (Wang et al., ACM MM 2023).

    items      x[t,m] = adapter_m(f[t,m]), the modality embeddings of the session's items          E1, E2
    interests  the distinct clusters of these embeddings, each by its centroid                     E3, E4
    memory     contextual encoder: self-attention over the interests                               E5, E6
    session    interest-aware decoder: the items attend to each other and to the memory            E8, E9, E10
    score      dynamic candidate fusion of the cosines with a candidate's modalities and ID        E11

Paper: arXiv:2308.11175. The numbers are those of docs/equations.md, which has every equation with our departures.
`MISSRec` receives finished parts; `missrec_t4r.model.build.build_network` makes them from a configuration. Nothing is
kept on ``self`` between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.io.weight_names import rename_weights
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.event_features import EventFeatures, EventValues
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateEmbeddings, ItemEmbeddings, ItemEncoder
from missrec_t4r.model.score_terms import ScoreTerms
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, UNKNOWN_ROW


class Encoded(NamedTuple):
    """What encoding a batch of sessions gives."""

    vectors: Tensor
    """[batch, seq, dim], or [batch, dim] for the last position; unit length."""
    memory: Tensor
    """[batch, interest, dim]: output of the contextual encoder."""
    interests: InterestTokens


class MISSRec(nn.Module):
    """Multi-modal interest-aware sequence model over one catalogue.

    Parameters
    ----------
    config : MISSRecConfig
        What the parts were built from.
    item_encoder, interests, encoder, decoder, fusion
        The parts of the paper.
    event_features : EventFeatures, optional
        Embeds what is known of the events besides their items (ours).
    in_training : Tensor [row], bool, optional
        Classes of the training softmax; all recommendable items by default. An item that is never a target would only
        be trained to score low, and with it everything that resembles it (ours).

    Attributes
    ----------
    terms : ScoreTerms
        What is added to the network's score; empty as published (`missrec_t4r.ranking.hybrid`).
    """

    recommendable: Tensor
    excluded: Tensor
    untrained: Tensor

    def __init__(
        self,
        config: MISSRecConfig,
        item_encoder: ItemEncoder,
        interests: InterestVocabulary,
        encoder: ContextualEncoder,
        decoder: InterestAwareDecoder,
        fusion: CandidateFusion,
        event_features: EventFeatures | None = None,
        in_training: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.item_encoder, self.interests = item_encoder, interests
        self.encoder, self.decoder, self.fusion = encoder, decoder, fusion
        self.event_features = event_features
        self.terms = ScoreTerms()
        masks = item_encoder.masks(dropout=False)
        usable = masks.mask.any(0) if masks.id_mask is None else masks.mask.any(0) | masks.id_mask  # [row]
        usable[:FIRST_ITEM_ROW] = False
        self.register_buffer("recommendable", usable, persistent=False)
        self.register_buffer("excluded", torch.nonzero(~usable).flatten(), persistent=False)
        no_class = ~usable if in_training is None else ~(usable & in_training)
        no_class[PADDING_ROW] = not config.padding_candidate
        self.register_buffer("untrained", torch.nonzero(no_class).flatten(), persistent=False)
        self.register_load_state_dict_pre_hook(rename_weights)  # type: ignore[no-untyped-call]  # torch has no types here

    @property
    def event_columns(self) -> tuple[EventColumn, ...]:
        """Event features that the model was built with, with their scaling; empty for a model without any."""
        return () if self.event_features is None else self.event_features.columns

    def forward(self, item_ids: Tensor, event_features: EventValues | None = None) -> Tensor:
        """Return the session vectors [batch, dim], unit length.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
            Rows of the catalogue, padded with 0 on the right; at most ``max_sequence_length`` of them.
        event_features : mapping of str to Tensor [batch, seq] or [batch, seq, size], optional
            Event features by column; what is missing counts as absent.
        """
        return self.encode(item_ids, last_only=True, event_features=event_features).vectors

    def encode(
        self,
        item_ids: Tensor,
        *,
        items: ItemEmbeddings | None = None,
        last_only: bool = False,
        event_features: EventValues | Tensor | None = None,
        empty_slots: int = 0,
        n_interests: int | None = None,
    ) -> Encoded:
        """Encode sessions and return all that the objectives need.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
        items : ItemEmbeddings of shape [batch, seq], optional
            Embeddings of the sessions' items where they are at hand, or differ from the catalogue's (word drop).
        last_only : bool
            Only the vector of the last real item.
        event_features : mapping of str to Tensor, or Tensor [batch, seq, dim], optional
            Event features by column, or embedded already (Transformers4Rec embeds them among its inputs).
        empty_slots : int
            Number of masked slots by which every interest sequence is longer than the batch needs (for the regulariser
            of the release).
        n_interests : int, optional
            Slots of the interests where they were counted before (`InterestVocabulary.width`): the host then does not
            wait for a GPU.
        """
        item_mask = item_ids > UNKNOWN_ROW
        items = self.item_encoder(item_ids) if items is None else items  # [modality, batch, seq, dim]
        interests = self.interests(item_ids, empty_slots, n_interests)  # [batch, interest, dim]
        memory = self.encoder(interests)  # [batch, interest, dim]
        added = self._embedded(event_features, item_ids)  # [batch, seq, dim]
        hidden = self.decoder(items, item_mask, memory, interests, last_only=last_only, event_features=added)
        vectors = F.normalize(hidden.squeeze(1) if last_only else hidden, dim=-1)  # [batch, dim] or [batch, seq, dim]
        return Encoded(vectors, memory, interests)

    def _embedded(self, event_features: EventValues | Tensor | None, item_ids: Tensor) -> Tensor | None:
        if isinstance(event_features, Tensor):
            return event_features
        return None if self.event_features is None else self.event_features(event_features or {}, item_ids)

    def candidates(self) -> CandidateEmbeddings:
        """Return the catalogue's unit-length embeddings; call once per step, or once per catalogue version."""
        return self.item_encoder.candidates()

    def score(self, session: Tensor, candidates: CandidateEmbeddings, item_ids: Tensor) -> Tensor:
        """Return scores [batch, catalogue] before the temperature, -inf where a row cannot be recommended.

        Parameters
        ----------
        session : Tensor [batch, dim]
            Unit-length session vectors.
        candidates : CandidateEmbeddings
        item_ids : Tensor [batch, seq], int64
            The items that each vector depends on (0 for none), read by the score terms.
        """
        scores = self.terms(self.fusion(session, candidates), item_ids)
        return scores.index_fill_(1, self.untrained if self.training else self.excluded, -torch.inf)

    def discover_interests(self, seed: int) -> None:
        """Cluster the catalogue's modality embeddings under the current adapters."""
        with evaluating(self):
            self.interests.discover(self.item_encoder.catalogue(), seed)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Use a model in evaluation mode and without gradients; it keeps its mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
