"""Who may import whom: each layer imports from the layers before it, without exception and without a circle."""

from collections.abc import Iterable

import pytest

from tests.project.packages import ROOT, imports, modules

LAYERS = """
    errors schema arrays config progress io pages cuda_graph tracing
    data model evaluation ranking retrieval
    runs bundle etl training serving export t4r comparison tuning
    commands recommender cli
""".split()
"""From the bottom to the top; ``recipes`` and ``triton_models`` hold data."""
DATA_ONLY = {"recipes", "triton_models"}
TOP = {"missrec_t4r", "__main__"}
"""The package itself names what is public and imports it when it is used."""
OUTSIDE = {
    "nvtabular": {"etl"},
    "merlin": {"etl", "t4r", "export"},  # export: merlin_systems.py alone, which nothing of ours imports
    "transformers4rec": {"t4r"},
    "transformers": {"t4r", "etl"},
    "pandas": {"etl", "t4r", "recommender"},
    "dask": {"etl", "t4r"},
    "distributed": {"etl"},
    "cudf": {"etl"},
    "sklearn": {"etl"},
    "PIL": {"etl"},
    "tritonclient": {"serving"},
    "grpc": {"serving"},  # comes with tritonclient
    "google": {"serving", "t4r"},  # protobuf, which comes with tritonclient and with Merlin
    "pytriton": {"serving"},
    "optuna": {"tuning"},
    "scipy": set(),
}
"""Third-party package -> the only layers that may import it."""
WIDEST_FOLDER = 14
"""Modules beside each other that a reader still overlooks."""


def _layer(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def _folder(module: str) -> str:
    file = modules()[module]
    return module if file.name == "__init__.py" else module.rpartition(".")[0]


def _edges() -> list[tuple[str, str]]:
    """Return every import between our modules, wherever it stands: importing module, imported module."""
    known = modules()
    found = []
    for module, file in known.items():
        for name in imports(file):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module:
                found.append((module, name))
    return found


def _circles(edges: Iterable[tuple[str, str]]) -> list[set[str]]:
    """Return the groups of nodes that reach each other."""
    after: dict[str, set[str]] = {}
    for source, target in edges:
        after.setdefault(source, set()).add(target)
        after.setdefault(target, set())
    reached = {node: _reachable(node, after) for node in after}
    groups = {frozenset({node} | {other for other in reached[node] if node in reached[other]}) for node in after}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(start: str, after: dict[str, set[str]]) -> set[str]:
    todo, seen = [start], set()
    while todo:
        for node in after[todo.pop()] - seen:
            seen.add(node)
            todo.append(node)
    return seen


def test_every_layer_has_its_place() -> None:
    assert {_layer(module) for module in modules()} == set(LAYERS) | DATA_ONLY | TOP - {"__main__"}


def test_layers_import_downwards_only() -> None:
    place = {layer: number for number, layer in enumerate(LAYERS)}
    wrong = [
        f"{module} imports {name}"
        for module, name in _edges()
        if _layer(module) in place and place.get(_layer(name), -1) > place[_layer(module)]
    ]
    assert wrong == []


def test_no_folder_imports_one_that_imports_it() -> None:
    """Between a folder and the folders inside it both directions are fine: ``etl.pipeline`` uses ``etl.nvt``."""
    pairs = {(_folder(module), _folder(name)) for module, name in _edges()}
    between = [(a, b) for a, b in pairs if not (f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}."))]
    assert _circles(between) == []


def test_circles_are_seen() -> None:
    assert _circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [{"a", "b", "c"}]


def test_no_folder_is_wider_than_a_reader_can_oversee() -> None:
    counts: dict[str, int] = {}
    for module, file in modules().items():
        if file.name != "__init__.py":
            counts[_folder(module)] = counts.get(_folder(module), 0) + 1
    assert {folder: count for folder, count in counts.items() if count > WIDEST_FOLDER} == {}


def test_merlin_is_imported_by_the_etl_and_the_t4r_integration_only() -> None:
    wrong = [
        f"{module} imports {name}"
        for module, file in modules().items()
        for name in imports(file)
        if _layer(module) not in OUTSIDE.get(name.partition(".")[0], {_layer(module)})
    ]
    assert wrong == []
    used = {name.partition(".")[0] for file in modules().values() for name in imports(file)}
    assert {"nvtabular", "merlin", "transformers4rec", "tritonclient"} <= used, "the check above sees nothing"


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "missrec_t4r"])
def test_nobody_imports_the_top_level_folders_by_their_bare_names(folder: str) -> None:
    """The templates would be two modules with two sets of classes; ``workflows`` is a team's to edit."""
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / folder).rglob("*.py")
        for name in imports(file)
        if name.partition(".")[0] in {"workflows", "triton_models"}
    ]
    assert wrong == []
