"""The table of equations names files, classes and tests that exist."""

import ast
import re
from pathlib import Path

import pytest


def _names(node: ast.AST) -> list[str]:
    """Return what a statement defines: a class, a function or its parameter, a field with its type, a constant."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.arg):
        return [node.arg]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
    return [target.id if isinstance(target, ast.Name) else getattr(target, "attr", "") for target in targets]


ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "equations.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (E\w+) \|(.*)\|(.*)\|(.*)\|(.*)\|$", DOCUMENT, re.MULTILINE)
DEFINED = {
    name
    for path in (ROOT / "missrec_t4r").rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    for name in _names(node)
}
TESTS = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))


def test_every_equation_of_the_reference_has_a_row() -> None:
    reference = "".join(
        (ROOT / "tests" / "equations" / name).read_text() for name in ("reference.py", "reference_item_knn.py")
    )
    assert {int(number) for number in re.findall(r"\bE(\d+)\b", reference)} <= set(range(1, 22))
    assert [row[0] for row in ROWS] == ["E1", "E2", "E3", "E3b", *(f"E{number}" for number in range(4, 22))]


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
            assert name.rpartition(".")[2] in DEFINED, name
