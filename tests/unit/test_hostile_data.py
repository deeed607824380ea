"""Data folders and vector files that attack their reader: names that are paths, sizes that are claims, objects."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.number_steps import as_steps
from missrec_t4r.data.schema_pbtxt import read_schema
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.io.npy_files import read_npy


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    return Path(copytree(data / "catalogue", tmp_path / "inside" / "catalogue"))


def described(folder: Path, **changes: Any) -> None:
    file = folder / "catalogue.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "modalities",
    [
        {"../../text": {}, "image": {}},
        {"/etc/text": {}, "image": {}},
        {"text": {"variants": ["../../text"]}, "image": {}},
        {"text": {"variants": [7]}, "image": {}},
        {"text": [], "image": {}},
        ["text", "image"],
        None,
    ],
)
def test_a_modality_is_a_name_and_no_path(modalities: Any, copy: Path, tmp_path: Path) -> None:
    for file in copy.glob("text*.npy"):
        (tmp_path / file.name).write_bytes(file.read_bytes())  # where the path would lead
    described(copy, modalities=modalities)
    with pytest.raises(DataError, match=r"catalogue\.json names the modalities"):
        Catalogue.load(copy)


def test_an_item_table_of_other_rows_than_stated_is_refused_unread(copy: Path) -> None:
    rows = 1 << 22
    pq.write_table(
        pa.table({"item_id": pa.repeat("a", rows), "train_count": pa.repeat(1, rows)}), copy / "items.parquet"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"has {rows} rows; expected: 12, as catalogue.json states"):
        Catalogue.load(copy)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # kilobytes


def claiming(file: Path, header: str, version: tuple[int, int] = (1, 0)) -> Path:
    text = header.encode() + b"\n"
    length = struct.pack("<H", len(text)) if version == (1, 0) else struct.pack("<I", len(text))
    file.write_bytes(b"\x93NUMPY" + bytes(version) + length + text)
    return file


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 8), }", "claims float32 of shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8), }", "claims float32 of shape"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (0, 8), }", "holds object, no numbers"),
        ("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (0,), }", "no numbers"),
        ("{'descr': '<U9', 'fortran_order': False, 'shape': (0,), }", "no numbers"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': ('a',), }", "not a .npy file"),
        ("(" * 9_000, "not a .npy file"),
        ("{" + " " * 20_000, "not a .npy file"),
    ],
)
def test_vector_files_that_claim_what_they_do_not_have_are_refused(header: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read_npy(claiming(tmp_path / "vectors.npy", header))
    with pytest.raises(ValueError, match=words):
        read_npy(claiming(tmp_path / "vectors.npy", header, (2, 0)))


def test_pickles_and_archives_are_no_vector_files(copy: Path) -> None:
    vectors = np.load(copy / "text.npy")
    np.save(copy / "text.npy", vectors.astype(object), allow_pickle=True)
    with pytest.raises(DataError, match=r"text\.npy cannot be read \(it holds object, no numbers\)"):
        Catalogue.load(copy)
    np.savez_compressed(copy / "text.npz", vectors)
    (copy / "text.npz").rename(copy / "text.npy")
    with pytest.raises(DataError, match=r"text\.npy cannot be read \(it is not a \.npy file"):
        Catalogue.load(copy)


def test_presence_is_a_flag_per_row_and_modality(copy: Path) -> None:
    presence = np.load(copy / "presence.npy")
    for wrong in (presence[:, :1], presence[:-1], presence.astype(np.int8)):
        np.save(copy / "presence.npy", wrong)
        with pytest.raises(DataError, match=r"presence\.npy holds"):
            Catalogue.load(copy)


@pytest.mark.parametrize(
    "text",
    [
        "feature { " * 100_000,
        "feature { name: " + "[ " * 200_000,
        'feature { name: "' + '\\"' * 200_000,
        "feature { name: '\n" + "' \" " * 100_000,
        'feature { name: "a\\x" }',
        "feature { int_domain { max: " + "9" * 5_000 + " } }",
    ],
)
def test_schemas_that_attack_the_parser_are_refused_at_once(text: str, tmp_path: Path) -> None:
    """Never-closed groups, brackets and quotes: each took a recursion, or time that grows with the square."""
    (tmp_path / "schema.pbtxt").write_text(text)
    with pytest.raises(SchemaError, match=r"schema\.pbtxt cannot be read"):
        read_schema(tmp_path / "schema.pbtxt")


@pytest.mark.parametrize(
    "step", [["fill", "x"], ["fill", float("nan")], ["clip", None, "7"], ["standardise", 0.0, 0], ["eval", "1"], []]
)
def test_steps_on_numbers_have_numbers(step: list[Any]) -> None:
    with pytest.raises(DataError, match="on a number"):
        as_steps([step])
