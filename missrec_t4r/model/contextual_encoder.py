"""Contextual encoder: self-attention over the session's interests (E6; arXiv:2308.11175, contextual encoder)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from missrec_t4r.config.model import Attention
from missrec_t4r.model.attention import EncoderLayer
from missrec_t4r.model.interests import InterestTokens


class ContextualEncoder(nn.Module):
    """Relate the interests of a session to each other; without positions, so their order does not matter.

    Parameters
    ----------
    layers : sequence of EncoderLayer
        In their order; none leaves the interests as they are.
    norm : nn.LayerNorm or nn.Identity
        After the last one; an identity in models without interests.
    attention : {"bidirectional", "causal"}
        ``causal``: an interest sees the interests that the session showed at the same item or earlier (ours; needed to
        train all positions at once).
    """

    def __init__(
        self, layers: Sequence[EncoderLayer], norm: nn.LayerNorm | nn.Identity, attention: Attention = "bidirectional"
    ) -> None:
        super().__init__()
        self.attention = attention
        self.layers, self.norm = nn.ModuleList(layers), norm

    def forward(self, interests: InterestTokens) -> Tensor:
        """Return the memory [batch, interest, dim] for the decoder."""
        memory, mask = interests.tokens, self.visible(interests)
        for layer in self.layers:
            memory = layer(memory, mask)  # [batch, interest, dim]
        normed: Tensor = self.norm(memory)
        return normed

    def visible(self, interests: InterestTokens) -> Tensor:
        """Return which interests each interest may attend to, [batch, 1 or interest, interest]."""
        mask = interests.mask.unsqueeze(1)
        if self.attention == "causal":
            mask = mask & (interests.position.unsqueeze(1) <= interests.position.unsqueeze(2))
        return mask
