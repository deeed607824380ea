"""Build the network of a configuration: which parts, of which size, with which initial weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import DataError
from missrec_t4r.model import release
from missrec_t4r.model.attention import DecoderLayer, EncoderLayer
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder, mean_over_modalities
from missrec_t4r.model.event_features import EventFeatureEncoder, EventFeatures
from missrec_t4r.model.fast import use_shortcuts
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.item_encoder import CandidateRule, ItemDropout, ItemEncoder, MaskedRows
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW

LARGE = 1 << 27
"""Numbers in a table of vectors (512 MiB) from which it stays where it is and is scaled row by row, not copied."""


def build_network(
    config: MISSRecConfig, catalogue: Catalogue, event_features: Sequence[EventColumn] = (), *, shortcuts: bool = True
) -> MISSRec:
    """Build MISSRec without score terms, with initial weights: normal(0, 0.02) and biases 0, or those of the release.

    Parameters
    ----------
    config : MISSRecConfig
    catalogue : Catalogue
    event_features : sequence of EventColumn
        The fitted event features (`missrec_t4r.data.event_features.fit_event_columns`); none by default.
    shortcuts : bool
        False builds the plain modules, the reference of `missrec_t4r.model.fast`.

    Raises
    ------
    DataError
        The catalogue has no modality.
    """
    if not catalogue.modalities:
        raise DataError(
            "the catalogue has no modality",
            "at least one, say text",
            "run `missrec features`, or `missrec etl` with --modality NAME=FILE.npy",
        )
    trained = torch.from_numpy(catalogue.train_count > 0)  # [row]
    if not config.mask_untrained_ids:
        trained = torch.arange(catalogue.n_rows) >= FIRST_ITEM_ROW
    item_encoder = _item_encoder(config, catalogue, trained)
    sizes = (config.d_model, config.n_head, config.d_feedforward, config.dropout, config.layer_norm_eps)
    encoder_layers = [EncoderLayer(*sizes) for _ in range(config.n_encoder_layers if config.has_interests else 0)]
    encoder_norm = nn.LayerNorm(config.d_model, config.layer_norm_eps) if config.has_interests else nn.Identity()
    decoder_layers = [DecoderLayer(*sizes, memory=config.has_interests) for _ in range(config.n_decoder_layers)]
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
            release.PaddedInterests(config.max_sequence_length) if config.orthogonality == "faithful" else None,
        ),
        ContextualEncoder(encoder_layers, encoder_norm, config.attention),
        InterestAwareDecoder(
            decoder_layers,
            config.d_model,
            config.dropout,
            config.layer_norm_eps,
            config.max_sequence_length,
            config.attention,
            config.sequence_fusion,
            release.first_modality if config.contextual_readout == "first" else mean_over_modalities,
        ),
        CandidateFusion(config.candidate_fusion, item_encoder.n_rows),
        EventFeatures(EventFeatureEncoder(event_features, config.event_feature_dropout), config.d_model)
        if event_features
        else None,
        trained if config.mask_untrained_ids else None,
    )
    _initialise(model)
    return use_shortcuts(model) if shortcuts else model


def _item_encoder(config: MISSRecConfig, catalogue: Catalogue, trained: Tensor) -> ItemEncoder:
    vectors = {name: torch.from_numpy(modality.vectors) for name, modality in catalogue.modalities.items()}
    scaled_on_read: set[str] = set()
    if config.feature_scaling == "l2":
        scaled_on_read = {name for name, table in vectors.items() if table.numel() >= LARGE}
        vectors |= {name: F.normalize(vectors[name], dim=-1) for name in vectors if name not in scaled_on_read}
    rules: list[CandidateRule] = [release.padding_candidate] if config.padding_candidate else []
    if config.single_modality == "summed" and len(vectors) == 1:
        rules.append(release.summed_candidates)
    return ItemEncoder(
        vectors,
        torch.from_numpy(np.stack([modality.present for modality in catalogue.modalities.values()])),
        trained if config.item_ids else None,
        config.d_model,
        scaled_on_read=scaled_on_read,
        missing=release.ZeroRows() if config.missing_modality == "zero_row" else MaskedRows(),
        candidate_rules=rules,
        dropout=ItemDropout(config.modality_dropout, config.id_dropout),
        own_candidate_ids=config.candidate_ids == "own",
    )


def _initialise(model: MISSRec) -> None:
    model.apply(_initialise_layer)
    if model.event_features is not None:
        model.event_features.reset_parameters()
    if model.config.missing_modality == "zero_row":
        release.reset_adapters(model)
    if model.config.initialisation == "release":
        release.release_initialisation(model)
    model.item_encoder.copy_candidate_ids()


def _initialise_layer(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
