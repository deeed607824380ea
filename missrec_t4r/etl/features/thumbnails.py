"""Small pictures of items as text, for pages that are one file."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageOps

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.etl.features.pipeline import image_paths
from missrec_t4r.etl.features.sklearn_encoders import UNREADABLE
from missrec_t4r.schema import ITEM_ID

log = logging.getLogger(__name__)

SIDE: Final = 56
"""Longest side in pixels: about 1.5 kB of JPEG."""
MOST: Final = 200
"""Pictures at most, so that a page stays below a megabyte."""


def thumbnails(
    catalogue: Catalogue, ids: Sequence[str], *, column: str | None = None, images: str | Path | None = None
) -> dict[str, str]:
    """Return small JPEG pictures of items as ``data:`` URIs, by the text of the id.

    Parameters
    ----------
    catalogue : Catalogue
    ids : sequence of str
        The most wanted first; those without a readable picture are left out.
    column, images : str and path, optional
        As ``missrec features --image-column --images``; by default those from which it computed the image vectors.

    Raises
    ------
    DataError, SchemaError
        A folder or a column that was named is missing.
    """
    if column is None and images is None:
        column, images = _recorded(catalogue)
        if images is not None and not Path(images).is_dir():
            log.warning(f"examples without pictures: {images}, where they were, is not here; name it with --images")
            return {}
    if column is None and images is None:
        return {}
    known = pc.index_in(pa.array(ids, pa.string()), value_set=catalogue.items[ITEM_ID].cast(pa.string()))
    items = catalogue.items.take(known.drop_null())
    found: dict[str, str] = {}
    paths = image_paths(items, column, images)
    for item, path in zip(items[ITEM_ID].to_pylist(), paths, strict=True):
        if len(found) == MOST:
            break
        if path is not None and (picture := _small(path)):
            found[str(item)] = picture
    return found


def _recorded(catalogue: Catalogue) -> tuple[str | None, str | None]:
    """Return the picture column and folder of the first modality that was computed from pictures."""
    for modality in catalogue.modalities.values():
        if "images" in modality.encoder:
            return modality.encoder.get("column"), modality.encoder["images"]
    return None, None


def _small(path: Path) -> str | None:
    """Return a picture as a ``data:`` URI; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * SIDE, 2 * SIDE))  # decodes a large JPEG at a fraction of its size
            upright = ImageOps.exif_transpose(image).convert("RGBA")
            small = ImageOps.contain(upright, (SIDE, SIDE))
    except UNREADABLE:
        return None
    flat = Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small)
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=75, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
