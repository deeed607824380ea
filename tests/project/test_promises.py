"""Every promise of the pages on security and reliability names the test that attacks it, and the test exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
PAGES = ("security.md", "reliability.md")


def promises(page: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the rows of all tables with a column ``test``: the row, and file and name of its tests."""
    column = None
    for line in page.splitlines():
        cells = (
            [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|")]
            if line.startswith("|")
            else []
        )
        if not cells:
            column = None
        elif column is None:
            column = cells.index("test") if "test" in cells else -1
        elif column >= 0 and not set(line) <= set("|-: "):
            yield line, _TEST.findall(cells[column] if column < len(cells) else "")


def names_of_tests(file: Path) -> set[str]:
    """Return the names of a file's test functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {function.name for function in functions if function.name.startswith("test_")}


@pytest.mark.parametrize("name", PAGES)
def test_every_promise_names_a_test_that_exists(repository: Path, name: str) -> None:
    rows = list(promises((repository / "docs" / name).read_text(encoding="utf-8")))
    assert rows
    assert [row for row, tests in rows if not tests] == []
    known = {
        file: names_of_tests(repository / file)
        for _, tests in rows
        for file, _ in tests
        if (repository / file).is_file()
    }
    named = [(file, test) for _, tests in rows for file, test in tests]
    assert [f"{file}::{test}" for file, test in named if test not in known.get(file, set())] == []


def test_a_promise_without_a_test_is_seen() -> None:
    first = "| attack | by | test |\n|---|---|---|\n| one | | `tests/a.py::test_b` |\n| two | | `tests/a.py` |"
    page = first + "\n\n| a | b |\n|---|---|\n| c | d |"
    assert [tests for _, tests in promises(page)] == [[("tests/a.py", "test_b")], []]
