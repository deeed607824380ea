"""What encoders read of an item: its text, joined from columns, and the path of its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from missrec_t4r.errors import DataError
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.workflows.encoders import join_texts
from missrec_t4r.workflows.sources.table import require_column
from missrec_t4r.workflows.vector_cache import content_key

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def item_texts(items: pa.Table, columns: Sequence[str]) -> list[str | None]:
    """Return one text per item, None where all columns are empty.

    Raises
    ------
    SchemaError
        The table lacks a column.
    """
    return join_texts([require_column(items, name, "items", "--text-columns").to_pylist() for name in columns])


def image_paths(items: pa.Table, column: str | None, images: Path | None) -> list[Path | None]:
    """Return one path per item, None where there is none; by item id where no column names the file.

    Raises
    ------
    DataError
        There is no such folder.
    SchemaError
        The table lacks the column.
    """
    if images is not None and not Path(images).is_dir():
        raise DataError(f"there is no folder {images}", "a folder of pictures", "check --images")
    base = Path(images) if images is not None else Path()
    if column is not None:
        named = require_column(items, column, "items", "--image-column").to_pylist()
        return [base / str(name) if name else None for name in named]
    files = {file.stem: file for file in sorted(base.iterdir(), reverse=True) if file.suffix.lower() in _SUFFIXES}
    return [files.get(str(item)) for item in items[ITEM_ID].to_pylist()]


def word_dropped(text: str, share: float) -> str:
    """Leave out each word with probability ``share``, one at least stays; the same text gives the same result.

    UniSRec, section 2.2.2: word drop for the second view of an item's text.

    Examples
    --------
    >>> word_dropped("a red oak desk", 0.0)
    'a red oak desk'
    >>> word_dropped("desk", 0.99)
    'desk'
    """
    words = text.split()
    draw = np.random.default_rng(int.from_bytes(content_key(text.encode()), "little")).random(len(words))
    kept = [word for word, chance in zip(words, draw, strict=True) if chance >= share]
    return " ".join(kept or words[int(draw.argmax()) :][:1])
