"""Values of one step that inputs, block and task share beside T4R's call chain, which passes on a single tensor.

The inputs write the visible items, the block writes its encoding, the task reads both. T4R does the same with the
attributes ``item_seq`` and ``masked_targets``; `StepState` is typed, in one place, and never saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from missrec_t4r.errors import ConfigError
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.model.missrec import Encoded, MISSRec


class VisibleSessions(NamedTuple):
    """The visible items of a batch: none at or after the (last) target."""

    item_ids: Tensor
    """[batch, seq], int64: the last visible items of each row, padded with 0 on the right."""
    window: Tensor
    """[batch, seq], int64: the column of the batch that each item is from."""
    learning: bool
    """Whether this is a training step (T4R's flag ``training``)."""
    every_position: bool = False
    """Whether every position has a target of its own, and so needs the vector of the items up to it."""
    one_target: bool = False
    """Whether every row is known to have one target, as those of `PrefixLoader` have."""
    longest: Tensor | None = None
    """[batch], int64: where rows of the batch are expanded into prefixes, which row here is the longest one of each."""

    def take(self, values: Tensor) -> Tensor:
        """Return the columns [batch, seq, width] of ``values`` [batch, column, width] that belong to `item_ids`."""
        return values.gather(1, self.window.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


class StepState:
    """Values of one step, shared by the inputs, the block and the task of one model."""

    def __init__(self) -> None:
        self._sessions: VisibleSessions | None = None
        self._encoded: Encoded | None = None
        self._of_step: CandidateEmbeddings | None = None
        self._of_weights: CandidateEmbeddings | None = None
        self._version: tuple[object, ...] = ()

    def __reduce__(self) -> tuple[type[StepState], tuple[()]]:
        return StepState, ()  # a saved or copied model starts without a step

    @property
    def sessions(self) -> VisibleSessions:
        """The visible items, written by the inputs."""
        if self._sessions is None:
            raise ConfigError(
                "MISSRecBlock was called before its inputs",
                "a body that starts with MultiModalSequenceFeatures",
                "write tr.SequentialBlock(inputs, MISSRecBlock(...))",
            )
        return self._sessions

    @property
    def encoded(self) -> Encoded:
        """The encoded sessions, written by the block."""
        if self._encoded is None:
            raise ConfigError("MISSRecNextItemTask was called before its body", "a step of the whole model")
        return self._encoded

    def show(self, sessions: VisibleSessions) -> None:
        """Start a step with the visible items; called by the inputs."""
        self._sessions, self._encoded, self._of_step = sessions, None, None

    def put(self, encoded: Encoded, candidates: CandidateEmbeddings | None = None) -> None:
        """Store the encoded sessions and, in training, the candidates of this step; called by the block."""
        self._encoded, self._of_step = encoded, candidates

    def candidates(self, core: MISSRec) -> CandidateEmbeddings:
        """Return the candidates: this training step's, or those of the current weights, computed once per update."""
        if self._of_step is not None:
            return self._of_step
        if torch.is_grad_enabled() or torch.jit.is_tracing() or core.training:  # which drops modalities at random
            return core.candidates()
        device = next(core.parameters()).device.type
        precision = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)  # a Trainer's bf16 ends with it
        version = (precision, *((weight.data_ptr(), weight._version) for weight in core.item_encoder.parameters()))
        if self._of_weights is None or version != self._version:
            self._of_weights, self._version = core.candidates(), version
        return self._of_weights
