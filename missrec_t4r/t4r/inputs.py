"""Multi-modal inputs: hide the target, pass the visible items on, embed the event features.

Takes the place of T4R's ``TabularSequenceFeatures``. Items are embedded in `MISSRecBlock`, by one pass over the
catalogue per step; the output of the inputs is the embedded event features, which the block adds to the item
embeddings.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from merlin.schema import Schema
from torch import Tensor, nn
from transformers4rec.torch import TabularSequenceFeatures
from transformers4rec.torch.masking import masking_registry

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import AUTO, NONE, EventColumn
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.model.event_features import EventFeatureEncoder
from missrec_t4r.schema import FIRST_ITEM_ROW, LIST_SUFFIX, NULL_ROW, UNKNOWN_ROW
from missrec_t4r.t4r.columns import (
    as_core_schema,
    event_column,
    event_feature_name,
    event_feature_schema,
    item_column,
    one_per_session,
)
from missrec_t4r.t4r.loader import PREFIX_ROWS
from missrec_t4r.t4r.masking import PrefixMasking
from missrec_t4r.t4r.settings import PartSettings
from missrec_t4r.t4r.state import StepState, VisibleSessions
from missrec_t4r.tracing import sizes

log = logging.getLogger(__name__)

_MOST_EXPANDED = 1 << 16
"""Items [prefix, seq] of a training step whose rows are expanded into prefixes; beyond it a random part of the prefixes
is trained, so that memory is bounded."""


_CHECKED_BATCHES = 50
"""Batches in which full rows are looked for."""


class CatalogueItems(nn.Module):
    """Stand-in for T4R's categorical module: the item column's name and the current batch's item ids.

    Parameters
    ----------
    item_id : str
        Name of the item column.
    """

    item_seq: Tensor

    def __init__(self, item_id: str) -> None:
        super().__init__()
        self.item_id = item_id

    def __getattr__(self, name: str) -> Any:
        """Say why T4R's own next-item task finds no table of item embeddings here; called for what is not there."""
        if name == "item_embedding_table":
            raise NoItemTableError(
                "T4R's NextItemPredictionTask on MultiModalSequenceFeatures, which have no table of item embeddings",
                "MISSRecBlock and MISSRecNextItemTask beside these inputs",
                "swap all three: tr.SequentialBlock(inputs, MISSRecBlock(...)), tr.Head(body, [MISSRecNextItemTask()])",
            )
        return super().__getattr__(name)


class NoItemTableError(ConfigError, AttributeError):
    """Two of the three objects are swapped; an `AttributeError` too, since torch's trace asks for all attributes."""


class MultiModalSequenceFeatures(TabularSequenceFeatures):
    """Inputs of a model whose items live in a catalogue. Built by `from_schema`.

    Parameters
    ----------
    schema : merlin.schema.Schema
        Columns that are read: the item column and the event features.
    item_id : str
        Name of the item column.
    masking : PrefixMasking
        Hides the target and what comes after it.
    event_features : EventFeatureEncoder or None
        Embeds the other columns, one vector per event; shared with the core.
    catalogue : Catalogue or None
        Kept until a `Head` joins these inputs with a block; None if the block has a model already.
    settings : PartSettings
        The config and the settings that the inputs were given.
    """

    n_rows = 0
    """Rows of the catalogue; 0 before a `Head` joins the inputs with a core, and in models of earlier versions."""
    checked_event_features = False
    """Whether the event features of a training batch were looked at."""

    def __init__(
        self,
        schema: Schema,
        item_id: str,
        masking: PrefixMasking,
        event_features: EventFeatureEncoder | None,
        catalogue: Catalogue | None,
        settings: PartSettings,
    ) -> None:
        super().__init__(categorical_module=CatalogueItems(item_id), masking=masking, schema=schema)
        self.event_features = event_features
        self.event_feature_names = {name: event_feature_name(name) for name in schema.column_names if name != item_id}
        self.catalogue = catalogue
        if catalogue is not None:
            self.n_rows = catalogue.n_rows
        self.settings = settings
        self.state = StepState()
        self.causal = False
        """Whether the block attends causally: then one pass trains all positions of a row."""
        self.max_sequence_length: int = settings["max_sequence_length"]
        counts = schema.column_schemas[item_id].properties.get("value_count") or {}
        self.longest: int | None = counts.get("max") or None
        """Items of the longest row, as the schema states it."""
        self.checked_batches = 0
        batch = torch.Size([-1, self.max_sequence_length])
        self.input_size = dict.fromkeys(schema.column_names, batch)  # T4R's SequentialBlock needs it for output sizes

    @classmethod
    def from_schema(
        cls,
        schema: Any,
        *,
        catalogue: Catalogue,
        config: MISSRecConfig | None = None,
        masking: str | PrefixMasking = "prefix",
        embedding_dim_default: int | None = None,
        continuous_projection: int | Sequence[int] | None = None,
        event_features: str | Sequence[EventColumn] | None = None,
        **settings: Any,
    ) -> MultiModalSequenceFeatures:
        """Read the columns from the schema, as T4R's inputs do.

        Parameters
        ----------
        schema : merlin.schema.Schema or merlin_standard_lib.Schema
            Must have one integer list column tagged ITEM_ID. Every other list column tagged CATEGORICAL, CONTINUOUS or
            EMBEDDING is an event feature; choose with ``schema.select_by_name``, as for T4R, or by ``event_features``.
            Columns with one value for a session are not read, which the log says.
        catalogue : Catalogue
            Its rows are the ids of the item column.
        config : MISSRecConfig, optional
            By default that of the other parts, or of the recipe ``default``.
        masking : str or PrefixMasking
            A masking that hides targets before the look-up: ``"prefix"``.
        embedding_dim_default : int, optional
            Embedding width of a category or a vector, as in T4R's ``from_schema``; another name of the setting
            ``event_feature_width``.
        continuous_projection : int or sequence of int, optional
            Embedding width of a number (T4R's last layer); by default that of a category.
        event_features : str or sequence of EventColumn, optional
            The setting of the same name (``"price,category"``); or the event features with their statistics
            (`missrec_t4r.data.event_features.fit_event_features`), in place of those of the schema, which has none: its
            numbers are used as the workflow left them.
        **settings
            Any setting of `MISSRecConfig`, such as ``max_sequence_length`` or ``item_ids``; they win over ``config``.

        Raises
        ------
        SchemaError
            The schema has no usable item column, or its domain does not fit the catalogue.
        ConfigError
            An unknown setting, or a masking that leaves the target visible to a body that looks items up itself.
        """
        if not isinstance(catalogue, Catalogue):
            raise ConfigError(
                f"catalogue of type {type(catalogue).__name__}",
                "a Catalogue",
                'read it first: Catalogue.load("work/data/catalogue")',
            )
        if embedding_dim_default is not None:
            settings = {"event_feature_width": embedding_dim_default, **settings}
        if isinstance(event_features, str):
            settings, event_features = {"event_features": event_features, **settings}, None
        part = PartSettings("MultiModalSequenceFeatures", config, settings)
        core_schema = as_core_schema(schema)
        column = item_column(core_schema, catalogue.n_rows)
        item, domain = column.name, column.int_domain
        if domain is not None and domain.max is not None and domain.max in (catalogue.n_items, catalogue.n_items - 1):
            log.warning(
                f"the schema has ids of {item!r} up to {int(domain.max)}, as if the catalogue's {catalogue.n_items} "
                f"items were numbered from {int(domain.max) - catalogue.n_items + 1}: they are rows from "
                f"{FIRST_ITEM_ROW}. If so, every id means another item: make the catalogue of your workflow with "
                "`missrec catalogue adopt`"
            )
        columns = event_feature_schema(core_schema, item)
        if event_features is None:
            if (left := one_per_session(core_schema)) and part["event_features"] == AUTO:
                log.warning(
                    f"not read: {', '.join(left)}, with one value for a session. Columns of events are read: "
                    'aggregate them as lists in the workflow (Groupby(aggs={"country": ["list"]})), or leave them out '
                    "of the schema"
                )
            columns = _chosen(columns, part["event_features"])
            width = part["event_feature_width"]
            number_width = continuous_projection or width
            if not isinstance(number_width, int):
                number_width = number_width[-1]
            event_features = [event_column(column, width, number_width) for column in columns]
        else:
            columns = _named(columns, [column.name for column in event_features])
        encoder = EventFeatureEncoder(event_features, part["event_feature_dropout"]) if event_features else None
        read = core_schema.select_by_name([item, *columns.column_names])
        return cls(read, item, _parse_masking(masking), encoder, catalogue, part)

    def forward(self, inputs: dict[str, Tensor], training: bool = False, testing: bool = False) -> Tensor:
        """Hide the target, store the visible items in `StepState`, and return the embedded event features.

        Parameters
        ----------
        inputs : dict of str to Tensor [batch, column]
            A batch of T4R's loader or of ours, padded on the right.
        training, testing : bool
            T4R's flags.

        Returns
        -------
        Tensor [batch, column, width]
            Event features of the visible items; zeros of width 1 if the schema has none. A column that is not in the
            batch counts as missing values.
        """
        item = self.categorical_module.item_id
        if item not in inputs:
            raise SchemaError(f"a batch with columns {sorted(inputs)}", f"the item column {item!r}")
        if inputs[item].device.type == "cpu" and not torch.jit.is_tracing():  # a GPU would have to be waited for
            self._require_rows(inputs[item])
        are_prefixes = PREFIX_ROWS in inputs
        if (training or testing) and not are_prefixes and self.checked_batches < _CHECKED_BATCHES:
            self._warn_of_cut_rows(inputs[item])
        columns = _left_align(inputs, item)
        if training and not self.checked_event_features:
            self._check_event_features(inputs, columns, item)
        longest = None
        all_targets = training and self.masking.cut == "all" and not are_prefixes
        if all_targets and self.causal:
            visible = self._all_positions(columns[item])
        elif all_targets and int((columns[item] > 0).sum(1).max()) > 1:
            row, target, first, longest = _all_prefixes(columns[item])
            shape = columns[item].shape
            columns = {name: values[row] if values.shape[:2] == shape else values for name, values in columns.items()}
            visible = self.masking.info_at(columns[item], target, first).schema
        else:
            rows = columns[item]
            if testing and not training:  # where the last item is unknown, an earlier one is no target
                rows = rows * _last_is_known(inputs[item])
            cut = "last" if are_prefixes else None
            visible = self.masking.compute_masked_targets(rows, training, testing, cut).schema
        self.categorical_module.item_seq = columns[item]
        columns = {name: self.masking.blank(values, visible) for name, values in columns.items()}
        window = self._window(visible)
        self.state.show(
            VisibleSessions(
                columns[item].gather(1, window),
                window,
                learning=training,
                every_position=all_targets and self.causal,
                one_target=training and are_prefixes,
                longest=longest,
            )
        )
        if self.event_features is None:
            return torch.zeros(*visible.shape, 1, device=visible.device)
        nullable = {column.name for column in self.event_features.columns if column.values}
        features = {}
        for name, short in self.event_feature_names.items():
            if name in columns:
                # a null (1) is a missing value where raw values are known, as in `load_sessions`
                values = columns[name]
                features[short] = torch.where(values == NULL_ROW, 0, values) if short in nullable else values
        embedded: Tensor = self.event_features(features, columns[item])
        return embedded

    def _require_rows(self, item_ids: Tensor) -> None:
        if self.n_rows and item_ids.numel() and (largest := int(item_ids.max())) >= self.n_rows:
            raise DataError(
                f"column {self.categorical_module.item_id!r} holds {largest}",
                f"at most {self.n_rows - 1}, the last row of the catalogue",
                "give sessions that the workflow of this catalogue encoded; they hold rows, not raw ids",
            )

    def _check_event_features(self, inputs: dict[str, Tensor], columns: dict[str, Tensor], item: str) -> None:
        """Warn, of the first training batch, of event features that it lacks, and of numbers that look all the same."""
        self.checked_event_features = True
        absent = [
            f"{name} of shape {list(inputs[name].shape)}" if name in inputs else name
            for name in sorted(set(self.event_feature_names) - set(columns))
        ]
        if absent:
            log.warning(
                f"no values for the event features {', '.join(absent)} in a training batch of shape "
                f"{list(inputs[item].shape)} with columns {', '.join(sorted(columns))}: they are trained as missing. "
                "Give the loader or Trainer the schema of the inputs, and lists as long as the items'"
            )
        if self.event_features is None:
            return
        values = {self.event_feature_names[name]: columns[name] for name in self.event_feature_names if name in columns}
        if beyond := self.event_features.out_of_reach(values, columns[item] > 0):
            log.warning(
                f"most values of {', '.join(beyond)} in a training batch are beyond the range that is told apart, and "
                "so look all the same: Normalize them in the workflow, or build the inputs with "
                'event_features=fit_event_features("work/data") of missrec_t4r.data.event_features'
            )

    def _warn_of_cut_rows(self, item_ids: Tensor) -> None:
        """Warn once if the loader may have cut rows: T4R's keeps the first items and drops the last, the target."""
        self.checked_batches += 1
        width = item_ids.shape[1]
        if (self.longest is not None and self.longest <= width) or not (full := int((item_ids[:, -1] > 0).sum())):
            return
        self.checked_batches = _CHECKED_BATCHES
        longest = "no limit to" if self.longest is None else f"up to {self.longest} items in"
        log.warning(
            f"{full} of {len(item_ids)} rows of a batch fill all {width} columns, and the schema states {longest} a "
            "list: T4R's loader keeps the first items of longer lists; their last items, the targets, are lost. Give "
            "the loader the full length (max_sequence_length of T4RecTrainingArguments; the model reads the last "
            f"{self.max_sequence_length}), cut the lists to their last {width} in the workflow and state it in the "
            'schema, or set data_loader_engine="missrec"'
        )

    def _all_positions(self, item_ids: Tensor) -> Tensor:
        """Label every position of a window of each row, and return what is visible, [batch, column], bool.

        A row of more than ``max_sequence_length + 1`` items is trained on a random window of that length.
        """
        n_labels = ((item_ids > 0).sum(1) - 1).clamp_min(0)  # [batch]
        spare = (n_labels - self.max_sequence_length).clamp_min(0)
        first = (torch.rand(spare.shape, device=spare.device, dtype=torch.float64) * (spare + 1)).long()
        target = torch.minimum(first + self.max_sequence_length, n_labels)
        target = torch.where(n_labels > 0, target, (item_ids > 0).sum(1))
        return self.masking.info_at(item_ids, target, first).schema

    def _window(self, visible: Tensor) -> Tensor:
        """Return the columns of the last ``max_sequence_length`` visible items of each row, [batch, seq]."""
        steps = torch.arange(self.max_sequence_length, device=visible.device)[: visible.shape[1]]  # in a trace too
        return (visible.sum(1, keepdim=True) - steps.shape[0]).clamp_min(0) + steps

    def output_size(self, input_size: Any = None) -> torch.Size:  # T4R's signature
        """Return [-1, max_sequence_length, width of the event features]: T4R's heads need three dimensions."""
        width = 1 if self.event_features is None else self.event_features.width
        return torch.Size([-1, self.max_sequence_length, width])


def _parse_masking(masking: str | PrefixMasking) -> PrefixMasking:
    if isinstance(masking, str) and masking in masking_registry:
        masking = masking_registry.parse(masking)(hidden_size=1)
    if not isinstance(masking, PrefixMasking):
        raise ConfigError(
            f"masking {masking!r}",
            "'prefix', since T4R's other maskings leave the target visible to a body that looks items up itself",
            "leave masking out",
        )
    return masking


def _chosen(schema: Schema, setting: str) -> Schema:
    """Return the columns that the setting ``event_features`` chooses."""
    if setting == AUTO:
        return schema
    names = [] if setting == NONE else [name.strip() for name in setting.split(",") if name.strip()]
    return _named(schema, [name.removesuffix(LIST_SUFFIX) for name in names])


def _named(schema: Schema, names: Sequence[str]) -> Schema:
    """Return the columns of these event features, in this order."""
    columns = {event_feature_name(column): column for column in schema.column_names}
    if missing := [name for name in names if name not in columns]:
        raise SchemaError(
            f"a schema without the event features {', '.join(missing)}",
            "list columns tagged CATEGORICAL, CONTINUOUS or EMBEDDING",
            "use the schema of the data that the model was trained on",
        )
    return schema.select_by_name([columns[name] for name in names])


def _all_prefixes(item_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Expand rows into their prefixes.

    The longest prefix of a row is always there, since other tasks have a label for every row; where it is not drawn, or
    has nothing after it, without a label of its own.

    Returns
    -------
    tuple of Tensor
        Row, position of the target and position of the first label of each prefix, [prefix]; the longest prefix of
        each row, [batch].
    """
    n_prefixes = ((item_ids > 0).sum(1) - 1).clamp_min(1)  # [batch]
    row = torch.repeat_interleave(n_prefixes)  # [prefix]
    target = 1 + torch.arange(len(row), device=row.device) - (n_prefixes.cumsum(0) - n_prefixes)[row]
    first, longest = target - 1, n_prefixes.cumsum(0) - 1
    most = max(1, _MOST_EXPANDED // item_ids.shape[1])
    if len(row) > most:
        is_drawn = torch.zeros_like(row, dtype=torch.bool)
        is_drawn[torch.randperm(len(row), device=row.device)[:most]] = True
        is_kept = is_drawn.index_fill(0, longest, True)
        first, longest = torch.where(is_drawn, first, target), is_kept.cumsum(0)[longest] - 1
        row, target, first = row[is_kept], target[is_kept], first[is_kept]
    return row, target, first, longest


def _last_is_known(item_ids: Tensor) -> Tensor:
    """Return which rows end with a known item, [batch, 1]."""
    last = ((item_ids > 0).sum(1, keepdim=True) - 1).clamp_min(0)
    return item_ids.gather(1, last) > UNKNOWN_ROW


def _left_align(inputs: dict[str, Tensor], item: str) -> dict[str, Tensor]:
    """Drop null and unknown items with their event features, and move the rest left in its order."""
    item_ids = inputs[item].long()
    shape = sizes(item_ids)
    order = torch.argsort((item_ids <= UNKNOWN_ROW).to(torch.int8), dim=1, stable=True)  # known items first
    aligned = {}
    for name, values in inputs.items():
        if values.dim() >= 2 and sizes(values)[:2] == shape and name != PREFIX_ROWS:
            at = order if values.dim() == 2 else order.unsqueeze(-1).expand(-1, -1, values.shape[-1])
            aligned[name] = values.gather(1, at)
    ids = aligned[item].long()
    aligned[item] = torch.where(ids > UNKNOWN_ROW, ids, torch.zeros_like(ids))
    return aligned
