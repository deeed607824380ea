"""Column names, file names and reserved rows that all parts share.

Rows follow NVTabular's Categorify: 0 padding, 1 null, 2 unknown, items from 3 on.
"""

from __future__ import annotations

from typing import Final

PADDING_ROW: Final = 0
"""Pads short sessions; never an item."""
NULL_ROW: Final = 1
"""Event without an item id."""
UNKNOWN_ROW: Final = 2
"""Item id that is not in the vocabulary; the model drops it and responses count it."""
FIRST_ITEM_ROW: Final = 3
"""Row of the first real item."""

USER_ID: Final = "user_id"
SESSION_ID: Final = "session_id"
"""Column beside the user's where a user has several sessions (``missrec etl --session-gap``)."""
ITEM_ID: Final = "item_id"
TIMESTAMP: Final = "timestamp"
ROW: Final = "row"
TRAIN_COUNT: Final = "train_count"
"""Column of the catalogue's item table: interactions with the item in the training split."""

RETIRED: Final = "retired"
"""Column of the catalogue's item table: True for an item that is no longer recommended but may occur in sessions."""

LIST_SUFFIX: Final = "-list"
"""Suffix of session columns: NVTabular's Groupby joins column and aggregation with "-"."""
ITEM_LIST: Final = ITEM_ID + LIST_SUFFIX
"""Session column: rows of the items, in order of time."""

SPLITS: Final = ("train", "valid", "test")

SCHEMA_FILE: Final = "schema.pbtxt"
SESSION_TRANSFORM_FILE: Final = "session_transform.json"
CATALOGUE_FOLDER: Final = "catalogue"
