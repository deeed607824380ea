"""Names of weights in files of earlier versions, and what they are called now.

Applied wherever weights are read: runs, bundles, warm starts, and the checkpoints of Transformers4Rec's trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_RENAMED = (
    ("towers.", "item_encoder."),
    ("side.", "event_features."),
    ("prior.newcomers.", "terms.cold_start."),
    ("prior.", "terms.item_knn."),
    ("lookalikes.", "terms.content_knn."),
    ("history_bias", "terms.history_bias.bias"),
)
"""Earlier beginning of a name -> today's; the first that fits is used."""


def current_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a `MISSRec` under today's names; names of today stay as they are.

    Examples
    --------
    >>> list(current_names({"towers.adapters.text.bias": ..., "prior.newcomers.settings": ..., "fusion.phi": ...}))
    ['item_encoder.adapters.text.bias', 'terms.cold_start.settings', 'fusion.phi']
    """
    return {current_name(name): tensor for name, tensor in weights.items()}


def rename_weights(_module: Any, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Rename the weights under ``prefix`` in place: a hook before `torch.nn.Module.load_state_dict`."""
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + current_name(name.removeprefix(prefix))] = state.pop(name)


def current_name(name: str) -> str:
    """Return today's name of one weight."""
    for before, now in _RENAMED:
        if name.startswith(before):
            return now + name.removeprefix(before)
    return name
