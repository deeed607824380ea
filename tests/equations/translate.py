"""Read a torch model's weights and hand them to the NumPy reference; the only file that knows both."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.model import attention as code
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.decoder import InterestAwareDecoder
from missrec_t4r.model.missrec import MISSRec
from tests.equations import reference as ref


def array(tensor: torch.Tensor) -> ref.Array:
    """Return the numbers in float64."""
    return np.asarray(tensor.detach().numpy(), np.float64)


def linear(module: nn.Module) -> ref.Linear:
    """Translate a linear layer."""
    assert isinstance(module, nn.Linear)
    return ref.Linear(array(module.weight), array(module.bias))


def norm(module: nn.LayerNorm) -> ref.Norm:
    """Translate a LayerNorm."""
    return ref.Norm(array(module.weight), array(module.bias), module.eps)


def attention(module: code.MultiHeadAttention) -> ref.Attention:
    """Translate multi-head attention."""
    projections = (linear(part) for part in (module.query, module.key, module.value, module.output))
    return ref.Attention(*projections, module.n_head)


def feed_forward(module: code.FeedForward) -> ref.FeedForward:
    """Translate a feed-forward block: its first and its last layer are linear."""
    return ref.FeedForward(linear(module[0]), linear(module[-1]))


def encoder_layer(module: code.EncoderLayer) -> ref.EncoderLayer:
    """Translate one layer of the contextual encoder."""
    return ref.EncoderLayer(
        attention(module.self_attention),
        norm(module.norm_attention),
        feed_forward(module.feedforward),
        norm(module.norm_feedforward),
    )


def decoder_layer(module: code.DecoderLayer) -> ref.DecoderLayer:
    """Translate one layer of the interest-aware decoder."""
    return ref.DecoderLayer(
        attention(module.self_attention),
        norm(module.norm_self),
        None if module.cross_attention is None else attention(module.cross_attention),
        None if module.norm_cross is None else norm(module.norm_cross),
        feed_forward(module.feedforward),
        norm(module.norm_feedforward),
    )


def encoder(module: ContextualEncoder) -> ref.Encoder:
    """Translate the contextual encoder."""
    return ref.Encoder([encoder_layer(layer) for layer in module.layers], norm(module.norm))  # type: ignore[arg-type]


def decoder(module: InterestAwareDecoder) -> ref.Decoder:
    """Translate the interest-aware decoder."""
    layers = [decoder_layer(layer) for layer in module.layers]  # type: ignore[arg-type]
    return ref.Decoder(array(module.positions.weight), norm(module.norm_input), layers, norm(module.norm))


def items(model: MISSRec, shop: Catalogue) -> ref.Items:
    """Compute the reference's item tokens from the catalogue itself, not from the model's copy of it."""
    rows = np.arange(shop.n_rows)
    trained = shop.train_count > 0 if model.config.mask_untrained_ids else rows >= ref.FIRST_ITEM
    embedding = model.item_encoder.id_embedding
    return ref.item_tokens(
        [linear(model.item_encoder.adapters[name]) for name in shop.modalities],
        [modality.vectors.astype(np.float64) for modality in shop.modalities.values()],
        [modality.present for modality in shop.modalities.values()],
        None if embedding is None else array(embedding.weight),
        trained,
        zero_row=model.config.missing_modality == "zero_row",
        scale_to_unit=model.config.feature_scaling == "l2",
    )


def candidates(model: MISSRec, shop: Catalogue) -> ref.Items:
    """Compute the tokens of the items as candidates: those of sessions, but for IDs of their own."""
    own = model.item_encoder.candidate_id_embedding
    return items(model, shop) if own is None else items(model, shop)._replace(ids=array(own.weight))


def whole(model: MISSRec, shop: Catalogue) -> ref.Model:
    """Translate everything that a session vector depends on."""
    return ref.Model(
        items(model, shop),
        array(model.interests.centroids),
        model.interests.assignment.numpy(),
        encoder(model.encoder) if model.config.has_interests else None,
        decoder(model.decoder),
        causal=model.config.attention == "causal",
        contextual=model.config.sequence_fusion == "contextual",
        first_modality=model.config.contextual_readout == "first",
    )


def phi(model: MISSRec) -> ref.Array | None:
    """Return the fusion's sharpness as the reference takes it."""
    return None if model.fusion.phi is None else array(model.fusion.phi)
