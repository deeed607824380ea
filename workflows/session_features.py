"""Session features: what `missrec etl` does by itself, operator by operator. Copy this file and edit it.

    python workflows/session_features.py --interactions events.parquet --items items.parquet --out work/data
    missrec etl --workflow workflows/session_features.py --interactions ...     # the same

`session_workflow` takes the columns of the cleaned events and returns an nvtabular.Workflow that is not fitted. The
request transform of the served model is compiled from it; docs/howto/etl.md lists the operators that can be compiled.
"""

import sys

import missrec_t4r.etl  # noqa: F401  # before Merlin: it sets what Merlin needs

# isort: split
from merlin.schema import Tags
from nvtabular import Workflow, ops

from missrec_t4r.cli import app
from missrec_t4r.etl.event_settings import CLOCK
from missrec_t4r.etl.nvt.event_ops import SessionGap, TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby, SessionSlice
from missrec_t4r.etl.nvt.workflow_file import EventColumns

TIME_FEATURES: list[str] = []  # any of gap, hour, weekday, recency
SESSION_GAP: float | None = None  # seconds without an event that end a session; None: all events of a user are one
MAX_EVENTS: int | None = None  # keep the last events of a session; None: all


def session_workflow(columns: EventColumns) -> Workflow:
    """Return the workflow from cleaned events to sessions."""
    key = ["user_id"] if SESSION_GAP is None else ["user_id", "session_id"]
    clock = {name: values for name, values in CLOCK.items() if name in TIME_FEATURES}
    vocabularies = {**columns.vocabularies, **clock}
    numbers = [*columns.numbers, *(name for name in TIME_FEATURES if name not in clock)]

    # 1. Columns from the times of a user's events.
    events = ["user_id", "item_id", "timestamp", *columns.categories, *columns.numbers] >> TimeFeatures(
        "user_id", "timestamp", TIME_FEATURES, newest=columns.newest
    )
    if SESSION_GAP is not None:
        events = events >> SessionGap("user_id", "timestamp", SESSION_GAP)

    # 2. Raw values to codes: the catalogue's rows for items, so that row 3 + i is item i.
    codes = events[list(vocabularies)] >> ops.Categorify(vocabs=vocabularies, out_path=columns.storage)

    # 3. One row per session, lists in the order of time. Stock Groupby takes its keys from the data set, past the
    #    operators before it; selected_keys=True takes them from the selected columns.
    listed = [*vocabularies, "timestamp", *numbers]
    sessions = (codes + events[[*key, "timestamp", *numbers]]) >> SessionGroupby(
        key, ["timestamp"], {name: ["list"] for name in listed}, name_sep="-", selected_keys=True
    )

    # 4. Tags: what Transformers4Rec and `missrec train` read off the schema.
    output = sessions["user_id"] >> ops.AddMetadata(tags=[Tags.USER_ID, Tags.USER])
    if SESSION_GAP is not None:
        output += sessions["session_id"] >> ops.AddMetadata(tags=[Tags.SESSION_ID, Tags.SESSION])
    tags = {"item_id": [Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL], "timestamp": [Tags.TIME]}
    tags |= {name: [Tags.CATEGORICAL] for name in vocabularies if name != "item_id"}
    tags |= {name: [Tags.CONTINUOUS] for name in numbers}
    for name in ["item_id", "timestamp", *columns.categories, *columns.numbers, *TIME_FEATURES]:
        column = sessions[f"{name}-list"]
        if MAX_EVENTS is not None:
            column = column >> SessionSlice(-MAX_EVENTS)
        output += column >> ops.AddMetadata(tags=[*tags[name], Tags.LIST, Tags.SEQUENCE])
    return Workflow(output)


if __name__ == "__main__":
    app(["etl", "--workflow", __file__, *sys.argv[1:]])
