"""Build the network of a configuration: which parts, of which size, with which initial weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import nn

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import DataError
from missrec_t4r.model.attention import MultiHeadAttention
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.event_features import EventFeatureEncoder, EventFeatures
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.item_encoder import ItemEncoder
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW


def build_network(config: MISSRecConfig, catalogue: Catalogue, event_features: Sequence[EventColumn] = ()) -> MISSRec:
    """Build MISSRec without score terms, initialised as ``config.initialisation`` says: normal(0, 0.02), biases 0.

    With `zero_row` the adapters keep torch's initialisation, as in the authors' release: a missing modality's token
    is the adapter's bias, and a bias of zero has no direction (normalising it sends gradients of 1e12).

    Parameters
    ----------
    config : MISSRecConfig
    catalogue : Catalogue
    event_features : sequence of EventColumn
        The fitted event features (`missrec_t4r.data.event_features.fit_event_columns`); none by default.

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
        EventFeatures(EventFeatureEncoder(event_features, config.event_feature_dropout), config.d_model)
        if event_features
        else None,
        trained if config.mask_untrained_ids else None,
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
