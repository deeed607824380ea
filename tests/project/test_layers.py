"""Who may import whom: the table of the design, checked on the source."""

import pytest

from tests.project.packages import ROOT, imports, modules

WORDS = {"errors", "schema", "config", "progress", "aside"}
"""Imported by all; of ours they import one another only."""
MAY_IMPORT = {
    **{name: WORDS for name in WORDS},
    "data": WORDS,
    "model": WORDS | {"data"},
    "evaluation": WORDS | {"data", "model", "training"},
    "training": WORDS | {"data", "model", "evaluation"},
    "t4r": WORDS | {"data", "model", "evaluation", "training"},
    "workflows": WORDS | {"data"},
    "serving": WORDS | {"data", "model", "export"},
    "export": WORDS | {"data", "model", "training", "serving", "triton_models"},
    "recipes": set(),
    "triton_models": set(),
}
"""Layer -> layers that its modules may import when they are imported themselves."""
WHEN_CALLED = {
    "export": {"workflows"},  # proves the session transform against the fitted workflow where NVTabular is installed
}
"""Further layers that a function may reach for."""
OUTSIDE = {
    "nvtabular": {"workflows"},
    "merlin": {"workflows", "t4r", "export"},  # export: merlin_systems.py alone, which nothing of ours imports
    "transformers4rec": {"t4r"},
    "transformers": {"t4r", "workflows"},
    "pandas": {"workflows", "t4r"},
    "dask": {"workflows", "t4r"},
    "distributed": {"workflows"},
    "cudf": {"workflows"},
    "sklearn": {"workflows"},
    "PIL": {"workflows"},
    "tritonclient": {"serving"},
    "grpc": {"serving"},  # comes with tritonclient
    "pytriton": {"serving"},
    "scipy": set(),
}
"""Third-party package -> the only layers that may import it."""
COMMANDS = {"missrec_t4r", "cli", "commands", "demo"}
"""The top: it may import everything of ours, each function what it needs."""


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _edges(*, only_at_import: bool) -> list[tuple[str, str]]:
    return [
        (module, name)
        for module, file in modules().items()
        for name in imports(file, only_at_import=only_at_import)
        if name.startswith("missrec_t4r.")
    ]


def test_every_layer_is_in_the_table() -> None:
    assert {_layer(module) for module in modules()} == set(MAY_IMPORT) | COMMANDS


@pytest.mark.parametrize("only_at_import", [True, False], ids=["at import", "when called"])
def test_layers_import_downwards_only(only_at_import: bool) -> None:
    wrong = []
    for module, name in _edges(only_at_import=only_at_import):
        layer, target = _layer(module), _layer(name)
        allowed = MAY_IMPORT.get(layer, set()) | {layer} | (set() if only_at_import else WHEN_CALLED.get(layer, set()))
        if layer not in COMMANDS and target not in allowed:
            wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_merlin_is_imported_behind_its_two_doors_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, file in modules().items()
        for name in imports(file)
        if _layer(module) not in OUTSIDE.get(name.partition(".")[0], {_layer(module)})
    ]
    assert wrong == []
    used = {name.partition(".")[0] for file in modules().values() for name in imports(file)}
    assert {"nvtabular", "merlin", "transformers4rec", "tritonclient"} <= used, "the check above sees nothing"


def test_nobody_imports_the_top_level_folders_by_their_bare_names() -> None:
    """``workflows`` and ``missrec_t4r.etl`` would be two modules with two sets of classes."""
    files = [*modules().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in files
        for name in imports(file)
        if name.partition(".")[0] in {"workflows", "triton_models"}
    ]
    assert wrong == []
