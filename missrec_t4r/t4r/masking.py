"""Prefix masking: every prefix of a row is an example, with the item that followed it as target.

Transformers4Rec's own maskings leave the label item visible to a body that looks ids up itself, and a causal mask does
not protect a model whose interest tokens span the session. This masking replaces the target and everything after it
by padding before any look-up (`blank`), so that no later module can use it (tests: `docs/t4r_contract.md#masking`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers4rec.torch.masking import MaskingInfo, MaskSequence, masking_registry

Cut = Literal["all", "random", "last"]


@masking_registry.register_with_multiple_names("prefix")
class PrefixMasking(MaskSequence):
    """Cut every row into visible items and targets.

    A label is at the position before its target, as in T4R's ``clm``. At inference nothing is removed. A row with fewer
    than two items has no target: all its items are visible and it is not part of the loss.

    Parameters
    ----------
    hidden_size : int
        Part of T4R's signature; this masking has no parameters of its own.
    padding_idx : int
        Item index that fills short sessions.
    eval_on_last_item_seq_only : bool
        Part of T4R's signature; the last item is the only target of a test row, so False is refused.
    cut : "all", "random" or "last"
        The targets of a training row. ``all`` and ``random`` are for whole sessions (T4R's stock loader): every item
        but the first is a target in every step, or a random one of them. ``last`` is for rows that are a prefix and
        its target already; batches of `PrefixLoader` are marked as such and need no setting. Testing always cuts at
        the last item. With ``all`` the visible items are all but the last; `MultiModalSequenceFeatures` ensures that
        the vector of a position depends on the items up to it alone.

    Examples
    --------
    >>> masking = PrefixMasking(hidden_size=8, cut="last")
    >>> info = masking.compute_masked_targets(torch.tensor([[5, 6, 7, 0]]), training=True)
    >>> info.schema.tolist(), info.targets.tolist()
    ([[True, True, False, False]], [[0, 7, 0, 0]])
    """

    def __init__(
        self,
        hidden_size: int,
        padding_idx: int = 0,
        eval_on_last_item_seq_only: bool = True,
        cut: Cut = "all",
        **_unused: Any,  # T4R's from_schema passes all its keyword arguments to the masking
    ) -> None:
        if not eval_on_last_item_seq_only:
            raise ValueError("PrefixMasking tests on the last item only; leave eval_on_last_item_seq_only=True")
        super().__init__(hidden_size=hidden_size, padding_idx=padding_idx)
        self.register_parameter("masked_item_embedding", None)  # hidden items are padding, not a learned embedding
        self.cut: Cut = cut

    def target_index(self, item_ids: Tensor, training: bool, testing: bool, cut: Cut | None = None) -> Tensor:
        """Return the position of each row's target; with ``cut="all"`` that of the last one.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int
            Item indices, padded on the right.
        training, testing : bool
            T4R's flags; with both off the rows are inference requests.
        cut : "all", "random" or "last", optional
            Overrides the masking's own setting.

        Returns
        -------
        Tensor [batch], int64
            Index of the (last) target; equal to the session's length where there is none.
        """
        length = (item_ids != self.padding_idx).sum(1)
        if not training and not testing:
            return length
        if training and (cut or self.cut) == "random":
            drawn = torch.rand(length.shape, device=length.device, dtype=torch.float64)
            index = 1 + (drawn * (length - 1)).long()
        else:
            index = length - 1
        return torch.where(length < 2, length, index)

    def info_at(self, item_ids: Tensor, target: Tensor, first: Tensor | None = None) -> MaskingInfo:
        """Return the visibility mask and the labels; store both for T4R's tasks.

        Parameters
        ----------
        item_ids : Tensor [batch, seq], int
        target : Tensor [batch], int64
            Position of the (last) target: it and everything after it is hidden.
        first : Tensor [batch], int64, optional
            Position of the first label, for rows with a label at every position up to the last target; by default the
            last target's alone.
        """
        steps = torch.arange(item_ids.shape[1], device=item_ids.device)
        visible = (steps < target[:, None]) & (item_ids != self.padding_idx)
        following = nn.functional.pad(item_ids[:, 1:], (0, 1), value=self.padding_idx)
        labelled = visible & (steps >= (target - 1 if first is None else first)[:, None])
        labels = torch.where(labelled, following, self.padding_idx)
        self.mask_schema, self.masked_targets = visible, labels  # T4R's protocol: tasks read these
        return MaskingInfo(visible, labels)

    def compute_masked_targets(
        self, item_ids: Tensor, training: bool = False, testing: bool = False, cut: Cut | None = None
    ) -> MaskingInfo:
        """Return the visibility mask and the labels, both [batch, seq]; a label of 0 means none."""
        target = self.target_index(item_ids, training, testing, cut)
        every = training and (cut or self.cut) == "all"
        return self.info_at(item_ids, target, torch.zeros_like(target) if every else None)

    def blank(self, values: Tensor, visible: Tensor) -> Tensor:
        """Replace every value at or after the target by padding, before it is looked up.

        Parameters
        ----------
        values : Tensor [batch, seq] or [batch, seq, width]
            Item indices, or an event feature of them.
        visible : Tensor [batch, seq], bool
            ``MaskingInfo.schema``.
        """
        shown = visible if values.dim() == 2 else visible[..., None]
        return torch.where(shown, values, torch.zeros((), dtype=values.dtype, device=values.device))

    def apply_mask_to_inputs(
        self, inputs: Tensor, schema: Tensor, training: bool = False, testing: bool = False
    ) -> Tensor:
        """Blank looked-up inputs [batch, seq, dim]: for T4R's own inputs and bodies, which look up first."""
        return self.blank(inputs, schema)
