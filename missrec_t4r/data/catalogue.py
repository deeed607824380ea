"""The catalogue: item ids in fixed rows, modality vectors, presence masks and business columns.

A folder of plain files (`catalogue.json`, `vocabulary.parquet`, `items.parquet`, `<modality>.npy`, `presence.npy`),
written by the ETL and read by everything else. Rows are numbered as in NVTabular: 0 padding, 1 null, 2 unknown, items
from 3 on; the row of an item never changes. Optional files of a modality: `<modality>.<variant>.npy` (other vectors of
the same items, such as `text.word_drop.npy`) and `<modality>.state.safetensors` (fitted state of its encoder).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from missrec_t4r.arrays import AnyArray, Bools, Floats, Ints
from missrec_t4r.errors import DataError, ModalityError
from missrec_t4r.io.atomic import read_consistently, replace_dir
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.npy_files import read_npy
from missrec_t4r.schema import (
    CATALOGUE_FOLDER,
    FIRST_ITEM_ROW,
    ITEM_ID,
    NULL_ROW,
    RETIRED,
    ROW,
    TRAIN_COUNT,
    UNKNOWN_ROW,
)

FORMAT_VERSION = 1
ITEMS_FILE = "items.parquet"
_MAPPED_BYTES = 1 << 29
"""Size in bytes from which vector files are memory-mapped instead of read."""
_CHUNK_ROWS = 1 << 16


@dataclass(frozen=True)
class Modality:
    """Frozen vectors of one modality for all catalogue rows.

    Parameters
    ----------
    vectors : ndarray [row, width], float32
        Zero where the item lacks the modality and in the three reserved rows.
    present : ndarray [row], bool
        True where the item has the modality.
    encoder : mapping
        Description of the encoder: ``name``, ``fingerprint``, and all that is needed to encode new items.
    variants : mapping of str to ndarray [row, width], float32
        Other vectors of the same items by the same encoder, such as ``word_drop``: texts with some words left out, for
        augmentation in pre-training. Variants are never ranked with.
    state : mapping of str to ndarray
        Fitted state of the encoder (decomposition, whitening), so that new items are encoded like the old ones.
    """

    vectors: Floats
    present: Bools
    encoder: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Floats] = field(default_factory=dict)
    state: Mapping[str, AnyArray] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str | None:
        """Identifier of the vector space, or None if it was not stated (vectors from a file without ``--fingerprint``).

        Equal fingerprints mean equal weights, preprocessing and fitted state: vectors of two catalogues may be mixed,
        and a model trained on one reads the other. None equals nothing, not even another None. Stored in catalogue.json
        as ``modalities.<name>.encoder.fingerprint``: ``sha256:...`` if `missrec features` computed it, any text if it
        was stated (``missrec etl --modality text=text.npy --fingerprint text=minilm-l6-v2``).
        """
        fingerprint = self.encoder.get("fingerprint")
        return str(fingerprint) if fingerprint else None

    @property
    def width(self) -> int:
        """Dimension of a vector."""
        return int(self.vectors.shape[1])


@dataclass(frozen=True)
class Catalogue:
    """All items that can be recommended.

    Parameters
    ----------
    items : pyarrow.Table
        One record per item in row order, starting with row 3: `item_id`, `train_count`, then business columns.
    modalities : mapping of str to Modality
        Any number of modalities by name.
    checked : bool
        Whether the vectors are known to be finite; False checks every number.

    Examples
    --------
    >>> items = pa.table({"item_id": ["lamp", "desk"], "train_count": [5, 1]})
    >>> catalogue = Catalogue(items, {})
    >>> catalogue.rows_of(["desk", "sofa"]).tolist()
    [4, 2]
    >>> catalogue.ids_of(np.array([3]))
    ['lamp']
    """

    items: pa.Table
    modalities: Mapping[str, Modality]
    checked: InitVar[bool] = False

    def __post_init__(self, checked: bool) -> None:
        for name in (ITEM_ID, TRAIN_COUNT):
            if name not in self.items.column_names:
                raise DataError(
                    f"the item table has no column {name!r}", "item_id and train_count", "re-run missrec etl"
                )
        for name, modality in self.modalities.items():
            _check_modality(name, modality, self.n_rows)
            if not checked:
                _check_numbers(name, modality)

    @property
    def n_items(self) -> int:
        """Number of items, reserved rows not counted."""
        return int(self.items.num_rows)

    @property
    def n_rows(self) -> int:
        """Number of rows including the three reserved ones; also the width of a score vector."""
        return self.n_items + FIRST_ITEM_ROW

    @cached_property
    def train_count(self) -> Ints:
        """Interactions per row in the training split, [row]: the popularity; 0 for cold items."""
        counts = np.zeros(self.n_rows, np.int64)
        counts[FIRST_ITEM_ROW:] = self.items[TRAIN_COUNT].to_numpy()
        return counts

    @cached_property
    def retired(self) -> Bools:
        """Rows that are not recommended any more, [row]: those of the column ``retired``, if the item table has it.

        Raises
        ------
        DataError
            The column is not true or false.
        """
        rows = np.zeros(self.n_rows, bool)
        if RETIRED in self.items.column_names:
            if not pa.types.is_boolean(kind := self.items[RETIRED].type):
                cure = "convert it, or give it another name"
                raise DataError(f"column {RETIRED!r} of type {kind}", "true or false: what is not recommended", cure)
            rows[FIRST_ITEM_ROW:] = self.items[RETIRED].fill_null(False).to_numpy()
        return rows

    @property
    def id_type(self) -> str:
        """``"string"`` or ``"int64"``: the type of raw ids in requests and responses."""
        return "int64" if pa.types.is_integer(self.items[ITEM_ID].type) else "string"

    @cached_property
    def _index(self) -> pa.Array:
        column = self.items[ITEM_ID].combine_chunks()
        return column.cast(pa.int64() if self.id_type == "int64" else pa.string())

    def rows_of(self, item_ids: Sequence[str | int | None] | pa.Array) -> Ints:
        """Return the row of every raw id, as NVTabular's Categorify: 2 for unknown ids, 1 for missing ids."""
        ids = item_ids if isinstance(item_ids, pa.Array) else pa.array(item_ids)
        if ids.type != self._index.type:
            ids = ids.cast(self._index.type)
        index = pc.index_in(ids, value_set=self._index)
        rows = pc.add(index.cast(pa.int64()), FIRST_ITEM_ROW).fill_null(UNKNOWN_ROW)
        return np.asarray(pc.if_else(pc.is_null(ids), NULL_ROW, rows).to_numpy(zero_copy_only=False), np.int64)

    def ids_of(self, rows: npt.ArrayLike) -> list[str | int]:
        """Return the raw ids of item rows (>= 3), in the given order."""
        positions = np.asarray(rows, np.int64) - FIRST_ITEM_ROW
        ids: list[str | int] = self._index.take(pa.array(positions)).to_pylist()
        return ids

    @classmethod
    def load(cls, folder: str | Path) -> Catalogue:
        """Read a catalogue folder; if it is replaced meanwhile it is read again, so that versions never mix.

        Raises
        ------
        DataError
            The folder or one of its files is missing, or of another format version.
        ModalityError
            A modality file's shape does not fit the items, or it holds NaN.
        """
        return read_consistently(Path(folder), cls._read)

    @classmethod
    def _read(cls, folder: Path) -> Catalogue:
        meta_file = folder / "catalogue.json"
        if not meta_file.is_file():
            below = folder / CATALOGUE_FOLDER
            cure = f"take {below}" if below.is_dir() else "write one with `missrec etl`"
            raise DataError(f"{folder} holds no catalogue.json", "a catalogue folder", cure)
        meta = read_json(meta_file)
        if meta.get("format") != FORMAT_VERSION:
            raise DataError(
                f"catalogue format {meta.get('format')!r}", f"format {FORMAT_VERSION}", "re-run missrec etl"
            )
        names = _checked_names(folder, meta)
        items = _read_items(folder / ITEMS_FILE, meta.get("rows"))
        presence = _read_array(folder / "presence.npy")
        if presence.shape != (items.num_rows + FIRST_ITEM_ROW, len(names)) or presence.dtype != np.bool_:
            raise DataError(
                f"{folder / 'presence.npy'} holds {presence.dtype} of shape {presence.shape}",
                f"one flag per row and modality, {(items.num_rows + FIRST_ITEM_ROW, len(names))}",
                "re-run missrec etl",
            )
        modalities = {
            name: _load_modality(folder, name, presence[:, index], meta["modalities"][name])
            for index, name in enumerate(names)
        }
        return cls(items.drop_columns([ROW]) if ROW in items.column_names else items, modalities)

    def save(self, folder: str | Path) -> None:
        """Write the catalogue folder atomically; an older catalogue is replaced whole."""
        with replace_dir(Path(folder)) as temporary:
            self._write(temporary)

    def write_items(self, folder: Path) -> None:
        """Write the item table alone (counts change with every increment), beside files of an older version."""
        rows = pa.array(np.arange(FIRST_ITEM_ROW, self.n_rows))
        business = [name for name in self.items.column_names if name not in (ITEM_ID, TRAIN_COUNT)]
        pq.write_table(self.items.append_column(ROW, rows), folder / ITEMS_FILE, use_dictionary=business)

    def _write(self, folder: Path) -> None:
        self.write_items(folder)
        rows = pa.array(np.arange(FIRST_ITEM_ROW, self.n_rows))
        vocabulary = pa.table({ROW: rows, ITEM_ID: self.items[ITEM_ID]})
        pq.write_table(vocabulary, folder / "vocabulary.parquet", use_dictionary=False)
        present = [modality.present for modality in self.modalities.values()]
        presence = np.stack(present, 1) if present else np.zeros((self.n_rows, 0), bool)
        np.save(folder / "presence.npy", presence)
        modalities = {name: _save_modality(folder, name, modality) for name, modality in self.modalities.items()}
        meta = {"format": FORMAT_VERSION, "rows": self.n_rows, "id_type": self.id_type, "modalities": modalities}
        write_json(folder / "catalogue.json", meta)


def _save_modality(folder: Path, name: str, modality: Modality) -> dict[str, Any]:
    """Write the files of one modality and return its entry in catalogue.json."""
    np.save(folder / f"{name}.npy", modality.vectors)
    for variant, vectors in modality.variants.items():
        np.save(folder / f"{name}.{variant}.npy", vectors)
    if modality.state:
        state = {key: np.ascontiguousarray(value) for key, value in modality.state.items()}
        save_file(state, _state_file(folder, name))
    entry = {"width": modality.width, "items": int(modality.present.sum()), "encoder": dict(modality.encoder)}
    return entry | ({"variants": list(modality.variants)} if modality.variants else {})


def _load_modality(folder: Path, name: str, present: Bools, entry: Mapping[str, Any]) -> Modality:
    def read(file: str) -> Floats:
        return _read_array(folder / file).astype(np.float32, copy=False)

    variants = {variant: read(f"{name}.{variant}.npy") for variant in entry.get("variants", ())}
    state = load_file(_state_file(folder, name)) if _state_file(folder, name).is_file() else {}
    return Modality(read(f"{name}.npy"), present, entry.get("encoder", {}), variants, state)


def _checked_names(folder: Path, meta: Mapping[str, Any]) -> list[str]:
    """Return the names of the modalities; they and their variants become file names, and no path may hide there."""
    modalities = meta.get("modalities")
    entries = modalities if isinstance(modalities, dict) else {"": {}}
    variants = [name for entry in entries.values() if isinstance(entry, dict) for name in entry.get("variants", ())]
    wrong = [name for name in (*entries, *variants) if not isinstance(name, str) or not name.isidentifier()]
    if wrong or not all(isinstance(entry, dict) for entry in entries.values()):
        raise DataError(
            f"{folder / 'catalogue.json'} names the modalities {str(wrong or modalities)[:80]}",
            "letters, digits and _",
            "re-run missrec etl",
        )
    return list(entries)


def _read_items(file: Path, rows: Any) -> pa.Table:
    """Read the item table, after its number of rows was compared with that of ``catalogue.json``."""
    try:
        n_items = pq.read_metadata(file).num_rows
        if rows is not None and n_items != rows - FIRST_ITEM_ROW:
            raise DataError(
                f"{file} has {n_items} rows", f"{rows - FIRST_ITEM_ROW}, as catalogue.json states", "re-run missrec etl"
            )
        return pq.read_table(file)
    except (OSError, TypeError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read ({error})", "a parquet file", "re-run missrec etl") from error


def _read_array(file: Path) -> AnyArray:
    try:
        return read_npy(file, mapped=file.stat().st_size > _MAPPED_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error})", "the .npy file of missrec etl", "re-run it") from error


def _state_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.state.safetensors"


def _check_modality(name: str, modality: Modality, n_rows: int) -> None:
    if modality.vectors.ndim != 2 or modality.vectors.shape[0] != n_rows:
        raise ModalityError(
            f"modality {name!r} has vectors of shape {modality.vectors.shape}",
            f"[{n_rows}, width]: one row per item and three reserved ones",
            "re-extract the vectors for this item table",
        )
    for variant, vectors in modality.variants.items():
        if vectors.shape != modality.vectors.shape or not np.isfinite(vectors).all():
            raise ModalityError(
                f"variant {variant!r} of modality {name!r} has shape {vectors.shape}, or holds NaN",
                f"finite numbers of shape {modality.vectors.shape}",
                "extract the modality again with `missrec features`",
            )
    if modality.present.shape != (n_rows,) or modality.present[:FIRST_ITEM_ROW].any():
        raise ModalityError(
            f"the presence mask of modality {name!r} does not fit", f"{n_rows} flags, three of them off"
        )


def _check_numbers(name: str, modality: Modality) -> None:
    for start in range(0, len(modality.vectors), _CHUNK_ROWS):
        finite = np.isfinite(modality.vectors[start : start + _CHUNK_ROWS]).all(1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise ModalityError(
                f"modality {name!r} holds NaN or infinity in row {row}", "finite numbers", "repair the file"
            )
