"""MISSRec: a session's interests are encoded, its items decoded in their light, candidates scored by fused modalities.

Paper: Wang et al., ACM MM 2023, arXiv:2308.11175. `MISSRec` receives finished parts; `build_missrec` makes them from a
configuration and a catalogue. Nothing is kept on ``self`` between calls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import DataError
from missrec_t4r.model.attention import MultiHeadAttention
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.event_features import EventFeatureEncoder, EventFeatures, EventValues
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestTokens, InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateEmbeddings, ItemEmbeddings, ItemEncoder
from missrec_t4r.ranking.terms.cold_start import ColdStartTerm, cold_item_mask
from missrec_t4r.ranking.terms.content_knn import ContentKNNTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNTerm
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, UNKNOWN_ROW

_INITIAL_HISTORY_BIAS = -3.0
"""In logits: items of the history start unlikely; quality_probe found an optimum near -4 and slow learning from -2."""


class Encoded(NamedTuple):
    """What encoding a batch of sessions gives."""

    vectors: Tensor
    """[batch, seq, dim], or [batch, dim] for the last position; unit length."""
    memory: Tensor
    """[batch, interest, dim]."""
    interests: InterestTokens


class MISSRec(nn.Module):
    """Multi-modal interest-aware sequence model over one catalogue.

    Parameters
    ----------
    config : MISSRecConfig
        What the parts were built from.
    towers, interests, encoder, decoder, fusion
        The parts.
    prior : ItemKNNTerm, optional
    lookalikes : ContentKNNTerm, optional
        Added to the score when ranking, never in training.
    in_training : Tensor [row], bool, optional
        Candidates of the training softmax; all by default. An item that is never a target would only learn to lose, and
        with it everything that looks like it (ours).
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
        prior: ItemKNNTerm | None = None,
        in_training: Tensor | None = None,
        event_features: EventFeatures | None = None,
        lookalikes: ContentKNNTerm | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.item_encoder, self.interests = item_encoder, interests
        self.encoder, self.decoder, self.fusion = encoder, decoder, fusion
        self.item_knn, self.content_knn, self.event_features = prior, lookalikes, event_features
        start = _INITIAL_HISTORY_BIAS * config.temperature
        self.history_bias = nn.Parameter(torch.tensor(start)) if config.history_bias else None
        masks = item_encoder.masks(dropout=False)
        usable = masks.mask.any(0) if masks.id_mask is None else masks.mask.any(0) | masks.id_mask
        usable[:FIRST_ITEM_ROW] = False
        self.register_buffer("recommendable", usable, persistent=False)
        self.register_buffer("excluded", torch.nonzero(~usable).flatten(), persistent=False)
        hidden = ~usable if in_training is None else ~(usable & in_training)
        hidden[PADDING_ROW] = not config.padding_candidate
        self.register_buffer("untrained", torch.nonzero(hidden).flatten(), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.find_cold_items())  # type: ignore[no-untyped-call]  # torch has no types here

    def forward(self, item_ids: Tensor, event_features: EventValues | None = None) -> Tensor:
        """Return the session vectors [batch, dim], unit length.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
            Catalogue rows, padded with 0 on the right; at most ``max_sequence_length`` of them.
        event_features : mapping of str to Tensor [batch, seq] or [batch, seq, size], optional
            Side features by column; what is missing counts as absent.
        """
        return self.encode(item_ids, last_only=True, event_features=event_features).vectors

    def encode_positions(self, item_ids: Tensor, event_features: EventValues | None = None) -> Tensor:
        """Return unit vectors [batch, seq, dim]; with causal attention position t saw only items up to t."""
        return self.encode(item_ids, event_features=event_features).vectors

    def encode(
        self,
        item_ids: Tensor,
        *,
        catalogue: ItemEmbeddings | None = None,
        last_only: bool = False,
        event_features: EventValues | Tensor | None = None,
        items: ItemEmbeddings | None = None,
        empty_places: int = 0,
    ) -> Encoded:
        """Encode sessions and return all that the objectives need.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int64
        catalogue : ItemEmbeddings of shape [row], optional
            This step's catalogue tokens; without them only the session's items are computed.
        last_only : bool
            Only the vector of the last real item.
        event_features : mapping of str to Tensor, or Tensor [batch, seq, dim], optional
            Side features by column, or embedded already (the T4R door does it among its inputs).
        items : ItemEmbeddings of shape [batch, seq], optional
            The sessions' own tokens, where they differ from the catalogue's (word drop in pre-training).
        empty_places : int
            Places by which every set of interests is longer than the largest needs (``places`` of the regulariser).
        """
        if self.event_features is not None and not isinstance(event_features, Tensor):
            event_features = self.event_features(event_features or {}, item_ids)
        item_mask = item_ids > UNKNOWN_ROW
        if items is None:
            items = self.item_encoder(item_ids) if catalogue is None else catalogue.take(item_ids)
        interests = self.interests(item_ids, empty_places)
        memory = self.encoder(interests)
        added = event_features if isinstance(event_features, Tensor) else None
        hidden = self.decoder(items, item_mask, memory, interests, last_only=last_only, event_features=added)
        vectors = F.normalize(hidden.squeeze(1) if last_only else hidden, dim=-1)
        return Encoded(vectors, memory, interests)

    def candidates(self) -> CandidateEmbeddings:
        """Return the catalogue's unit-length tokens; call once per step, or once per catalogue version."""
        return self.item_encoder.candidates()

    def score(self, session: Tensor, candidates: CandidateEmbeddings, item_ids: Tensor) -> Tensor:
        """Return scores [batch, catalogue] before the temperature, -inf where a row cannot be recommended.

        Parameters
        ----------
        session : Tensor [batch, dim]
            Unit-length session vectors.
        candidates : CandidateEmbeddings
        item_ids : Tensor [batch, seq], int64
            The items each vector has seen (0 for none): they get the learned history bias and call their neighbours.
        """
        scores = self.add_history(self.fusion(session, candidates), item_ids)
        return scores.index_fill_(1, self.untrained if self.training else self.excluded, -torch.inf)

    def add_history(self, scores: Tensor, item_ids: Tensor) -> Tensor:
        """Add to scores [batch, catalogue], in place where it can, what the items of the history say of themselves and
        of their neighbours.
        """
        if self.history_bias is not None:
            scores.scatter_add_(1, item_ids, self.history_bias * first_occurrences(item_ids).to(scores.dtype))
        if self.training:
            return scores
        neighbours = self.item_knn(item_ids) if self.item_knn is not None and self.item_knn.active else None
        if neighbours is not None:
            scores = scores + neighbours
        if self.content_knn is not None and self.content_knn.active:
            scores = scores + self.content_knn(item_ids)
        newcomers = None if self.item_knn is None else self.item_knn.cold_start
        if newcomers is not None and newcomers.active:
            lent = torch.zeros_like(scores) if neighbours is None else neighbours
            scores = scores.index_add(1, newcomers.rows, newcomers(item_ids, lent, self.item_encoder).to(scores.dtype))
        return scores

    def find_cold_items(self) -> None:
        """Find the items without events and whom they resemble; after the priors were weighed and after loading."""
        if self.item_knn is not None and self.item_knn.cold_start is not None:
            new, settings = cold_item_mask(self.item_knn.frequency), self.item_knn.cold_start.settings
            self.item_knn.cold_start.find(self.item_encoder, new & settings.any(), ~new)

    @torch.no_grad()
    def discover_interests(self, seed: int) -> None:
        """Cluster the catalogue's tokens under the current adapters."""
        was_training = self.training
        self.eval()
        self.interests.discover(self.item_encoder.catalogue(), seed)
        self.train(was_training)


def first_occurrences(item_ids: Tensor) -> Tensor:
    """Return [batch, seq], True where an item stands in its row for the first time; an item counts once in a session.

    Examples
    --------
    >>> first_occurrences(torch.tensor([[5, 7, 5, 0, 0]])).tolist()
    [[True, True, False, True, False]]
    """
    ordered, order = item_ids.sort(dim=1, stable=True)
    first = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0), value=True)
    return torch.empty_like(first).scatter_(1, order, first)


def build_missrec(config: MISSRecConfig, catalogue: Catalogue, event_features: Sequence[EventColumn] = ()) -> MISSRec:
    """Build the model for a catalogue, initialised as ``config.initialisation`` says: normal(0, 0.02), biases 0.

    With `zero_row` the adapters keep torch's initialisation, as in the authors' release: a missing modality's token
    is the adapter's bias, and a bias of zero has no direction (normalising it sends gradients of 1e12).

    Parameters
    ----------
    config : MISSRecConfig
    catalogue : Catalogue
    event_features : sequence of EventColumn
        The measured side features (`missrec_t4r.data.event_features.fit_event_columns`); none by default.

    Raises
    ------
    DataError
        The catalogue has neither modality vectors nor, in this configuration, item IDs.
    """
    if not catalogue.modalities:
        raise DataError(
            "the catalogue has no modality", "at least one, say text", "run `missrec features` or pass --modality"
        )
    trained = torch.from_numpy(catalogue.train_count > 0)
    if not config.mask_untrained_ids:
        trained = torch.arange(catalogue.n_rows) >= FIRST_ITEM_ROW
    item_encoder = ItemEncoder(
        {name: torch.from_numpy(modality.vectors) for name, modality in catalogue.modalities.items()},
        torch.from_numpy(np.stack([modality.present for modality in catalogue.modalities.values()])),
        trained if config.item_ids else None,
        config.d_model,
        config.missing_modality,
        config.feature_scaling,
        config.single_modality,
        config.padding_candidate,
        config.modality_dropout,
        config.id_dropout,
    )
    layer = (config.d_model, config.n_head, config.d_feedforward, config.dropout, config.layer_norm_eps)
    newcomers = (
        ColdStartTerm([part.width for part in catalogue.modalities.values()]) if config.cold_start_exposure else None
    )
    n_interests = InterestVocabulary.size(config.interest_ratio, item_encoder.masks(dropout=False).mask)
    model = MISSRec(
        config,
        item_encoder,
        InterestVocabulary(
            n_interests,
            len(item_encoder.names),
            item_encoder.n_rows,
            config.d_model,
            config.interest_algorithm,
            config.max_sequence_length if config.orthogonality == "faithful" else None,
        ),
        ContextualEncoder(config.n_encoder_layers, *layer, config.attention),
        InterestAwareDecoder(
            config.n_decoder_layers,
            *layer,
            config.max_sequence_length,
            config.attention,
            config.sequence_fusion,
            config.contextual_readout,
        ),
        CandidateFusion(config.candidate_fusion, item_encoder.n_rows),
        ItemKNNTerm(item_encoder.n_rows, min(config.n_neighbours, item_encoder.n_rows), newcomers)
        if config.n_neighbours
        else None,
        trained if config.mask_untrained_ids else None,
        EventFeatures(EventFeatureEncoder(event_features, config.event_feature_dropout), config.d_model)
        if event_features
        else None,
        ContentKNNTerm(item_encoder.n_rows, min(config.n_similar_items, item_encoder.n_rows))
        if config.n_similar_items
        else None,
    )
    model.apply(_initialise)
    if model.event_features is not None:
        model.event_features.reset_parameters()
    if config.missing_modality == "zero_row":
        for name in item_encoder.names:
            cast(nn.Linear, item_encoder.adapters[name]).reset_parameters()
    if config.initialisation == "release":
        _initialise_as_released(model)
    return model


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _initialise_as_released(model: MISSRec) -> None:
    """Undo what the authors' initialisation does not reach: attention projections and adapters."""
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            bound = math.sqrt(6 / (4 * module.query.in_features))  # Xavier of the three projections as one matrix
            for projection in (module.query, module.key, module.value):
                nn.init.uniform_(projection.weight, -bound, bound)
    for name in model.item_encoder.names:
        cast(nn.Linear, model.item_encoder.adapters[name]).reset_parameters()
