"""Event features of requests: one JSON object per session with raw values, encoded as in training.

    {"event_type": ["view", null, "purchase"], "dwell_seconds": [3.5, 0, 40]}

The request field is called ``side``. The lists are as long as the session's item ids, oldest first; null is an unknown
value. A session without the object, a missing column and a null all count as absent, for which the model has a learned
vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from missrec_t4r.arrays import Ints
from missrec_t4r.data.event_features import EventArrays, EventColumn
from missrec_t4r.errors import DataError, ServingError

SessionEventFeatures = Mapping[str, Sequence[Any]]
"""Raw values by column, one per item id of the session."""
MOST_CHARACTERS = 1 << 21
"""Longer event features of one session are refused before they are parsed: JSON takes many times its size in memory."""


def write_event_features(event_features: SessionEventFeatures | None) -> bytes:
    """Encode one session's event features as JSON; empty for a session without any.

    Raises
    ------
    DataError
        The values are not numbers, texts or lists of them.
    """
    try:
        return json.dumps(dict(event_features)).encode() if event_features else b""
    except (TypeError, ValueError) as error:
        raise DataError(
            f"event features that JSON cannot represent ({error})", "lists of texts, numbers or None by column"
        ) from error


class EventFeatureReader:
    """Decode the event features of requests for one model.

    Parameters
    ----------
    columns : sequence of EventColumn
        Columns that the model was trained with; empty for a model without event features.
    """

    def __init__(self, columns: Sequence[EventColumn]) -> None:
        self.columns = {column.name: column for column in columns}

    def read(self, text: bytes, n_events: int) -> EventArrays:
        """Return one session's codes, numbers and vectors by column, [seq] or [seq, size].

        Parameters
        ----------
        text : bytes
            JSON object; empty is no event feature.
        n_events : int
            Item ids of the session.

        Raises
        ------
        ServingError
            Too long, no JSON object, a column that the model does not have, or a list of another length than the
            session.
        DataError
            Values of another kind than the column's.
        """
        if not text:
            return {}
        if len(text) > MOST_CHARACTERS:
            raise ServingError(f"event features of {len(text)} characters", f"at most {MOST_CHARACTERS} per session")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServingError(f"event features that are not JSON ({error})", "one object per session") from error
        if not isinstance(content, dict):
            raise ServingError(f"event features of type {type(content).__name__}", "one JSON object per session")
        try:
            return self.encode(content, n_events)
        except (ValueError, RecursionError, OverflowError) as error:
            raise ServingError(f"event features that cannot be read ({error})", "numbers, texts or vectors") from error

    def encode(self, event_features: SessionEventFeatures, n_events: int) -> EventArrays:
        """Encode parsed values as `read` does, with the same errors."""
        for name, values in event_features.items():
            if name not in self.columns:
                expected = ", ".join(self.columns) or "none: this model was trained without event features"
                raise ServingError(f"event feature {name!r}", expected)
            if not isinstance(values, list) or len(values) != n_events:
                found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
                raise ServingError(
                    f"event feature {name!r} with {found} for {n_events} item ids",
                    "one value per item id",
                    "send null where a value is unknown",
                )
        with np.errstate(all="ignore"):  # numbers beyond float32 become infinite, which the model reads as absent
            return {name: self.columns[name].encode(values) for name, values in event_features.items()}

    def stacked(self, sessions: Sequence[EventArrays], rows: Ints) -> EventArrays:
        """Return the event features of a batch by column, [batch, seq] or [batch, seq, size], aligned with its rows.

        Parameters
        ----------
        sessions : sequence of dict
            From `read`, whole sessions.
        rows : ndarray [batch, seq], int64
            The last rows of each session, 0-padded on the right.
        """
        lengths = (rows > 0).sum(1)  # [batch]
        arrays: EventArrays = {}
        for name in {name for session in sessions for name in session}:
            absent = self.columns[name].encode([None])  # [1] or [1, size]: padding, and sessions without the column
            arrays[name] = np.repeat(absent[None], rows.size, 0).reshape(*rows.shape, *absent.shape[1:])
            for index, session in enumerate(sessions):
                if name in session and lengths[index]:
                    arrays[name][index, : lengths[index]] = session[name][-lengths[index] :]  # rows are the last ids
        return arrays
