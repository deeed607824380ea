"""Names, tags and reserved rows shared by all parts: the one place where a column's name is written down.

Rows follow NVTabular's Categorify: 0 padding, 1 null, 2 unknown, items from 3 on.
"""

from __future__ import annotations

from typing import Final

PADDING_ROW: Final = 0
"""Fills short sessions; never an item."""
NULL_ROW: Final = 1
"""The event had no item id."""
UNKNOWN_ROW: Final = 2
"""The item id is not in the vocabulary; the model drops it and the answer counts it."""
FIRST_ITEM_ROW: Final = 3
"""Row of the first real item."""

USER_ID: Final = "user_id"
ITEM_ID: Final = "item_id"
TIMESTAMP: Final = "timestamp"
ROW: Final = "row"
TRAIN_COUNT: Final = "train_count"
"""Column of the catalogue's item table: how often the item occurs in the training split."""

RETIRED: Final = "retired"
"""Column of the catalogue's item table: True for an item that is not recommended any more but may stand in sessions."""

LIST_SUFFIX: Final = "-list"
"""NVTabular's Groupby joins column and aggregation with "-", and Transformers4Rec's tutorials use these names."""
ITEM_LIST: Final = ITEM_ID + LIST_SUFFIX
"""Session column: rows of the items, in the order of time."""

SPLITS: Final = ("train", "valid", "test")

SCHEMA_FILE: Final = "schema.pbtxt"
SESSION_TRANSFORM_FILE: Final = "session_transform.json"
CATALOGUE_FOLDER: Final = "catalogue"
