"""``missrec features``: add text and image vectors from the built-in classical encoders to a catalogue."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID
from missrec_t4r.workflows.encoders import Encoded, encode_images, encode_texts, join_texts
from missrec_t4r.workflows.sources.table import require_column

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
_LISTED = 50


def features(
    data: Path,
    *,
    text_columns: Sequence[str] = (),
    image_column: str | None = None,
    images: Path | None = None,
    width: int = 128,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Encode texts and images of a data folder's catalogue; modalities of the same name are replaced.

    Parameters
    ----------
    data : Path
        Data folder written by `etl`.
    text_columns : sequence of str
        Columns of the item table, joined to one text per item.
    image_column : str, optional
        Column with the path of the picture, relative to ``images``.
    images : Path, optional
        Folder of pictures. Without ``image_column`` a picture is found by its name, ``<item_id>.png`` or the like.
    width : int
        Upper bound of the vectors' width.

    Returns
    -------
    dict
        Per modality: items that have it, missing and broken ones, width; and the seconds.

    Raises
    ------
    ConfigError
        Neither text nor images were asked for.
    DataError, SchemaError, ModalityError
        No catalogue, no such column, no such folder, or nothing to encode.
    """
    started = time.perf_counter()
    if not text_columns and image_column is None and images is None:
        raise ConfigError("neither texts nor images were named", "--text-columns, --image-column or --images")
    folder = Path(data) / CATALOGUE_FOLDER
    catalogue = Catalogue.load(folder)
    progress.say("classical encoders stand in for pretrained ones (hashed n-grams, colour and gradient histograms)")
    encoded: dict[str, Encoded] = {}
    sources: dict[str, dict[str, Any]] = {}
    if text_columns:
        columns = [
            require_column(catalogue.items, name, "items", "--text-columns").to_pylist() for name in text_columns
        ]
        encoded["text"] = encode_texts(join_texts(columns), width=width)
        sources["text"] = {"columns": list(text_columns)}
    if image_column is not None or images is not None:
        paths = _image_paths(catalogue, image_column, images)
        encoded["image"] = encode_images(paths, width=width, progress=progress)
        sources["image"] = {"column": image_column}
    added = {name: _modality(result, sources[name]) for name, result in encoded.items()}
    replaced = sorted(set(added) & set(catalogue.modalities))
    Catalogue(catalogue.items, {**catalogue.modalities, **added}).save(folder)
    ids = catalogue.items[ITEM_ID].to_pylist()
    report = {name: _describe(result, ids) for name, result in encoded.items()}
    for name, part in report.items():
        progress.say(f"{name}: {part['items']:,} items, width {part['width']}; {part['missing']} lack it")
    return {
        "data": str(data),
        "encoder": "classical",
        "modalities": report,
        "replaced": replaced,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _image_paths(catalogue: Catalogue, image_column: str | None, images: Path | None) -> list[Path | None]:
    if images is not None and not Path(images).is_dir():
        raise DataError(f"there is no folder {images}", "a folder of pictures", "check --images")
    base = Path(images) if images is not None else Path()
    if image_column is not None:
        named = require_column(catalogue.items, image_column, "items", "--image-column").to_pylist()
        return [base / str(name) if name else None for name in named]
    files = {file.stem: file for file in sorted(base.iterdir(), reverse=True) if file.suffix.lower() in _SUFFIXES}
    return [files.get(str(item)) for item in catalogue.items[ITEM_ID].to_pylist()]


def _modality(encoded: Encoded, source: dict[str, Any]) -> Modality:
    width = encoded.vectors.shape[1]
    vectors = np.concatenate([np.zeros((FIRST_ITEM_ROW, width), np.float32), encoded.vectors])
    present = np.concatenate([np.zeros(FIRST_ITEM_ROW, bool), encoded.present])
    return Modality(vectors, present, {**encoded.encoder, **source})


def _describe(encoded: Encoded, ids: list[Any]) -> dict[str, Any]:
    missing = [ids[item] for item in np.flatnonzero(~encoded.present)]
    return {
        "items": int(encoded.present.sum()),
        "width": int(encoded.vectors.shape[1]),
        "missing": len(missing),
        "missing_items": missing[:_LISTED],
        "broken": len(encoded.broken),
        "broken_items": [ids[item] for item in encoded.broken[:_LISTED]],
        "encoder": encoded.encoder,
    }
