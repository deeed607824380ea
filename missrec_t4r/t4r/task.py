"""Next-item prediction with fused candidates: full softmax over the catalogue, metrics by rank.

A subclass of T4R's ``NextItemPredictionTask``, because its Head passes ``top_k`` and its Trainer logs predictions only
for that class. Labels come from the masking, never from ``targets``: T4R casts those to float.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from transformers4rec.torch import NextItemPredictionTask
from transformers4rec.torch.model.base import PredictionTask
from transformers4rec.torch.ranking_metric import RankingMetric

from missrec_t4r.config import CandidateFusionName, MISSRecConfig, Orthogonality
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.event_features import EventFeatures
from missrec_t4r.model.fast.cross_entropy import next_item_loss
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.retrieval.topk import top_items
from missrec_t4r.t4r.block import MISSRecBlock
from missrec_t4r.t4r.inputs import MultiModalSequenceFeatures

_DEFAULT = MISSRecConfig()


class MISSRecNextItemTask(NextItemPredictionTask):
    """Score the catalogue for a session and learn from the item that followed.

    Parameters
    ----------
    temperature, candidate_fusion, history_bias, orthogonality, orthogonality_weight
        As in `MISSRecConfig`.
    metrics : iterable of torchmetrics.Metric, optional
        T4R's ranking metrics, by default its own: NDCG, average precision and recall at 10 and 20. They see the
        target's rank, not a column per item: a cut-off may exceed the catalogue, and a batch may have one row.
    task_name : str
        Under which T4R reports; its own default.
    """

    def __init__(
        self,
        *,
        temperature: float = _DEFAULT.temperature,
        candidate_fusion: CandidateFusionName = _DEFAULT.candidate_fusion,
        history_bias: bool = _DEFAULT.history_bias,
        orthogonality: Orthogonality = _DEFAULT.orthogonality,
        orthogonality_weight: float = _DEFAULT.orthogonality_weight,
        metrics: Iterable[torchmetrics.Metric] | None = None,
        task_name: str = "next-item",
    ) -> None:
        super().__init__(metrics=_default_metrics() if metrics is None else metrics, task_name=task_name)
        self.settings: dict[str, Any] = {
            "temperature": temperature,
            "candidate_fusion": candidate_fusion,
            "history_bias": history_bias,
            "orthogonality": orthogonality,
            "orthogonality_weight": orthogonality_weight,
        }
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
        """Join inputs, block and task into one model; T4R's Head calls this and shows all three.

        Raises
        ------
        ConfigError
            The body has no `MISSRecBlock`, its inputs are not ours, a task block was given, or the settings of the
            three contradict each other.
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
        block = blocks[0]
        config = dataclasses.replace(block.config, **inputs.settings, **block.settings, **self.settings)
        core = block.core if block.core is not None else _build_core(config, inputs)
        if core.config != config:
            raise ConfigError(
                "a body that already serves a task with other settings", "equal settings in all tasks of a body"
            )
        between = 0 if inputs.event_features is None else _width_between(body, block)
        if inputs.event_features is not None and not between and core.event_features is None:
            core.event_features = EventFeatures(inputs.event_features, config.d_model)
            nn.init.normal_(core.event_features.projection.weight, std=0.02)
        block.connect(core, inputs.state, between)
        inputs.catalogue = None  # the towers hold the vectors now
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
        targets: Any = None,  # noqa: ARG002  # T4R casts them to float; labels come from the masking
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
        core, state = self.core, self._block[0].state
        history = state.sessions.item_ids
        if not training and not testing:
            scores = core.score(inputs[:, 0], state.candidates(core), history)
            return scores if top_k is None else top_items(scores, top_k)
        labels = self.masking.masked_targets
        labelled = labels != self.padding_idx
        rows, target = labelled.any(1), labels[labelled].long()
        scores = core.score(inputs[labelled], state.candidates(core), history[rows])
        return {"loss": self._loss(scores, target), "labels": target, "predictions": scores}

    def _loss(self, scores: Tensor, target: Tensor) -> Tensor:
        core, encoded = self.core, self._block[0].state.encoded
        regulariser = orthogonality_loss(encoded.memory, encoded.interests.mask, core.config.orthogonality)
        scored = torch.where(core.recommendable[target], target, 0)  # a target without tokens cannot be learned
        loss = next_item_loss(scores / core.config.temperature, scored)
        return loss + core.config.orthogonality_weight * regulariser

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


def _default_metrics() -> list[torchmetrics.Metric]:
    return copy.deepcopy(list(NextItemPredictionTask.DEFAULT_METRICS))  # T4R shares its own between all tasks


def _build_core(config: MISSRecConfig, inputs: MultiModalSequenceFeatures) -> MISSRec:
    if inputs.catalogue is None:
        raise ConfigError("inputs without a catalogue", "inputs from MultiModalSequenceFeatures.from_schema")
    return build_missrec(config, inputs.catalogue)


def _width_between(body: nn.Module, block: MISSRecBlock) -> int:
    """Return the width that a module between inputs and block hands on (an MLPBlock in a T4R recipe), 0 without one."""
    modules = list(body.children())
    before = modules[1 : modules.index(block)] if block in modules else []
    sizes = [size for module in before if (size := getattr(module, "output_size", None)) is not None]
    return int(sizes[-1]()[-1]) if sizes else 0


def _update(metric: Any, scores: Tensor, targets: Tensor) -> Tensor:
    """Feed a metric a batch and return its value there.

    T4R's get the target's rank as [batch, cut + 1] scores: exact for one relevant item, ties by row.
    """
    value: Tensor
    if not isinstance(metric, RankingMetric):
        value = metric.forward(scores, targets)
        return value
    cut = int(max(metric.top_ks))
    of_target = scores.gather(1, targets[:, None])
    column = torch.arange(scores.shape[1], device=scores.device)
    ahead = (scores > of_target) | ((scores == of_target) & (column < targets[:, None]))
    place = torch.where(of_target[:, 0] == -torch.inf, cut, ahead.sum(1).clamp_max(cut))
    place = torch.cat([place, place.new_full((1,), cut)])  # T4R's recall fails on a batch of one row
    ladder = torch.arange(cut, -1, -1, device=scores.device, dtype=torch.float32).expand(len(place), -1)
    metric.update(ladder, place)
    metric.metric_mean[-1] = metric.metric_mean[-1][:-1]
    value = metric.metric_mean[-1]
    return value.mean(0)
