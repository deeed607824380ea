"""What the source must not contain, and that its examples run."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

from tests.project.packages import ROOT, imports, modules, shipped_files

UNPICKLING = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def _shipped_python() -> list[Path]:
    return [file for place, file in shipped_files().items() if place.endswith(".py")]


def _dangerous(call: ast.Call) -> str | None:
    """Return the call's text if it can run code that lies in a file, which no bundle or checkpoint of ours may do."""
    text = ast.unparse(call.func)
    if text in {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "pandas.read_pickle"}:
        return text
    pickles = [word.value for word in call.keywords if word.arg == "allow_pickle"]
    if any(not (isinstance(value, ast.Constant) and value.value is False) for value in pickles):
        return f"{text}(allow_pickle=...)"
    return None


def test_no_shipped_code_unpickles() -> None:
    wrong = []
    for file in _shipped_python():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        calls = [_dangerous(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
        modules_used = [name for name in imports(file) if name.partition(".")[0] in UNPICKLING]
        wrong += [f"{file.relative_to(ROOT)}: {found}" for found in [*filter(None, calls), *modules_used]]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.load(path)", "torch.load"),
        ("np.load(path, allow_pickle=True)", "np.load(allow_pickle=...)"),
        ("np.load(path, allow_pickle=False)", None),
        ("yaml.safe_load(text)", None),
    ],
)
def test_the_check_for_unpickling_sees(code: str, found: str | None) -> None:
    (statement,) = ast.parse(code).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Call)
    assert _dangerous(statement.value) == found


def test_examples_in_docstrings_run() -> None:
    pytest.importorskip("nvtabular", reason="some examples need the extra merlin")
    results = {name: doctest.testmod(importlib.import_module(name)) for name in modules()}
    assert {name: result for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) > 20
