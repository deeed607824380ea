"""JSON files that are damaged, or hold no object, end in one error that names them."""

from __future__ import annotations

from pathlib import Path

import pytest

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.runs.run_folder import read_info

CONTENTS = [
    (b"[1, 2]", "its content is of type list"),
    (b'"epochs"', "its content is of type str"),
    (b"null", "its content is of type NoneType"),
    (b'{"epochs": 2', "delimiter"),
    (b"", "Expecting value"),
    (b"\xff{}", "utf-8"),
    (b"[" * 100_000, "recursion"),
]


@pytest.mark.parametrize(("content", "reason"), CONTENTS)
def test_a_file_that_holds_no_object_is_named_with_the_reason(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_bytes(content)
    for read in (read_json, lambda file: read_info(file.parent)):
        with pytest.raises(DataError, match=reason) as refused:
            read(file)
        assert str(refused.value).startswith(f"{file} cannot be read (")
        assert "; expected: a JSON object. copy it again, or repeat the command" in str(refused.value)


def test_a_catalogue_whose_description_is_a_list_is_no_catalogue(tmp_path: Path) -> None:
    (tmp_path / "catalogue.json").write_text("[]")
    with pytest.raises(DataError, match=r"catalogue.json cannot be read .*type list"):
        Catalogue.load(tmp_path)


def test_a_file_that_an_editor_of_windows_saved_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes(b'\xef\xbb\xbf{"name": "x"}\r\n')
    assert read_json(tmp_path / "recipe.json") == {"name": "x"}
