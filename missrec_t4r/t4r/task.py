"""Next-item prediction with fused candidates: full softmax over the catalogue, metrics by rank.

A subclass of T4R's ``NextItemPredictionTask``, because its Head passes ``top_k`` and its Trainer logs predictions only
for that class. Labels come from the masking, never from ``targets``: T4R casts those to float.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers4rec.torch import NextItemPredictionTask
from transformers4rec.torch.model.base import PredictionTask
from transformers4rec.torch.ranking_metric import RankingMetric

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.errors import ConfigError
from missrec_t4r.evaluation.full_ranking import top_items
from missrec_t4r.model.event_features import EventFeatures
from missrec_t4r.model.fast.cross_entropy import next_item_loss
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.t4r.block import MISSRecBlock
from missrec_t4r.t4r.inputs import MultiModalSequenceFeatures
from missrec_t4r.t4r.settings import PartSettings, merged
from missrec_t4r.training.step import LARGEST_TABLE
from missrec_t4r.training.warm_start.id_init import ids_from_content


class MISSRecNextItemTask(NextItemPredictionTask):
    """Score the catalogue for a session and learn from the item that followed.

    Parameters
    ----------
    config : MISSRecConfig, optional
        By default that of the other parts, or of the recipe ``default``.
    metrics : iterable of torchmetrics.Metric, optional
        T4R's ranking metrics, by default its own: NDCG, average precision and recall at 10 and 20. They are computed
        from the target's rank, not from a column per item: a cut-off may exceed the catalogue, and a batch may have one
        row.
    task_name : str
        Prefix of the metrics' names; T4R's default.
    **settings
        Any setting of `MISSRecConfig`, such as ``temperature`` or ``candidate_fusion``; they win over ``config``.

    Raises
    ------
    ConfigError
        An unknown setting (the nearest known one is named), or a wrong value.
    """

    def __init__(
        self,
        *,
        config: MISSRecConfig | None = None,
        metrics: Iterable[torchmetrics.Metric] | None = None,
        task_name: str = "next-item",
        **settings: Any,
    ) -> None:
        super().__init__(metrics=_default_metrics() if metrics is None else metrics, task_name=task_name)
        self.settings = PartSettings("MISSRecNextItemTask", config, settings)
        self._block: tuple[MISSRecBlock, ...] = ()  # in a tuple: the body owns it, and its weights are saved once

    def build(
        self,
        body: nn.Module,
        input_size: Any,
        device: Any = None,
        inputs: Any = None,
        task_block: Any = None,
        pre: Any = None,
    ) -> None:
        """Join inputs, block and task into one model; called by T4R's Head, which has all three.

        Raises
        ------
        ConfigError
            The body has no `MISSRecBlock`, or another module after it, its inputs are not ours, a task block was given,
            or the settings of the three contradict each other.
        """
        inputs = inputs or getattr(body, "inputs", None)
        blocks = [module for module in body.modules() if isinstance(module, MISSRecBlock)]
        if not isinstance(inputs, MultiModalSequenceFeatures) or len(blocks) != 1:
            raise ConfigError(
                f"a body with {len(blocks)} MISSRecBlock and inputs of type {type(inputs).__name__}",
                "one MISSRecBlock on MultiModalSequenceFeatures",
                "write tr.SequentialBlock(inputs, MISSRecBlock(...)), and give the Head the same inputs",
            )
        if task_block is not None or pre is not None:
            raise ConfigError(
                "a task block for MISSRecNextItemTask", "none: candidates are scored by the session vector"
            )
        block, last = blocks[0], body
        while isinstance(last, nn.Sequential) and block in last.modules():
            last = last[-1]
        if block not in last.modules():
            raise ConfigError(
                f"a {type(last).__name__} after MISSRecBlock",
                "the block as the body's last module: candidates are scored by its session vector",
                "leave the module out, or give it to another task as its task_block",
            )
        config = merged([block.settings, inputs.settings, self.settings])
        core = block.core if block.core is not None else _build_core(config, inputs, block)
        if core.config != config:
            raise ConfigError(
                "a body that already serves a task with other settings", "equal settings in all tasks of a body"
            )
        between = 0 if inputs.event_features is None else _width_between(body, block)
        if inputs.event_features is not None and not between and core.event_features is None:
            core.event_features = EventFeatures(inputs.event_features, config.d_model)
            nn.init.normal_(core.event_features.projection.weight, std=0.02)
        block.connect(core, inputs.state, between)
        inputs.causal = config.attention == "causal"
        inputs.n_rows = core.item_encoder.n_rows
        inputs.catalogue = None  # the item encoder holds the vectors now
        self._block = (block,)
        self.embeddings, self.masking = inputs.categorical_module, inputs.masking
        self.padding_idx, self.target_dim = inputs.masking.padding_idx, core.item_encoder.n_rows
        PredictionTask.build(self, body, input_size, inputs=inputs, device=device)

    @property
    def core(self) -> MISSRec:
        """The model that the block owns."""
        if not self._block or self._block[0].core is None:
            raise ConfigError("MISSRecNextItemTask has no body yet", "a Head around it", "write tr.Head(body, [task])")
        return self._block[0].core

    def forward(
        self,
        inputs: Tensor,
        targets: Any = None,  # T4R casts them to float; labels come from the masking
        training: bool = False,
        testing: bool = False,
        top_k: int | None = None,
        **_: Any,
    ) -> dict[str, Tensor] | Tensor | tuple[Tensor, Tensor]:
        """Return loss, labels and predictions in training and testing, scores at inference.

        Parameters
        ----------
        inputs : Tensor [batch, column, dim]
            The block's output.
        targets
            Ignored.
        training, testing : bool
            T4R's flags.
        top_k : int, optional
            At inference: return the best only.

        Returns
        -------
        dict, Tensor [batch, catalogue], or (scores [batch, top_k], rows [batch, top_k])
            Scores are before the temperature, -inf for rows that cannot be recommended; the best come first, ties in
            ascending order of rows.
        """
        if training or testing:
            return self._learn()
        core, state = self.core, self._block[0].state
        scores = core.score(inputs[:, 0], state.candidates(core), state.sessions.item_ids)
        if top_k is None:
            return scores
        if torch.jit.is_tracing():  # whose steps cannot depend on whether there are ties
            return _top_items_of_a_trace(scores, min(top_k, core.item_encoder.n_rows))
        return top_items(scores, top_k)

    def _learn(self) -> dict[str, Tensor]:
        """Return the loss of all labels, and the last label of each row with its predictions."""
        core, state = self.core, self._block[0].state
        sessions = state.sessions
        labels = self.masking.masked_targets  # [batch, column], 0 for none
        if sessions.one_target:
            row, column = torch.arange(len(labels), device=labels.device), (labels != self.padding_idx).int().argmax(1)
        else:
            row, column = torch.nonzero(labels != self.padding_idx, as_tuple=True)
        target = labels[row, column].long()
        if sessions.every_position:  # the vector of the items up to each, where the body has the session's everywhere
            vectors = state.encoded.vectors[row, column - sessions.window[row, 0]]
        else:
            vectors = state.encoded.vectors[row]
        history = sessions.item_ids[row] * (sessions.window[row] <= column.unsqueeze(1))  # what each vector depends on
        candidates = state.candidates(core)
        is_last: Tensor | slice = slice(None)
        if sessions.every_position:
            is_last = torch.ones_like(row, dtype=torch.bool)
            is_last[:-1] = row[1:] != row[:-1]
        targets = torch.where(core.recommendable[target], target, 0)  # without any embedding it cannot be learned
        count = (targets > 0).sum().unsqueeze(0)

        def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
            return next_item_loss(scores / core.config.temperature, targets, counts=count)

        if not sessions.every_position or len(target) * core.item_encoder.n_rows <= LARGEST_TABLE:
            scores = core.score(vectors, candidates, history)
            loss, scores = loss_of(scores, targets), scores[is_last]
        else:  # a part of the positions at a time, whose scores are computed again in the backward pass
            parts = zip(*(x.split(LARGEST_TABLE // core.item_encoder.n_rows) for x in (vectors, history, targets)))
            losses = [
                checkpoint(lambda v, h, t: loss_of(core.score(v, candidates, h), t), *part, use_reentrant=False)
                for part in parts
            ]
            loss = torch.stack(losses).sum()
            with torch.no_grad():
                scores = core.score(vectors[is_last], candidates, history[is_last])
        regulariser = orthogonality_loss(state.encoded.memory, state.encoded.interests.mask, core.config.orthogonality)
        loss = loss + core.config.orthogonality_weight * regulariser
        return {"loss": loss, "labels": target[is_last], "predictions": scores}

    def calculate_metrics(self, predictions: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Update the metrics with a batch and return its values.

        Parameters
        ----------
        predictions : Tensor [batch, catalogue]
            Scores, as `forward` returned them.
        targets : Tensor [batch], int64
            Rows of the targets.
        """
        if not len(targets):
            return {}
        return {self.metric_name(metric): _update(metric, predictions, targets) for metric in self.metrics}


def _top_items_of_a_trace(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `top_items` returns, by the same steps for any scores."""
    last = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > last, scores == last
    room = k - above.sum(1, keepdim=True)  # for the lowest rows of those that tie for the last places
    rows = (above | (tied & (tied.cumsum(1) <= room))).nonzero()[:, 1].reshape(-1, k)  # ascending
    best, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
    return best, rows.gather(1, order)


def _default_metrics() -> list[torchmetrics.Metric]:
    return copy.deepcopy(list(NextItemPredictionTask.DEFAULT_METRICS))  # T4R shares its own between all tasks


def _build_core(config: MISSRecConfig, inputs: MultiModalSequenceFeatures, block: MISSRecBlock) -> MISSRec:
    if inputs.catalogue is None:
        raise ConfigError("inputs without a catalogue", "inputs from MultiModalSequenceFeatures.from_schema")
    core = build_missrec(config, inputs.catalogue)
    if block.id_init == "content":
        ids_from_content(core)
    return core


def _width_between(body: nn.Module, block: MISSRecBlock) -> int:
    """Return the output width of a module between inputs and block (an MLPBlock in T4R's recipes), 0 without one."""
    modules = list(body.children())
    before = modules[1 : modules.index(block)] if block in modules else []
    sizes = [size for module in before if (size := getattr(module, "output_size", None)) is not None]
    return int(sizes[-1]()[-1]) if sizes else 0


def _update(metric: Any, scores: Tensor, targets: Tensor) -> Tensor:
    """Update a metric with a batch and return the batch's value.

    T4R's metrics get scores [batch, cut_off + 1] with the target at its rank: exact for one relevant item, ties by row.
    """
    value: Tensor
    if not isinstance(metric, RankingMetric):
        value = metric.forward(scores, targets)
        return value
    cut_off = int(max(metric.top_ks))
    of_target = scores.gather(1, targets[:, None])
    column = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > of_target) | ((scores == of_target) & (column < targets[:, None]))
    rank = torch.where(of_target[:, 0] == -torch.inf, cut_off, ahead.sum(1).clamp_max(cut_off))  # [batch]
    rank = torch.cat([rank, rank.new_full((1,), cut_off)])  # one row more: T4R's recall fails on a batch of one row
    by_rank = torch.arange(cut_off, -1, -1, device=scores.device, dtype=torch.float32)  # [cut_off + 1]
    metric.update(by_rank.expand(len(rank), -1), rank)
    metric.metric_mean[-1] = metric.metric_mean[-1][:-1]
    value = metric.metric_mean[-1]
    return value.mean(0)
