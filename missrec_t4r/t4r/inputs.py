"""Multi-modal inputs: hide the target, then hand the visible items to the block that looks them up.

Takes the place of T4R's ``TabularSequenceFeatures``. Items become tokens inside `MISSRecBlock`, out of one pass over
the catalogue per step; what comes out of here is the embedded side features, which the block adds to those tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from merlin.schema import Schema
from torch import Tensor, nn
from transformers4rec.torch import TabularSequenceFeatures
from transformers4rec.torch.masking import masking_registry

from missrec_t4r.config import FeatureScaling, MissingModality, MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import ConfigError, SchemaError
from missrec_t4r.model.event_features import EventFeatureEncoder
from missrec_t4r.schema import UNKNOWN_ROW
from missrec_t4r.t4r.columns import as_core_schema, event_columns, event_feature_name, event_feature_schema, item_column
from missrec_t4r.t4r.loader import PREFIX_ROWS
from missrec_t4r.t4r.masking import PrefixMasking
from missrec_t4r.t4r.state import StepState, VisibleSessions

_DEFAULT = MISSRecConfig()


class CatalogueItems(nn.Module):
    """What T4R's tasks read of a categorical module: the item column's name and this batch's ids.

    Parameters
    ----------
    item_id : str
        Name of the item column.
    """

    item_seq: Tensor

    def __init__(self, item_id: str) -> None:
        super().__init__()
        self.item_id = item_id


class MultiModalSequenceFeatures(TabularSequenceFeatures):
    """Inputs of a model whose items live in a catalogue. Built by `from_schema`.

    Parameters
    ----------
    schema : merlin.schema.Schema
        Columns that are read: the item column and the side features.
    item_id : str
        Name of the item column.
    masking : PrefixMasking
        Hides the target and what comes after it.
    event_features : EventFeatureEncoder or None
        Makes one vector per event of the other columns; the core's own part.
    catalogue : Catalogue or None
        Kept until a `Head` joins these inputs with a block; None when the block brings a finished model.
    settings : dict
        The inputs' share of `MISSRecConfig`.
    """

    def __init__(
        self,
        schema: Schema,
        item_id: str,
        masking: PrefixMasking,
        event_features: EventFeatureEncoder | None,
        catalogue: Catalogue | None,
        settings: dict[str, Any],
    ) -> None:
        super().__init__(categorical_module=CatalogueItems(item_id), masking=masking, schema=schema)
        self.event_features = event_features
        self.event_feature_names = {name: event_feature_name(name) for name in schema.column_names if name != item_id}
        self.catalogue = catalogue
        self.settings = settings
        self.state = StepState()
        batch = torch.Size([-1, settings["max_sequence_length"]])
        self.input_size = dict.fromkeys(
            schema.column_names, batch
        )  # without it T4R's SequentialBlock has no output size

    @classmethod
    def from_schema(
        cls,
        schema: Any,
        *,
        catalogue: Catalogue,
        max_sequence_length: int = _DEFAULT.max_sequence_length,
        masking: str | PrefixMasking = "prefix",
        item_ids: bool = _DEFAULT.item_ids,
        missing_modality: MissingModality = _DEFAULT.missing_modality,
        feature_scaling: FeatureScaling = _DEFAULT.feature_scaling,
        modality_dropout: float = _DEFAULT.modality_dropout,
        id_dropout: float = _DEFAULT.id_dropout,
        mask_untrained_ids: bool = _DEFAULT.mask_untrained_ids,
        embedding_dim_default: int = _DEFAULT.event_feature_width,
        continuous_projection: int | Sequence[int] | None = None,
        event_feature_dropout: float = _DEFAULT.event_feature_dropout,
        event_features: Sequence[EventColumn] | None = None,
    ) -> MultiModalSequenceFeatures:
        """Read the columns from the schema, as T4R's inputs do.

        Parameters
        ----------
        schema : merlin.schema.Schema or merlin_standard_lib.Schema
            Must have one integer list column tagged ITEM_ID. Every other list column tagged CATEGORICAL, CONTINUOUS or
            EMBEDDING is a side feature; choose with ``schema.select_by_name``, as for T4R.
        catalogue : Catalogue
            Its rows are the ids of the item column.
        max_sequence_length : int
            Items that the model sees, the most recent ones.
        masking : str or PrefixMasking
            A masking that hides targets before the look-up: ``"prefix"``.
        item_ids, missing_modality, feature_scaling, modality_dropout, id_dropout, mask_untrained_ids
            As in `MISSRecConfig`.
        event_feature_dropout : float
            As in `MISSRecConfig`.
        embedding_dim_default : int
            Numbers that a category or a vector becomes, as in T4R's ``from_schema``.
        continuous_projection : int or sequence of int, optional
            Numbers that a number becomes (T4R's last layer); by default as many as a category does.
        event_features : sequence of EventColumn, optional
            The side features with what was measured of them (`missrec_t4r.data.event_features.fit_event_columns`), in
            place of
            what the schema tells: it has no statistics, so numbers enter as the workflow left them.

        Raises
        ------
        SchemaError
            The schema has no usable item column, or its domain does not fit the catalogue.
        ConfigError
            The masking shows the target to a body that looks items up itself.
        """
        settings: dict[str, Any] = {
            "max_sequence_length": max_sequence_length,
            "item_ids": item_ids,
            "missing_modality": missing_modality,
            "feature_scaling": feature_scaling,
            "modality_dropout": modality_dropout,
            "id_dropout": id_dropout,
            "mask_untrained_ids": mask_untrained_ids,
            "event_feature_width": embedding_dim_default,
            "event_feature_dropout": event_feature_dropout,
        }
        core_schema = as_core_schema(schema)
        item = item_column(core_schema, catalogue.n_rows).name
        rest = event_feature_schema(core_schema, item)
        if event_features is None:
            projected = continuous_projection or embedding_dim_default
            event_features = event_columns(
                rest, embedding_dim_default, projected if isinstance(projected, int) else projected[-1]
            )
        else:
            rest = _named(rest, event_features)
        encoder = EventFeatureEncoder(event_features, event_feature_dropout) if event_features else None
        read = core_schema.select_by_name([item, *rest.column_names])
        return cls(read, item, _parse_masking(masking), encoder, catalogue, settings)

    def forward(self, inputs: dict[str, Tensor], training: bool = False, testing: bool = False) -> Tensor:
        """Hide the target, publish what is visible, and return the side features.

        Parameters
        ----------
        inputs : dict of str to Tensor [batch, column]
            A batch of T4R's loader or of ours, padded on the right.
        training, testing : bool
            T4R's flags.

        Returns
        -------
        Tensor [batch, column, width]
            Side features of the visible items; one column of zeros where the schema has none. A column that the batch
            lacks counts as absent.
        """
        item = self.categorical_module.item_id
        if item not in inputs:
            raise SchemaError(f"a batch with columns {sorted(inputs)}", f"the item column {item!r}")
        columns = _left_align(inputs, item)
        cut = "last" if PREFIX_ROWS in inputs else None
        visible = self.masking.compute_masked_targets(columns[item], training, testing, cut).schema
        self.categorical_module.item_seq = columns[item]
        columns = {name: self.masking.blank(values, visible) for name, values in columns.items()}
        self.state.show(self._window(columns[item], visible, training))
        if self.event_features is None:
            return torch.zeros(*visible.shape, 1, device=visible.device)
        values = {
            self.event_feature_names[name]: values
            for name, values in columns.items()
            if name in self.event_feature_names
        }
        embedded: Tensor = self.event_features(values, columns[item])
        return embedded

    def _window(self, item_ids: Tensor, visible: Tensor, learning: bool) -> VisibleSessions:
        """Keep the last ``max_sequence_length`` visible items of each row."""
        width = min(self.settings["max_sequence_length"], item_ids.shape[1])
        start = (visible.sum(1, keepdim=True) - width).clamp_min(0)
        window = start + torch.arange(width, device=item_ids.device)
        return VisibleSessions(item_ids.gather(1, window), window, learning)

    def output_size(self, input_size: Any = None) -> torch.Size:  # noqa: ARG002  # T4R passes its own idea of it
        """Return [-1, max_sequence_length, width of the side features]: three dimensions, as T4R's heads demand."""
        width = 1 if self.event_features is None else self.event_features.width
        return torch.Size([-1, self.settings["max_sequence_length"], width])


def _parse_masking(masking: str | PrefixMasking) -> PrefixMasking:
    chosen = masking_registry.parse(masking)(hidden_size=1) if isinstance(masking, str) else masking
    if not isinstance(chosen, PrefixMasking):
        raise ConfigError(
            f"masking {masking!r}",
            "'prefix'",
            "T4R's other maskings leave the target visible to a body that looks items up itself",
        )
    return chosen


def _named(schema: Schema, event_features: Sequence[EventColumn]) -> Schema:
    """Return the schema's columns of these side features, in their order."""
    by_name = {event_feature_name(name): name for name in schema.column_names}
    if missing := [column.name for column in event_features if column.name not in by_name]:
        raise SchemaError(
            f"a schema without the side features {', '.join(missing)}",
            "list columns tagged CATEGORICAL, CONTINUOUS or EMBEDDING",
            "use the schema of the data that the model was trained on",
        )
    return schema.select_by_name([by_name[column.name] for column in event_features])


def _left_align(inputs: dict[str, Tensor], item: str) -> dict[str, Tensor]:
    """Drop null and unknown items from the rows, with their side features; what stays keeps its order."""
    item_ids = inputs[item].long()
    order = torch.argsort((item_ids <= UNKNOWN_ROW).to(torch.int8), dim=1, stable=True)
    aligned = {}
    for name, values in inputs.items():
        if values.dim() >= 2 and values.shape[:2] == item_ids.shape and name != PREFIX_ROWS:
            at = order if values.dim() == 2 else order.unsqueeze(-1).expand(-1, -1, values.shape[-1])
            aligned[name] = values.gather(1, at)
    ids = aligned[item].long()
    aligned[item] = torch.where(ids > UNKNOWN_ROW, ids, torch.zeros_like(ids))
    return aligned
