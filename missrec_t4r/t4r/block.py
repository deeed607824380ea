"""MISSRec's body for T4R: interests, contextual encoder and interest-aware decoder, in place of a TransformerBlock.

The mathematics is `missrec_t4r.model`; this module calls it with what the inputs left visible, and keeps the interests
fresh when nobody else does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers4rec.torch.block.base import BlockBase

from missrec_t4r.config import Attention, InterestAlgorithm, MISSRecConfig, SequenceFusion
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.t4r.state import StepState

_DEFAULT = MISSRecConfig()


class MISSRecBlock(BlockBase):
    """Session vectors from the visible items: ``tr.SequentialBlock(inputs, MISSRecBlock(d_model=300, n_head=4))``.

    Its weights are made when a `Head` joins it with its inputs and a `MISSRecNextItemTask`: only then the catalogue and
    all settings are known.

    Parameters
    ----------
    d_model, n_head, d_feedforward, n_encoder_layers, n_decoder_layers, dropout, layer_norm_eps
        As in `MISSRecConfig`.
    attention : {"bidirectional", "causal"}
        A row is one prefix, so the published bidirectional attention is the default here. ``causal`` restricts what
        positions see of each other; the last position is trained either way.
    sequence_fusion, interest_ratio, interest_algorithm
        As in `MISSRecConfig`.
    refresh_steps : int
        Training steps between two interest discoveries; 0 leaves it to `InterestRefresh`. A plain ``tr.Trainer`` calls
        nobody at an epoch's start, so the block counts steps itself, in a buffer that is saved and resumed.
    seed : int
        Of the clustering.
    config : MISSRecConfig
        Settings that neither these arguments, nor those of the inputs, nor those of the task name.
    """

    step: Tensor

    def __init__(
        self,
        d_model: int = _DEFAULT.d_model,
        n_head: int = _DEFAULT.n_head,
        *,
        d_feedforward: int = _DEFAULT.d_feedforward,
        n_encoder_layers: int = _DEFAULT.n_encoder_layers,
        n_decoder_layers: int = _DEFAULT.n_decoder_layers,
        dropout: float = _DEFAULT.dropout,
        layer_norm_eps: float = _DEFAULT.layer_norm_eps,
        attention: Attention = "bidirectional",
        sequence_fusion: SequenceFusion = _DEFAULT.sequence_fusion,
        interest_ratio: float = _DEFAULT.interest_ratio,
        interest_algorithm: InterestAlgorithm = _DEFAULT.interest_algorithm,
        refresh_steps: int = 200,
        seed: int = 0,
        config: MISSRecConfig = _DEFAULT,
    ) -> None:
        super().__init__()
        if refresh_steps < 0:
            raise ConfigError(f"refresh_steps={refresh_steps}", "a number of steps, or 0 for InterestRefresh")
        self.config = config
        self.settings: dict[str, Any] = {
            "d_model": d_model,
            "n_head": n_head,
            "d_feedforward": d_feedforward,
            "n_encoder_layers": n_encoder_layers,
            "n_decoder_layers": n_decoder_layers,
            "dropout": dropout,
            "layer_norm_eps": layer_norm_eps,
            "attention": attention,
            "sequence_fusion": sequence_fusion,
            "interest_ratio": interest_ratio,
            "interest_algorithm": interest_algorithm,
        }
        self.refresh_steps, self.seed = refresh_steps, seed
        self.core: MISSRec | None = None
        self.side_projection: nn.Linear | None = None
        self.state = StepState()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def connect(self, core: MISSRec, state: StepState, between: int = 0) -> None:
        """Take the model and the inputs' state; `MISSRecNextItemTask.build` calls this.

        Parameters
        ----------
        core : MISSRec
            Owned, saved and loaded by this block from now on.
        state : StepState
            Shared with the inputs.
        between : int
            Width of the side features where another module stands between the inputs and this block; then the core
            has no part for them, and this block projects them itself.
        """
        self.core, self.state = core, state
        if between and self.side_projection is None:
            self.side_projection = nn.Linear(between, core.config.d_model, bias=False)
            nn.init.normal_(self.side_projection.weight, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the session vectors.

        Parameters
        ----------
        inputs : Tensor [batch, column, width]
            Side features; the items themselves come through `StepState`.

        Returns
        -------
        Tensor [batch, column, dim]
            The row's unit-length session vector at every position, so that whichever position a T4R task reads (the
            last visible one, the first, the mean), it reads the session.
        """
        if self.core is None:
            raise ConfigError(
                "MISSRecBlock has no model yet",
                "a Head with a MISSRecNextItemTask, which joins inputs, block and task",
                "write tr.Head(body, [MISSRecNextItemTask()], inputs=inputs)",
            )
        sessions, item_encoder = self.state.sessions, self.core.item_encoder
        projection = self.side_projection if self.core.event_features is None else self.core.event_features.projection
        event_features = None if projection is None else projection(sessions.take(inputs))
        if sessions.learning and self.training:
            self._refresh_by_steps(self.core)
            catalogue = item_encoder.catalogue()
            items = catalogue.take(sessions.item_ids)
            encoded = self.core.encode(sessions.item_ids, items=items, last_only=True, event_features=event_features)
            self.state.put(encoded, item_encoder.candidates(catalogue))
        else:
            encoded = self.core.encode(sessions.item_ids, last_only=True, event_features=event_features)
            self.state.put(encoded)
        return encoded.vectors.unsqueeze(1).expand(-1, inputs.shape[1], -1)

    def refresh(self, seed: int) -> None:
        """Discover the interests anew under the current adapters."""
        if self.core is not None:
            self.core.discover_interests(seed)

    def _refresh_by_steps(self, core: MISSRec) -> None:
        if self.refresh_steps and int(self.step) % self.refresh_steps == 0:
            core.discover_interests(self.seed + int(self.step) // self.refresh_steps)
        self.step += 1

    def output_size(self, input_size: Any = None) -> torch.Size:
        """Return [-1, column, d_model]."""
        return self.forward_output_size(input_size or getattr(self, "input_size", None) or [-1, -1])

    def forward_output_size(self, input_size: Any) -> torch.Size:
        """Return the incoming size with this block's width."""
        return torch.Size([*input_size[:2], self.settings["d_model"]])


class InterestRefresh(TrainerCallback):
    """Discover interests exactly at epoch starts: ``tr.Trainer(..., callbacks=[InterestRefresh(block)])``.

    A run resumed in the middle of an epoch keeps the interests of its checkpoint until the next epoch.

    Parameters
    ----------
    block : MISSRecBlock
        Its own step counter is switched off.
    every : int
        Epochs between two discoveries.
    """

    def __init__(self, block: MISSRecBlock, every: int = 1) -> None:
        self.block, self.every = block, every
        block.refresh_steps = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # transformers' signature
        """Refresh when a whole number of epochs, and the right one, is done."""
        done = state.epoch or 0.0
        epoch = round(done)
        if abs(done - epoch) < 1e-6 and epoch % self.every == 0:
            self.block.refresh(self.block.seed + epoch)
