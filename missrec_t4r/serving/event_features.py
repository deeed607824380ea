"""Side features on the wire: one JSON object per session, values as the shop knows them, encoded as training did.

    {"event_type": ["view", null, "purchase"], "dwell_seconds": [3.5, 0, 40]}

The lists are as long as the session's item ids, oldest first; null says that a value is not known. A session without
the object, a column that is left out and a null all count as absent, for which the model has a learned vector.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.data.event_features import EventArrays, EventColumn
from missrec_t4r.errors import DataError, ServingError

SessionEventFeatures = Mapping[str, Sequence[Any]]
"""Raw values by column, one per item id of the session."""


def write_event_features(event_features: SessionEventFeatures | None) -> bytes:
    """Return what a request carries for one session; nothing for a session without side features.

    Raises
    ------
    DataError
        The values are no numbers, texts or lists of them.
    """
    try:
        return json.dumps(dict(event_features)).encode() if event_features else b""
    except (TypeError, ValueError) as error:
        raise DataError(
            f"side features that JSON cannot carry ({error})", "lists of texts, numbers or None by column"
        ) from error


class EventFeatureReader:
    """Reads the side features of requests for one model.

    Parameters
    ----------
    columns : sequence of EventColumn
        What the model was trained with; empty for a model without side features.
    """

    def __init__(self, columns: Sequence[EventColumn]) -> None:
        self.columns = {column.name: column for column in columns}

    def read(self, text: bytes, n_events: int) -> EventArrays:
        """Return one session's codes, numbers and vectors, [event] or [event, size] by column.

        Raises
        ------
        ServingError
            No JSON object, a column that the model does not have, or a list that is not as long as the session.
        DataError
            Values of another kind than the column's.
        """
        if not text:
            return {}
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ServingError(f"side features that are no JSON ({error})", "one object per session") from error
        if not isinstance(content, dict):
            raise ServingError(f"side features of type {type(content).__name__}", "one JSON object per session")
        try:
            return self.encode(content, n_events)
        except (ValueError, RecursionError, OverflowError) as error:
            raise ServingError(f"side features that cannot be read ({error})", "numbers, texts or vectors") from error

    def encode(self, event_features: SessionEventFeatures, n_events: int) -> EventArrays:
        """Return what `read` returns, of values that are parsed already; errors are the same."""
        for name, values in event_features.items():
            if name not in self.columns:
                known = ", ".join(self.columns) or "none: this model was trained without side features"
                raise ServingError(f"side feature {name!r}", known)
            if not isinstance(values, list) or len(values) != n_events:
                found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
                raise ServingError(
                    f"side feature {name!r} with {found} for {n_events} item ids",
                    "one value per item id",
                    "send null where a value is not known",
                )
        return {name: self.columns[name].encode(values) for name, values in event_features.items()}

    def stacked(self, sessions: Sequence[EventArrays], rows: npt.NDArray[np.int64]) -> EventArrays:
        """Return the side features of a batch, aligned with its rows; absent where a session has none.

        Parameters
        ----------
        sessions : sequence of dict
            From `read`, whole sessions.
        rows : ndarray [batch, seq], int64
            The last rows of each session, 0-padded on the right.
        """
        kept = (rows > 0).sum(1)
        arrays: EventArrays = {}
        for name in {name for session in sessions for name in session}:
            column = self.columns[name]
            nothing = column.encode([None])
            arrays[name] = np.repeat(nothing[None], rows.size, 0).reshape(*rows.shape, *nothing.shape[1:])
            for line, session in enumerate(sessions):
                if name in session and kept[line]:
                    arrays[name][line, : kept[line]] = session[name][-kept[line] :]
        return arrays
