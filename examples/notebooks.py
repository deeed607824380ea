"""Write and execute the notebooks of this folder: NAME.py, in cells, becomes NAME.ipynb with its outputs.

    python examples/notebooks.py [NAME ...]

``# %% [markdown]`` begins a text and ``# %%`` a code cell, as editors know it. Cells run in this process, in a new
working folder. Own code instead of nbclient: that needs a Jupyter kernel, which no other part of this project does.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
NAMES = ("ten_minutes", "swap_in_your_t4r_script", "new_items_and_missing_pictures")


class Cell(NamedTuple):
    """A cell of a notebook's source."""

    kind: str
    """``markdown`` or ``code``."""
    text: str


def read_cells(name: str, folder: Path = HERE) -> list[Cell]:
    """Return the cells of NAME.py in a folder."""
    cells = []
    for part in (folder / f"{name}.py").read_text(encoding="utf-8").split("# %%")[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            lines = [line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()]
            cells.append(Cell("markdown", "\n".join(lines)))
        else:
            cells.append(Cell("code", body.strip()))
    return cells


def execute(cells: Sequence[Cell], folder: Path) -> list[list[dict[str, Any]]]:
    """Run the code cells in a folder, one after the other, and return the outputs of every cell."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        return [_run(cell.text, names) if cell.kind == "code" else [] for cell in cells]
    finally:
        os.chdir(before)


def _run(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell; its outputs are what it prints and the value of its last line, as in Jupyter."""
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = None if last is None else eval(compile(last, "<cell>", "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": _lines(text)})
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if html := getattr(value, "_repr_html_", lambda: None)():
            data["text/html"] = _lines(html)
        outputs.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return outputs


def notebook(cells: Sequence[Cell], outputs: Sequence[list[dict[str, Any]]]) -> dict[str, Any]:
    """Return a notebook of format 4.5."""
    written = []
    for number, (cell, output) in enumerate(zip(cells, outputs, strict=True)):
        common = {"cell_type": cell.kind, "id": f"cell-{number}", "metadata": {}, "source": _lines(cell.text)}
        written.append(common | ({"execution_count": None, "outputs": output} if cell.kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def as_markdown(content: dict[str, Any]) -> str:
    """Return a notebook as a page of the documents' site."""
    return "\n\n".join(part for cell in content["cells"] for part in _markdown(cell)) + "\n"


def _markdown(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    yield source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"
    for output in cell.get("outputs", ()):
        data = output.get("data", {"text/plain": output.get("text", [])})
        html = "".join(data.get("text/html", []))
        yield html.replace("\n", " ") if html else "```\n" + "".join(data["text/plain"]).rstrip() + "\n```"


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main(names: Sequence[str]) -> None:
    """Execute notebooks and write them with their outputs."""
    for name in names:
        cells = read_cells(name)
        with tempfile.TemporaryDirectory() as folder:
            content = notebook(cells, execute(cells, Path(folder)))
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (HERE / f"{name}.ipynb").write_text(text, encoding="utf-8")
        print(f"examples/{name}.ipynb: {len(text):,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:] or NAMES)
