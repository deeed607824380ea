"""Traced encoder: the session encoder as a TorchScript graph, traced when a server starts and run without Python.

A trace is used only if it gives the model's vectors on sessions of several shapes; otherwise the model itself encodes.
Nothing is stored: every start traces anew, from verified weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.fast import use_shortcuts
from missrec_t4r.model.fast.contextual_encoder import FastContextualEncoder
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, UNKNOWN_ROW

Encode = Callable[[Tensor], Tensor]

_TRACED = (2, 7)
_CHECKED = ((1, 1), (1, 2), (1, 9), (3, 1), (5, 12))
"""Batch and length of the sessions that are traced, and of those on which a trace is compared with the model."""
_TOLERANCE = 1e-5
PROJECTIONS_IN_MEMORY = 1 << 26
"""Projections of interests of at most this many numbers (256 MiB) are kept."""


class SessionEncoder(nn.Module):
    """Rows [batch, seq] to unit session vectors [batch, dim]; zero for a session without any item.

    Parameters
    ----------
    model : MISSRec
    tokens : ItemEmbeddings of shape [row], optional
        The catalogue's embeddings; without them those of the session's items are computed.
    all_slots : bool
        Keep a slot of interests for every item and modality, so that the work depends on the shape alone.
    """

    def __init__(self, model: MISSRec, tokens: ItemEmbeddings | None, *, all_slots: bool = False) -> None:
        super().__init__()
        self.model, self.all_slots = model, all_slots
        self.projections: Tensor | None = None
        fits = 3 * model.interests.centroids.numel() <= PROJECTIONS_IN_MEMORY
        if fits and model.event_features is None and len(model.encoder.layers):
            self.projections = _fast(model.encoder).project(model.interests.centroids).detach()
        self.tokens = None if tokens is None else _constant(tokens)

    def forward(self, session: Tensor) -> Tensor:
        """Return the vectors of sessions padded with 0 on the right."""
        if self.projections is None:
            items = None if self.tokens is None else self.tokens.take(session)
            slots = self._slots(session)
            vectors = self.model.encode(session, items=items, last_only=True, n_interests=slots).vectors
        else:
            vectors = self._encode(session, self.projections)
        return vectors * (session > PADDING_ROW).any(1, keepdim=True)

    def _encode(self, session: Tensor, projections: Tensor) -> Tensor:
        """Return the vectors of `MISSRec.encode`, with the projections of the interests looked up."""
        model = self.model
        items = model.item_encoder(session) if self.tokens is None else self.tokens.take(session)
        interests = model.interests(session, n_slots=self._slots(session))
        memory = _fast(model.encoder)(interests, projections)
        hidden = model.decoder(items, session > UNKNOWN_ROW, memory, interests, last_only=True)
        return F.normalize(hidden.squeeze(1), dim=-1)

    def _slots(self, session: Tensor) -> int | None:
        return self.model.interests.most_slots(session) if self.all_slots else None


@torch.inference_mode()
def trace_encoder(encoder: SessionEncoder) -> Encode:
    """Return a trace of the encoder, or the encoder itself where a trace would give other vectors."""
    plain = SessionEncoder(encoder.model, encoder.tokens)
    plain.projections = None
    shapes = [sample_sessions(encoder.model, *shape) for shape in (_TRACED, *_CHECKED)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check below finds shapes that a trace has made constants
            traced = torch.jit.trace(encoder.eval(), (shapes[0],), check_trace=False, strict=False)
            frozen = torch.jit.freeze(traced)
        with torch.jit.optimized_execution(False):
            equal = all(torch.allclose(frozen(rows), plain(rows), atol=_TOLERANCE, rtol=0) for rows in shapes)
    except RuntimeError:
        return encoder
    if not equal:
        return encoder

    def encode(session: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # optimising for every new shape costs more time than it saves
            vectors: Tensor = frozen(session)
            return vectors

    return encode


def _fast(encoder: ContextualEncoder) -> FastContextualEncoder:
    """Return the encoder with its shortcut; a plain one is turned into it."""
    return cast(FastContextualEncoder, use_shortcuts(encoder))


def _constant(tokens: ItemEmbeddings) -> ItemEmbeddings:
    ids = None if tokens.ids is None else tokens.ids.detach()
    return tokens._replace(modality=tokens.modality.detach(), ids=ids)


def sample_sessions(model: MISSRec, batch: int, length: int) -> Tensor:
    """Return sessions of different lengths, the first one whole; items repeat."""
    length = min(length, model.config.max_sequence_length)
    n_items = model.item_encoder.n_rows - FIRST_ITEM_ROW
    rows = torch.arange(batch * length).view(batch, length) * 7 % n_items + FIRST_ITEM_ROW
    for line in range(1, batch):
        rows[line, max(length - line, 0) :] = PADDING_ROW
    return rows.to(model.item_encoder.presence.device)
