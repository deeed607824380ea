"""Any Transformers4Rec model with a next-item task as a `Scorer`, so that it is ranked like our own models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import transformers4rec.torch as tr
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError, SchemaError
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.model.missrec import evaluating
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.scorer import protocols_as_it_is
from missrec_t4r.schema import FIRST_ITEM_ROW
from missrec_t4r.t4r.block import MISSRecBlock
from missrec_t4r.t4r.columns import as_core_schema, event_feature_name, event_feature_schema

_LONGEST: Final = 10_000
"""A schema without a limit on the length of sessions states a larger one."""


class T4RScorer:
    """Scores of a T4R model at inference, as it would be deployed.

    Parameters
    ----------
    model : tr.Model
        With one head and one next-item prediction task, ours or T4R's own; other tasks beside it are left out.
    catalogue : Catalogue
        Its rows are the ids of the model's item column.
    max_sequence_length : int, optional
        Last items of a session that the model reads; by default what its inputs or its schema state.

    Raises
    ------
    ConfigError
        The model has no single head with one next-item task, or nothing states the length of its sessions.
    """

    def __init__(self, model: tr.Model, catalogue: Catalogue, max_sequence_length: int | None = None) -> None:
        tasks = {name: task for head in model.heads for name, task in head.prediction_task_dict.items()}
        next_item = [name for name, task in tasks.items() if isinstance(task, tr.NextItemPredictionTask)]
        if len(next_item) != 1 or len(model.heads) != 1:
            raise ConfigError(
                f"a T4R model of {len(model.heads)} heads, with the tasks "
                f"{', '.join(type(task).__name__ for task in tasks.values())}",
                "one head, and one NextItemPredictionTask among its tasks",
                "compare a model of this head: tr.Model(head)",
            )
        self.task = next_item[0] if len(tasks) > 1 else None
        inputs = model.heads[0].body.inputs if hasattr(model.heads[0].body, "inputs") else model.heads[0].body[0]
        self.model, self.catalogue, self.length = model, catalogue, max_sequence_length or _stated_length(inputs)
        self.item = inputs.categorical_module.item_id
        schema = as_core_schema(inputs.schema)  # may name users and counts too, which the model does not read
        self.columns = [self.item, *event_feature_schema(schema, self.item).column_names]
        self.device = next(model.parameters()).device
        self.fallback = Popularity.fit(catalogue)

    @property
    def protocols(self) -> Sequence[str]:
        """The protocols under which the model can be ranked as it is; with our score terms not ``kept_strict``."""
        core = next((module.core for module in self.model.modules() if isinstance(module, MISSRecBlock)), None)
        return PROTOCOLS if core is None else protocols_as_it_is(core)

    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row], -inf for rows that are no items; sessions without a known item get popularity.

        Raises
        ------
        SchemaError
            The model has another number of items than the catalogue, or reads columns that the sessions lack.
        """
        everyone = range(len(histories))
        batch = {self.item: torch.from_numpy(histories.padded(everyone, self.length)).to(self.device)}
        columns = {event_feature_name(column): column for column in self.columns}
        for name, values in histories.padded_features(everyone, self.length).items():
            batch[columns.get(name, name)] = torch.from_numpy(values).to(self.device)
        if missing := [name for name in self.columns if name not in batch]:
            raise SchemaError(
                f"sessions without {', '.join(missing)}",
                "the columns that the model reads",
                "load the sessions with these event features",
            )
        with evaluating(self.model):
            output = self.model(batch)
        scores: Tensor = (output if self.task is None else output[self.task]).float()
        if scores.shape != (len(histories), self.catalogue.n_rows):
            raise SchemaError(
                f"scores of shape {tuple(scores.shape)}",
                f"{(len(histories), self.catalogue.n_rows)}: one per session and row of the catalogue",
                "train the model with the schema of this data folder, and leave top_k=None",
            )
        scores[:, :FIRST_ITEM_ROW] = -torch.inf
        empty = torch.from_numpy(histories.lengths == 0).to(self.device)
        return torch.where(empty[:, None], self.fallback(histories).to(scores), scores) if empty.any() else scores


def _stated_length(inputs: Any) -> int:
    """Return how many items of a session a T4R model reads, by its inputs or its schema."""
    if length := getattr(inputs, "max_sequence_length", None):
        return int(length)
    items = list(inputs.schema.select_by_name(inputs.categorical_module.item_id))
    longest = items[0].properties.get("value_count", {}).get("max") if items else None
    if not longest or longest > _LONGEST:
        raise ConfigError(
            "a T4R model whose schema does not state the length of its sessions",
            "the last items of a session that it reads",
            "give --max-sequence-length",
        )
    return int(longest)


def load_saved(folder: Path) -> tr.Model:
    """Read what ``model.save(folder)`` wrote: a pickle, which can run any code.

    Raises
    ------
    CheckpointError
    """
    try:
        return tr.Model.load(folder)
    except Exception as error:  # a pickle fails in as many ways as it has classes
        raise CheckpointError(
            f"{folder} cannot be read ({type(error).__name__}: {error})",
            "what model.save(folder) wrote with the installed versions",
            "save the model again",
        ) from error
