"""The notebooks of ``examples/`` run, on a smaller shop, and hold the cells of their sources.

Their stored outputs name what today's code names: columns, systems, slices, settings, options. Figures, ids and titles
are those of a larger shop, which would have to be trained: they are not compared.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests import processes

SIZE, SMALLER = "users=400, items=150", "users=160, items=100"
NAMES = [file.stem for file in sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))]
needs_merlin = pytest.mark.skipif(
    importlib.util.find_spec("transformers4rec") is None, reason="the notebook swaps parts of Transformers4Rec"
)


@pytest.fixture(scope="module")
def notebooks(repository: Path) -> Any:
    """The script that writes them."""
    spec = importlib.util.spec_from_file_location("notebooks", repository / "examples" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_source_is_a_notebook(notebooks: Any) -> None:
    assert sorted(notebooks.NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_cells_of_its_source_small_outputs_and_plots(
    name: str, notebooks: Any, repository: Path
) -> None:
    file = repository / "examples" / f"{name}.ipynb"
    content = json.loads(file.read_text(encoding="utf-8"))
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
    assert cells == notebooks.read_cells(name), "run: python examples/notebooks.py"
    assert file.stat().st_size < 100_000
    assert "<svg" in file.read_text(encoding="utf-8")
    home = os.path.expanduser("~")  # "/" in a container for a user whom it does not know
    assert len(home) < 2 or home not in file.read_text(encoding="utf-8")
    page = notebooks.as_markdown(content)
    assert page.startswith("# ")
    assert "<svg" in page


def names_in(output: dict[str, Any]) -> set[str]:
    """What an output of a cell names: heads of tables, texts of charts, keys, options, the text of an object."""
    data = output.get("data", {"text/plain": output.get("text", [])})
    html, plain = ("".join(data.get(kind, [])) for kind in ("text/html", "text/plain"))
    named = re.findall(r"<(?:th|text|tspan|title)\b[^>]*>([^<]+)<", html)
    if "<table" not in html:
        named += re.findall(r"'([^']+)':|(?<!\S)(--[\w-]+)", plain) or [plain]
    flat = [part for found in named for part in ([found] if isinstance(found, str) else found)]
    return {re.sub(r"(?<![\w@.])-?\d[\d.,]*", "#", part.strip()) for part in flat} - {"", "#"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_merlin if "t4r" in name else ()) for name in NAMES])
def test_a_notebook_runs_and_prints_what_it_shows(name: str, repository: Path, tmp_path: Path) -> None:
    """In a process of its own, as in Jupyter."""
    source = (repository / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert SIZE in source
    (tmp_path / f"{name}.py").write_text(source.replace(SIZE, SMALLER), encoding="utf-8")
    code = f"""import json, notebooks, pathlib
outputs = notebooks.execute(notebooks.read_cells({name!r}, pathlib.Path()), '.')
pathlib.Path('outputs.json').write_text(json.dumps(outputs))"""
    done = processes.run(["-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repository / "examples")})
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "shop" / "items.parquet").is_file()
    stored = json.loads((repository / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    printed = json.loads((tmp_path / "outputs.json").read_text(encoding="utf-8"))
    for cell, outputs in zip(stored, printed, strict=True):
        shown = [names_in(output) for output in cell.get("outputs", ())]
        assert shown == [names_in(output) for output in outputs], "run: python examples/notebooks.py"
