"""docs/reference.md says what the code says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import missrec_t4r


@pytest.fixture(scope="module")
def made(documents_script: Callable[[str], Any]) -> str:
    module = documents_script("reference")
    page: str = module.reference()
    return page


def test_the_page_is_that_of_this_code(repository: Path, made: str) -> None:
    assert (repository / "docs" / "reference.md").read_text(encoding="utf-8") == made, "run `make docs` and commit"


def test_every_public_name_is_there_and_has_a_meaning(made: str) -> None:
    for name in missrec_t4r.__all__:
        assert getattr(missrec_t4r, name)
        if name != "__version__":
            assert f"[`mr.{name}`](../missrec_t4r/" in made


def test_every_option_and_setting_says_what_it_does(made: str) -> None:
    rows = [line.split(" | ") for line in made.splitlines() if line.startswith("| `")]
    assert rows
    assert [row[0] for row in rows if not any(len(cell.strip("| ")) > 9 for cell in row[1:])] == []
