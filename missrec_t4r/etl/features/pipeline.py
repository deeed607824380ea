"""``missrec features``: compute text and image vectors of a catalogue, and of new items with the same encoder state.

Encoders are classical ones that need no download, or pretrained ones (CLIP, sentence models). Vectors of pretrained
encoders are cached by content beside the data folder, so that a killed or repeated run encodes only new content.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.union import WORD_DROP
from missrec_t4r.errors import ConfigError, DataError, ModalityError, SchemaError
from missrec_t4r.etl.features.cache import content_key
from missrec_t4r.etl.features.cooccurrence import COOCCURRENCE, cooccurrence_vectors
from missrec_t4r.etl.features.encode import CLASSICAL, EncoderSettings, encode_contents, to_encode
from missrec_t4r.etl.features.sklearn_encoders import HASH_WIDTH, IMAGE_WIDTH, TEXT_WIDTH, Encoded
from missrec_t4r.etl.item_table import PRECOMPUTED
from missrec_t4r.etl.sources.table import require_column
from missrec_t4r.io.atomic import translate_disk_errors
from missrec_t4r.io.lock import locked
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID

log = logging.getLogger(__name__)

WORDS = "words"
"""Modality that holds the words of the items' texts, beside the vectors of a sentence encoder."""
_LISTED = 50
_KIND_OF = {f"{encoder}-{kind}": kind for encoder in (CLASSICAL, "transformers") for kind in ("text", "image")}
"""Name of an encoder -> its input; vectors of other encoders (``precomputed``) cannot be computed here."""
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def features(
    data: str | Path,
    *,
    text_columns: Sequence[str] = (),
    word_columns: Sequence[str] = (),
    image_column: str | None = None,
    images: str | Path | None = None,
    text_encoder: str = CLASSICAL,
    image_encoder: str = CLASSICAL,
    device: str = "auto",
    precision: str = "fp32",
    batch_size: int = 64,
    width: int | None = None,
    whiten: bool = False,
    reduce_to: int | None = None,
    word_drop: float = 0.0,
    cooccurrence: bool = False,
    like: str | Path | None = None,
    cache: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compute modality vectors from texts and images, with pretrained or with classical encoders (no download).

    Parameters
    ----------
    data : path
        Data folder written by `missrec etl`.
    text_columns : sequence of str
        Columns of the item table, joined to one text per item; comma-separated.
    word_columns : sequence of str
        Columns such as title,brand whose words are a modality of their own, words, by the classical encoder: for items
        whose text vectors are of a sentence encoder or from a file, in which brands and model numbers are lost.
    image_column : str, optional
        Column with the path of the item's image, relative to --images.
    images : path, optional
        Folder of images. Without --image-column an image is found by its name, <item_id>.png or the like.
    text_encoder : str
        classical, or a CLIP or sentence model: folder, or name in the local Hugging Face cache.
    image_encoder : str
        classical, or a CLIP model: folder, or name in the local Hugging Face cache.
    device : str
        Device of pretrained encoders: auto (a GPU if there is one), cpu or cuda.
    precision : str
        Precision of pretrained encoders: fp32, bf16 or fp16.
    batch_size : int
        Texts or images per forward pass of a pretrained encoder.
    width : int, optional
        Width of the classical encoders' vectors; by default 512 of texts, and at most 128 of pictures and
        co-occurrences.
    whiten : bool
        Whiten the vectors: the same variance in every direction.
    reduce_to : int, optional
        Keep this many principal components.
    word_drop : float
        Share of words dropped in a second vector per text, for augmentation in pre-training; 0 makes none, the
        paper's value is 0.15.
    cooccurrence : bool
        Compute vectors from the training sessions that items share, for catalogues without texts and images.
    like : path, optional
        Data folder or catalogue whose encoders and fitted state are used, so that vectors of both can be compared.
    cache : path, optional
        Folder of cached vectors; by default DATA.features beside the data folder.
    dry_run : bool
        Print what would be encoded; write nothing.

    Returns
    -------
    dict
        Per modality: items that have it, missing and broken ones, width; and the seconds.

    Raises
    ------
    ConfigError
        Neither text nor images are selected, or settings contradict each other.
    DataError, SchemaError, ModalityError
        No catalogue, no such column, folder or encoder, or nothing to encode.
    """
    started = time.perf_counter()
    data = Path(data)
    settings = EncoderSettings(
        device=device,
        precision=precision,
        batch_size=batch_size,
        cache=data.absolute().with_name(data.absolute().name + ".features") if cache is None else Path(cache),
        width=width,
        whiten=whiten,
        reduce_to=reduce_to,
    )
    if not 0 <= word_drop < 1 or (word_drop and not text_columns):
        raise ConfigError(f"--word-drop {word_drop}", "a share from 0 to below 1, with --text-columns")
    if not text_columns and not word_columns and image_column is None and images is None and not cooccurrence:
        raise ConfigError(
            "neither texts nor images were named",
            "--text-columns, --word-columns, --image-column or --images",
            "for a catalogue without content: --cooccurrence",
        )
    is_hashed = word_columns or (text_columns and text_encoder == CLASSICAL)
    if is_hashed and (width or 0) > HASH_WIDTH:
        raise ConfigError(
            f"--width {width:,}",
            f"at most {HASH_WIDTH:,} for texts, whose words are hashed to as many columns",
            f"give less, or leave it out: {TEXT_WIDTH}",
        )
    with nullcontext() if dry_run else locked(data):
        folder = data / CATALOGUE_FOLDER
        catalogue = Catalogue.load(folder)
        contents = _contents(catalogue.items, text_columns, word_columns, image_column, images)
        encoders = {"text": text_encoder, WORDS: CLASSICAL, "image": image_encoder}
        settings_of = {name: replace(settings, encoder=encoder) for name, encoder in encoders.items()}
        _warn_of_given_vectors(catalogue, [*contents, *([COOCCURRENCE] if cooccurrence else [])])
        if dry_run:
            plan = {name: to_encode(one.kind, one.values, settings_of[name]) for name, one in contents.items()}
            plan |= {COOCCURRENCE: {}} if cooccurrence else {}
            return {"data": str(data), "dry_run": True, "modalities": plan}
        if like is None and any(settings_of[name].encoder == CLASSICAL for name in contents if name != WORDS):
            log.info("classical encoders replace pretrained ones (hashed n-grams, colour and gradient histograms)")
        stored = _stored(like)
        added, report, ids = {}, {}, catalogue.items[ITEM_ID].to_pylist()
        for name, (kind, values, source) in contents.items():
            encoded, dropped = _encode(kind, values, settings_of[name], stored.get(name), word_drop)
            if dropped is not None:
                source[WORD_DROP] = word_drop
            added[name], report[name] = _modality(encoded, source, dropped), _describe(name, encoded, ids)
        if cooccurrence:
            encoded = cooccurrence_vectors(data, catalogue, width or IMAGE_WIDTH)
            added[COOCCURRENCE] = _modality(encoded, {}, None)
            report[COOCCURRENCE] = _describe(COOCCURRENCE, encoded, ids)
        replaced = sorted(set(added) & set(catalogue.modalities))
        with translate_disk_errors(folder):
            replace(catalogue, modalities={**catalogue.modalities, **added}).save(folder)
        return {
            "data": str(data),
            "encoder": " and ".join(sorted({part["encoder"]["model"] for part in report.values()})),
            "modalities": report,
            "replaced": replaced,
            "seconds": round(time.perf_counter() - started, 3),
        }


def _warn_of_given_vectors(catalogue: Catalogue, names: Sequence[str]) -> None:
    """Log which modalities that are encoded here had vectors from a file, which are not kept."""
    encoders = {name: catalogue.modalities[name].encoder for name in names if name in catalogue.modalities}
    for name, encoder in encoders.items():
        if encoder.get("name") == PRECOMPUTED:
            log.warning(
                f"the vectors of {name} from {encoder.get('file')} are replaced by those of an encoder; "
                "--modality brings them back, and --word-columns adds words beside them"
            )


def encode_items(
    catalogue: Path, items: pa.Table, *, complete: bool = True, wanted: Collection[str] | None = None
) -> dict[str, Encoded]:
    """Encode new items with the encoders and fitted states stored in a catalogue: equal contents get equal vectors.

    Parameters
    ----------
    catalogue : Path
        Catalogue folder, or the data folder that contains it.
    items : pyarrow.Table
        New items, with the input columns of the catalogue's encoders.
    complete : bool
        False leaves out the encoders of whose input columns the table has none.
    wanted : collection of str, optional
        Modalities to encode, all by default.

    Returns
    -------
    dict of str to Encoded
        ``vectors`` [item, width], ``present`` and ``broken`` per modality, without modalities whose vectors came from a
        file (``--modality``): their encoder is not available here.

    Raises
    ------
    ModalityError
        An encoder is missing, or its weights differ from the stored fingerprint.
    SchemaError
        The items lack an input column of an encoder.
    """
    result = {}
    for name, modality in _stored(catalogue).items():
        recorded = modality.encoder
        kind = _KIND_OF[recorded["name"]]
        columns = recorded["columns"] if kind == "text" else [recorded.get("column") or ITEM_ID]
        is_wanted = wanted is None or name in wanted
        if not is_wanted or (not complete and not set(columns) & set(items.column_names)):
            continue
        if missing := [column for column in columns if column not in items.column_names]:
            raise SchemaError(
                f"items without {', '.join(missing)}",
                f"what the catalogue's modality {name!r} is encoded from: {', '.join(columns)}",
                "add the columns, empty where an item has none, or give its vectors with --modality",
            )
        if kind == "text":
            contents: list[Any] = item_texts(items, columns)
        else:
            contents = image_paths(items, recorded.get("column"), recorded.get("images"))
        if not any(content is not None for content in contents):
            empty = np.zeros((items.num_rows, modality.width), np.float32)
            result[name] = Encoded(empty, np.zeros(items.num_rows, bool), dict(recorded))
            continue
        result[name] = _encode(kind, contents, EncoderSettings(encoder=recorded["model"]), modality, 0.0)[0]
    return result


class _Contents(NamedTuple):
    """What becomes the vectors of one modality."""

    kind: str
    values: list[Any]
    source: dict[str, Any]
    """Where they come from, for the catalogue."""


def _contents(
    items: pa.Table,
    text_columns: Sequence[str],
    word_columns: Sequence[str],
    image_column: str | None,
    images: str | Path | None,
) -> dict[str, _Contents]:
    """Return the requested texts and pictures of the items by modality."""
    contents: dict[str, _Contents] = {}
    for name, columns, option in (("text", text_columns, "--text-columns"), (WORDS, word_columns, "--word-columns")):
        if columns:
            contents[name] = _Contents("text", item_texts(items, columns, option), {"columns": list(columns)})
    if image_column is not None or images is not None:
        source = {"column": image_column, "images": None if images is None else str(images)}
        paths = image_paths(items, image_column, images)
        named = [(item, path) for item, path in zip(items[ITEM_ID].to_pylist(), paths, strict=True) if path is not None]
        if absent := [str(item) for item, path in named if not path.is_file()]:
            some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            log.warning(
                f"image: {len(absent):,} of {len(named):,} pictures that the items name are not in "
                f"{images or 'the working folder'} ({some}): these items get no image vector; check --images"
            )
        contents["image"] = _Contents("image", paths, source)
    return contents


def item_texts(items: pa.Table, columns: Sequence[str], option: str = "--text-columns") -> list[str | None]:
    """Return one text per item, joined from the columns; None where all are empty.

    Raises
    ------
    SchemaError
        The table lacks a column.
    """
    texts_by_column = [require_column(items, name, "items", option).to_pylist() for name in columns]
    texts = (
        ". ".join(str(value).strip() for value in row if value and str(value).strip())
        for row in zip(*texts_by_column, strict=True)
    )
    return [text or None for text in texts]


def image_paths(items: pa.Table, column: str | None, images: str | Path | None) -> list[Path | None]:
    """Return one image path per item, None where it has none; found by item id if there is no column.

    Raises
    ------
    DataError
        The folder does not exist.
    SchemaError
        The table lacks the column.
    """
    if images is not None and not Path(images).is_dir():
        raise DataError(f"there is no folder {images}", "a folder of pictures", "check --images")
    base = Path() if images is None else Path(images)
    if column is not None:
        named = require_column(items, column, "items", "--image-column").to_pylist()
        return [base / str(name) if name else None for name in named]
    files = {file.stem: file for file in sorted(base.iterdir(), reverse=True) if file.suffix.lower() in _SUFFIXES}
    return [files.get(str(item)) for item in items[ITEM_ID].to_pylist()]


def word_dropped(text: str, share: float) -> str:
    """Drop each word with probability ``share``; at least one stays, and the same text always gives the same result.

    Word drop of UniSRec (section 2.2.2), for the second view of an item's text.

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


def _stored(folder: str | Path | None) -> dict[str, Modality]:
    """Return the modalities of a catalogue or data folder whose encoder is available here."""
    if folder is None:
        return {}
    inside = Path(folder) / CATALOGUE_FOLDER
    modalities = Catalogue.load(inside if inside.is_dir() else folder).modalities
    return {name: part for name, part in modalities.items() if part.encoder.get("name") in _KIND_OF}


def _encode(
    kind: str, contents: Sequence[Any], settings: EncoderSettings, stored: Modality | None, word_drop: float
) -> tuple[Encoded, Encoded | None]:
    """Return the vectors and, with ``word_drop``, those of the texts with words dropped."""
    state = None
    if stored is not None:
        recorded = stored.encoder
        if settings.encoder == CLASSICAL:
            settings = replace(settings, encoder=recorded["model"])
        settings = replace(
            settings, precision=recorded.get("precision", "fp32"), whiten=bool(recorded.get("whiten", False))
        )
        state = stored.state
        if settings.encoder == CLASSICAL and not state:
            raise ModalityError(
                f"the catalogue does not hold the fitted state of its {kind} encoder",
                "a catalogue whose vectors were computed by this version",
                "run `missrec features` on it once more",
            )
    encoded = encode_contents(kind, contents, settings, state)
    if stored is not None and encoded.encoder["fingerprint"] != stored.fingerprint:
        raise ModalityError(
            f"the {kind} encoder {settings.encoder} is not the one that the catalogue records",
            f"fingerprint {stored.fingerprint}",
            "name the folder with the same weights, or encode the whole catalogue again with `missrec features`",
        )
    if not word_drop or kind != "text":
        return encoded, None
    dropped = [None if text is None else word_dropped(text, word_drop) for text in contents]
    variant = encode_contents(kind, dropped, settings, encoded.state)
    emptied = encoded.present & ~variant.present  # no encodable word was left: use the whole text
    vectors = np.where(emptied[:, None], encoded.vectors, variant.vectors)
    return encoded, replace(variant, vectors=vectors, present=encoded.present)


def _modality(encoded: Encoded, source: Mapping[str, Any], dropped: Encoded | None) -> Modality:
    """Return the vectors of items as those of catalogue rows."""
    reserved = (FIRST_ITEM_ROW, 0)
    variants = {} if dropped is None else {WORD_DROP: np.pad(dropped.vectors, (reserved, (0, 0)))}
    vectors, present = np.pad(encoded.vectors, (reserved, (0, 0))), np.pad(encoded.present, reserved)
    return Modality(vectors, present, {**encoded.encoder, **source}, variants, encoded.state)


def _describe(name: str, encoded: Encoded, ids: list[Any]) -> dict[str, Any]:
    missing = [ids[item] for item in np.flatnonzero(~encoded.present)]
    log.info(f"{name}: {encoded.present.sum():,} items, width {encoded.vectors.shape[1]}; {len(missing)} lack it")
    return {
        "items": int(encoded.present.sum()),
        "width": int(encoded.vectors.shape[1]),
        "missing": len(missing),
        "missing_items": missing[:_LISTED],
        "broken": len(encoded.broken),
        "broken_items": [ids[item] for item in encoded.broken[:_LISTED]],
        "cached": encoded.cached,
        "encoder": encoded.encoder,
    }
