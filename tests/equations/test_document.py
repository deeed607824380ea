"""The table of equations names files, classes and tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (E\w+) \|(.*)\|(.*)\|(.*)\|(.*)\|$", DOCUMENT, re.MULTILINE)
SOURCES = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "missrec_t4r").rglob("*.py"))
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_every_equation_of_the_reference_has_a_row() -> None:
    reference = "".join(
        (ROOT / "tests" / "equations" / name).read_text() for name in ("reference.py", "reference_prior.py")
    )
    assert {int(number) for number in re.findall(r"\bE(\d+)\b", reference)} <= set(range(1, 21))
    assert [row[0] for row in ROWS] == ["E1", "E2", "E3", "E3b", *(f"E{number}" for number in range(4, 21))]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:tests/)?[\w/]+\.py)`", DOCUMENT))))
def test_files_exist(path: str) -> None:
    places = [ROOT / path, ROOT / "tests" / path, ROOT / "missrec_t4r" / path, ROOT / "missrec_t4r" / "model" / path]
    assert any(place.is_file() for place in places)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", DOCUMENT))))
def test_tests_exist(name: str) -> None:
    assert f"def {name}(" in TESTS


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_code_exists(row: tuple[str, ...]) -> None:
    for name in re.findall(r"`([A-Za-z_][\w.]*)`", row[2]):
        if not name.endswith(".py"):
            *_, last = name.split(".")
            assert re.search(rf"\b(class|def) {last}\b|\b{last}\b\s*[:=]", SOURCES), name
    if "not yet" in row[2]:
        assert "reference only" in row[3]
