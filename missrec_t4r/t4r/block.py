"""MISSRec as the body of a T4R model: interests, contextual encoder and interest-aware decoder.

`MISSRecBlock` takes the place of a ``TransformerBlock``. It passes the visible items to the pure-torch model of
`missrec_t4r.model` and discovers the interests anew every ``refresh_steps`` training steps, since a plain
``tr.Trainer`` announces no epochs to a body.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers4rec.torch.block.base import BlockBase

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.config.training import IdInit
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.t4r.settings import PartSettings
from missrec_t4r.t4r.state import StepState


class MISSRecBlock(BlockBase):
    """Session vectors of the visible items: ``tr.SequentialBlock(inputs, MISSRecBlock(d_model=300, n_head=4))``.

    Its weights are created when a `Head` joins it with its inputs and a `MISSRecNextItemTask`: the catalogue and all
    settings are known only then.

    Parameters
    ----------
    config : MISSRecConfig, optional
        By default that of the other parts, or of the recipe ``default``.
    refresh_steps : int
        Training steps between two interest discoveries, counted in a buffer that is saved and resumed; 0 leaves the
        discovery to `InterestRefresh`.
    seed : int
        Of the clustering.
    id_init : {"content", "random"}
        Initial ID embeddings, as in `TrainConfig`.
    **settings
        Any setting of `MISSRecConfig`, such as ``d_model``, ``n_head`` or ``attention``; they win over ``config``.

    Raises
    ------
    ConfigError
        An unknown setting (the nearest known one is named), or a wrong value.
    """

    step: Tensor

    def __init__(
        self,
        *,
        config: MISSRecConfig | None = None,
        refresh_steps: int = 200,
        seed: int = 0,
        id_init: IdInit = TrainConfig.id_init,
        **settings: Any,
    ) -> None:
        super().__init__()
        if refresh_steps < 0:
            raise ConfigError(f"refresh_steps={refresh_steps}", "a number of steps, or 0 for InterestRefresh")
        self.settings = PartSettings("MISSRecBlock", config, settings)
        self.refresh_steps, self.seed = refresh_steps, seed
        self.id_init: IdInit = id_init
        self.core: MISSRec | None = None
        self.side_projection: nn.Linear | None = None
        self.state = StepState()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._steps_taken: int | None = None  # what the buffer holds, once it has been read: a GPU is waited for then
        self.register_load_state_dict_post_hook(_read_steps_again)

    def connect(self, core: MISSRec, state: StepState, between: int = 0) -> None:
        """Set the model and the state shared with the inputs; called by `MISSRecNextItemTask.build`.

        Parameters
        ----------
        core : MISSRec
            Owned, saved and loaded by this block from now on.
        state : StepState
            Shared with the inputs.
        between : int
            Output width of a module between the inputs and this block, which then projects its output itself, since
            the core has no part for it; 0 without such a module.
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
            Embedded event features; the items themselves are passed in `StepState`.

        Returns
        -------
        Tensor [batch, column, dim]
            The row's unit-length session vector, the same at every position, since T4R's tasks differ in the position
            that they read (the last visible one, the first, the mean). The vectors of all positions, or prefixes, which
            a training step with a target for each needs, are in `StepState`.
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
        last_only = not sessions.every_position
        if sessions.learning and self.training:
            self._refresh_by_steps(self.core)
            catalogue = item_encoder.catalogue()
            items = catalogue.take(sessions.item_ids)
            encoded = self.core.encode(
                sessions.item_ids,
                items=items,
                last_only=last_only,
                event_features=event_features,
                n_interests=_all_slots(self.core, sessions.item_ids),
            )
            self.state.put(encoded, item_encoder.candidates(catalogue))
        else:
            encoded = self.core.encode(sessions.item_ids, last_only=last_only, event_features=event_features)
            self.state.put(encoded)
        vectors = encoded.vectors  # [batch, dim], or with a target at every position [batch, seq, dim]
        if not last_only:
            last = ((sessions.item_ids > 0).sum(1) - 1).clamp_min(0)  # [batch]
            vectors = vectors[torch.arange(len(last), device=last.device), last]
        if sessions.longest is not None:
            vectors = vectors[sessions.longest]
        return vectors.unsqueeze(1).expand(-1, inputs.shape[1], -1)

    def _replicate_for_data_parallel(self) -> Any:
        raise ConfigError(
            "a MISSRecBlock in nn.DataParallel, whose threads would share the values of one step",
            "one GPU in a process",
            "set CUDA_VISIBLE_DEVICES=0, or start one process for each GPU with torchrun",
        )

    def refresh(self, seed: int) -> None:
        """Discover the interests anew, with the current adapters."""
        if self.core is not None:
            self.core.discover_interests(seed)

    def _refresh_by_steps(self, core: MISSRec) -> None:
        taken = int(self.step) if self._steps_taken is None else self._steps_taken
        if self.refresh_steps and taken % self.refresh_steps == 0:
            core.discover_interests(self.seed + taken // self.refresh_steps)
        self.step += 1
        self._steps_taken = taken + 1

    def output_size(self, input_size: Any = None) -> torch.Size:
        """Return [-1, column, d_model]."""
        return self.forward_output_size(input_size or getattr(self, "input_size", None) or [-1, -1])

    def forward_output_size(self, input_size: Any) -> torch.Size:
        """Return the input size with the last dimension ``d_model``."""
        return torch.Size([*input_size[:2], self.settings["d_model"]])


def _read_steps_again(block: nn.Module, _: Any) -> None:
    """Hook after `torch.nn.Module.load_state_dict`."""
    block._steps_taken = None  # type: ignore[assignment]  # torch types attributes of a module as its parts


def _all_slots(core: MISSRec, item_ids: Tensor) -> int | None:
    """Return one slot per item and modality on a GPU, which would have to be waited for to count them; None elsewhere.

    The ``faithful`` regulariser depends on the number of slots, so it is counted for it.
    """
    if item_ids.device.type != "cuda" or core.config.orthogonality == "faithful":
        return None
    return core.interests.most_slots(item_ids)


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

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # transformers' signature
        """Discover the interests if a multiple of ``every`` epochs is done."""
        epochs_done = state.epoch or 0.0
        epoch = round(epochs_done)
        if abs(epochs_done - epoch) < 1e-6 and epoch % self.every == 0:
            self.block.refresh(self.block.seed + epoch)
