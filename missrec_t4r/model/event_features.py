"""Event features: categories, numbers and vectors of an event, added to its item's embedding (ours).

    token(t) = item embedding of t + P [e_1(x_1t) ; … ; e_n(x_nt)]

e_c turns the value of column c into ``width`` numbers of about unit length together: an embedding of a category, a
soft one-hot of a standardised number times a table, a projection of a scaled vector. Where a value is missing (a
request without the column, a null, NaN, padding) e_c is a learned vector instead; `dropout` trains it. What belongs to
event t is known together with item t, so that no position depends on its target. In Transformers4Rec the parts are the
embeddings, soft embeddings and pre-trained embeddings of ``TabularSequenceFeatures``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import SchemaError
from missrec_t4r.schema import PADDING_ROW, UNKNOWN_ROW
from missrec_t4r.tracing import sizes

EventValues = Mapping[str, Tensor]
"""By column: codes or numbers [batch, seq], vectors [batch, seq, size]; a column may be missing."""

_BINS, _REACH = 11, 2.5
"""Bins of a soft one-hot, spread evenly over so many standard deviations to both sides."""


class EventFeatures(nn.Module):
    """Embed event features and project them to the width of an item embedding.

    Parameters
    ----------
    encoder : EventFeatureEncoder
        Encodes the columns of an event as one vector.
    d_model : int
        Width of an item embedding.
    """

    def __init__(self, encoder: EventFeatureEncoder, d_model: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = nn.Linear(encoder.width, d_model, bias=False)

    @property
    def columns(self) -> tuple[EventColumn, ...]:
        """The columns that are read, and their scaling."""
        return self.encoder.columns

    def reset_parameters(self) -> None:
        """Initialise so that each column weighs about as much as a modality does."""
        self.encoder.reset_parameters()
        nn.init.normal_(self.projection.weight, std=0.02)

    def forward(self, values: EventValues, item_ids: Tensor) -> Tensor:
        """Return what is added to the item embeddings, [batch, seq, dim].

        Parameters
        ----------
        values : mapping of str to Tensor [batch, seq] or [batch, seq, size]
            Of the columns that are known; the rest counts as absent.
        item_ids : Tensor [batch, seq], int64
            The items that the values belong to.
        """
        return cast(Tensor, self.projection(self.encoder(values, item_ids)))


class EventFeatureEncoder(nn.Module):
    """One vector per event out of its columns, side by side.

    Parameters
    ----------
    columns : sequence of EventColumn
        Fitted ones (`fit_event_columns`).
    dropout : float
        In training, the probability that a session loses all of its event features, and once more that it loses each
        of them alone: requests may lack them.
    """

    def __init__(self, columns: Sequence[EventColumn], dropout: float = 0.0) -> None:
        super().__init__()
        self.columns, self.dropout = tuple(columns), dropout
        self.width = sum(column.width for column in columns)
        self.encoders = nn.ModuleList(_ENCODERS[column.kind](column) for column in columns)
        self.absent = nn.ParameterList(nn.Parameter(torch.empty(column.width)) for column in columns)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all tables so that a value's vector has about unit length."""
        for column, encoder, absent in zip(self.columns, self.encoders, self.absent, strict=True):
            nn.init.normal_(cast(Tensor, encoder.weight), std=1 / math.sqrt(column.width))
            nn.init.zeros_(absent)

    def forward(self, values: EventValues, item_ids: Tensor) -> Tensor:
        """Return [batch, seq, sum of the columns' widths].

        Raises
        ------
        SchemaError
            A column comes in another shape or type than the model was built for.
        """
        gone = self._dropped(item_ids)
        parts = []
        for index, (column, encoder, absent) in enumerate(zip(self.columns, self.encoders, self.absent, strict=True)):
            value = values.get(column.name)
            if value is None:
                parts.append(absent.expand(*item_ids.shape, -1))
                continue
            _check(column, value, item_ids)
            vector, known = encoder(value)
            if gone is not None:
                known = known & ~gone[:, index, None]
            parts.append(torch.where(known.unsqueeze(-1), vector, absent))
        return torch.cat(parts, -1)

    def out_of_reach(self, values: EventValues, real: Tensor) -> list[str]:
        """Return the columns of numbers most of which are beyond the range that a soft one-hot tells apart.

        Parameters
        ----------
        values : mapping of str to Tensor [batch, seq]
        real : Tensor [batch, seq], bool
            True where there is an event.
        """
        names = []
        for column, encoder in zip(self.columns, self.encoders, strict=True):
            if isinstance(encoder, _Number) and (value := values.get(column.name)) is not None:
                scaled, known = encoder.scaled(value[real])
                if int((scaled.abs() > _REACH).sum()) > int(known.sum()) / 2:
                    names.append(column.name)
        return names

    def _dropped(self, item_ids: Tensor) -> Tensor | None:
        """Return which sessions lose which columns, [batch, column]."""
        if not self.training or not self.dropout:
            return None
        draws = torch.rand(len(item_ids), 1 + len(self.columns), device=item_ids.device)
        lost = draws < self.dropout
        return lost[:, 1:] | lost[:, :1]


class _Category(nn.Module):
    """Embedding of a code; codes that training did not have are the unknown one."""

    def __init__(self, column: EventColumn) -> None:
        super().__init__()
        self.size = max(column.size, UNKNOWN_ROW + 1)
        self.weight = nn.Parameter(torch.empty(self.size, column.width))

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        code = torch.where((value < 0) | (value >= self.size), UNKNOWN_ROW, value).long()
        return nn.functional.embedding(code, self.weight), code != PADDING_ROW


class _Number(nn.Module):
    """Soft one-hot of the standardised number times a table: any curve, bounded for outliers."""

    centres: Tensor

    def __init__(self, column: EventColumn) -> None:
        super().__init__()
        self.log, self.mean, self.std = column.log, column.mean, column.std
        self.weight = nn.Parameter(torch.empty(_BINS, column.width))
        self.register_buffer("centres", torch.linspace(-_REACH, _REACH, _BINS), persistent=False)

    def scaled(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised numbers, and which of them are known."""
        number = value.to(self.centres.dtype)
        known = torch.isfinite(number)
        number = torch.where(known, number, 0.0)
        number = torch.log1p(number.clamp_min(0.0)) if self.log else number
        return (number - self.mean) / self.std, known

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        scaled, known = self.scaled(value)
        scaled = scaled.clamp(-_REACH, _REACH)
        distance = (scaled.unsqueeze(-1) - self.centres) * ((_BINS - 1) / (2 * _REACH))  # in bins
        return torch.softmax(-distance.square(), -1) @ self.weight, known


class _Vector(nn.Module):
    """Projection of a pre-trained vector; all zeros mean that there is none."""

    def __init__(self, column: EventColumn) -> None:
        super().__init__()
        self.std = column.std
        self.weight = nn.Parameter(torch.empty(column.size, column.width))

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        vector = value.to(self.weight.dtype)
        known = torch.isfinite(vector).all(-1) & (vector != 0).any(-1)
        vector = torch.where(known.unsqueeze(-1), vector, 0.0)
        return (vector / self.std) @ self.weight, known


_ENCODERS = {"categorical": _Category, "continuous": _Number, "pretrained": _Vector}


def _check(column: EventColumn, value: Tensor, item_ids: Tensor) -> None:
    expected = (*sizes(item_ids), column.size) if column.kind == "pretrained" else sizes(item_ids)
    if sizes(value) != expected or (column.kind == "categorical" and value.is_floating_point()):
        raise SchemaError(
            f"event feature {column.name!r} comes as {value.dtype} of shape {list(value.shape)}",
            f"{'codes' if column.kind == 'categorical' else 'numbers'} of shape {list(expected)}",
            "give one value per item of the session",
        )
