"""What one step's modules tell each other beside T4R's call chain, which hands on a single tensor.

The inputs write which items are visible, the block writes what it encoded, the task reads both. T4R does the same with
``item_seq`` and ``masked_targets``; here it has a type, one home, and is never saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.errors import ConfigError
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.model.missrec import Encoded, MISSRec


class VisibleSessions(NamedTuple):
    """What the model may see of a batch: nothing at or after a target."""

    item_ids: Tensor
    """[batch, seq], int64: the last visible items of each row, padded with 0 on the right."""
    window: Tensor
    """[batch, seq], int64: the column of the batch that each of them came from."""
    learning: bool
    """Whether T4R asked for a training step."""

    def take(self, values: Tensor) -> Tensor:
        """Return the columns [batch, seq, width] of ``values`` [batch, column, width] that belong to `item_ids`."""
        return values.gather(1, self.window.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class StepState:
    """One step's values, shared by the inputs, the block and the task of one model."""

    def __init__(self) -> None:
        self._sessions: VisibleSessions | None = None
        self._encoded: Encoded | None = None
        self._of_step: CandidateEmbeddings | None = None
        self._of_weights: CandidateEmbeddings | None = None
        self._version: tuple[tuple[int, int], ...] = ()

    def __reduce__(self) -> tuple[type[StepState], tuple[()]]:
        return StepState, ()  # a saved or copied model starts without a step

    @property
    def sessions(self) -> VisibleSessions:
        """What the inputs left visible."""
        if self._sessions is None:
            raise ConfigError(
                "MISSRecBlock was called before its inputs",
                "a body that starts with MultiModalSequenceFeatures",
                "write tr.SequentialBlock(inputs, MISSRecBlock(...))",
            )
        return self._sessions

    @property
    def encoded(self) -> Encoded:
        """What the block made of it."""
        if self._encoded is None:
            raise ConfigError("MISSRecNextItemTask was called before its body", "a step of the whole model")
        return self._encoded

    def show(self, sessions: VisibleSessions) -> None:
        """Start a step: the inputs say what is visible."""
        self._sessions, self._encoded, self._of_step = sessions, None, None

    def put(self, encoded: Encoded, candidates: CandidateEmbeddings | None = None) -> None:
        """Hand on what the block encoded and, in training, the catalogue as this step's dropout left it."""
        self._encoded, self._of_step = encoded, candidates

    def candidates(self, core: MISSRec) -> CandidateEmbeddings:
        """Return the catalogue's tokens: this training step's, or those of the weights, computed once per version."""
        if self._of_step is not None:
            return self._of_step
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            return core.candidates()
        version = tuple((weight.data_ptr(), weight._version) for weight in core.item_encoder.parameters())
        if self._of_weights is None or version != self._version:
            self._of_weights, self._version = core.candidates(), version
        return self._of_weights
