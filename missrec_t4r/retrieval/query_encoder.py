"""Query encoder: session vectors by the fastest encoder that the device and the model allow.

On a CPU the fused one, or a trace of the model where it cannot be fused; on a GPU, where the sessions of a batch are
searched together, CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.fused_encoder import fuse_encoder
from missrec_t4r.retrieval.graphed_encoder import GraphedEncoder
from missrec_t4r.retrieval.traced_encoder import Encode, SessionEncoder, trace_encoder
from missrec_t4r.schema import PADDING_ROW


class QueryEncoder:
    """Sessions [batch, seq] on the device and their event features to vectors [batch, dim]; zero for an empty session.

    Parameters
    ----------
    model : MISSRec
        In evaluation mode, on its device.
    tokens : ItemEmbeddings of shape [row], optional
        The catalogue's embeddings; without them those of the sessions' items are computed.
    device : torch.device
    batch_size : int
        Sessions of a batch, at most.
    together : bool
        Let the work depend on the shape of a batch alone, so that a GPU records it.
    """

    def __init__(
        self, model: MISSRec, tokens: ItemEmbeddings | None, device: torch.device, batch_size: int, *, together: bool
    ) -> None:
        self.model, self.together = model, together
        self.fused = None if together else fuse_encoder(model, tokens)
        self.tokens = tokens if self.fused is None else None  # the fused encoder has what it needs of them
        self.plain: Encode | None = None
        """Encoder of sessions without event features."""
        if together:
            encoder = SessionEncoder(model, tokens, all_slots=True).eval()
            self.plain = GraphedEncoder(encoder, device, model.config.max_sequence_length, batch_size)
        elif self.fused is None:
            self.plain = trace_encoder(SessionEncoder(model, tokens))

    def __call__(self, session: Tensor, event_features: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors of sessions padded with 0 on the right."""
        if self.fused is not None:
            features = {name: values.numpy(force=True) for name, values in event_features.items()}
            return self.fused(session.numpy(force=True), features)
        if not event_features and self.plain is not None:
            return self.plain(session)
        items = None if self.tokens is None else self.tokens.take(session)
        slots = self.model.interests.most_slots(session) if self.together else None
        vectors = self.model.encode(
            session, items=items, last_only=True, event_features=event_features, n_interests=slots
        ).vectors
        return vectors * (session > PADDING_ROW).any(1, keepdim=True)
