"""Shortcuts: drop-in subclasses of the paper's modules, with the same weights and, up to rounding, the same results.

`use_shortcuts` is what the builder applies by default; `tests/equations/test_shortcuts.py` holds each of them, and the
whole model, equal to the plain one. docs/equations.md, *Shortcuts*, explains why they are the same.
"""

from __future__ import annotations

from typing import Final, TypeVar

from torch import nn

from missrec_t4r.model.attention import EncoderLayer, MultiHeadAttention
from missrec_t4r.model.contextual_encoder import ContextualEncoder
from missrec_t4r.model.fast.attention import FastAttention, FastEncoderLayer
from missrec_t4r.model.fast.contextual_encoder import FastContextualEncoder, FastInterestVocabulary
from missrec_t4r.model.fast.dropout import FastDropout
from missrec_t4r.model.fast.fusion import FastCandidateFusion
from missrec_t4r.model.fast.item_encoder import FastItemEncoder
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.interests import InterestVocabulary
from missrec_t4r.model.item_encoder import ItemEncoder

Module = TypeVar("Module", bound=nn.Module)

SHORTCUTS: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.Dropout: FastDropout,
    MultiHeadAttention: FastAttention,
    EncoderLayer: FastEncoderLayer,
    ContextualEncoder: FastContextualEncoder,
    InterestVocabulary: FastInterestVocabulary,
    ItemEncoder: FastItemEncoder,
    CandidateFusion: FastCandidateFusion,
}
"""Plain module -> its fast subclass, which adds methods and nothing that is stored."""


def use_shortcuts(model: Module) -> Module:
    """Turn every plain module of a model into its fast subclass, in place, and return the model.

    The subclasses add no state, so that the class is all that changes: weights, names and settings stay.
    """
    for module in model.modules():
        fast = SHORTCUTS.get(type(module))
        if fast is not None:
            module.__class__ = fast
    return model
