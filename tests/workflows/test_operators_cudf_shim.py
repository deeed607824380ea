"""The shim adds what RAPIDS 24.12 lacks, and nothing else; with cuDF at hand, Merlin imports."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from merlin.core.dispatch import HAS_GPU

from missrec_t4r.workflows import cudf_shim


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, ModuleType]:
    """Empty packages under these names; they hold no behaviour that a test could pass by."""
    made = {}
    for name in names:
        made[name] = ModuleType(name)
        made[name].__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, made[name])
    return made


def test_without_cudf_nothing_is_touched() -> None:
    if HAS_GPU:
        pytest.skip("cuDF is at hand")
    assert cudf_shim.apply() == []
    assert "cudf" not in sys.modules


def test_missing_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column", "dask_cudf")
    assert cudf_shim.apply() == ["cudf.core.column.build_categorical_column", "dask_cudf.from_dask_dataframe"]
    assert made["cudf.core.column"].build_categorical_column is cudf_shim.build_categorical_column
    assert cudf_shim.apply() == []


def test_names_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column")
    own = object()
    made["cudf.core.column"].build_categorical_column = own
    assert cudf_shim.apply() == []
    assert made["cudf.core.column"].build_categorical_column is own


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs cuDF and a CUDA device: written, not proven")
def test_merlin_imports_on_rapids() -> None:
    import cudf

    assert importlib.import_module("merlin.io.fsspec_utils")
    column = cudf_shim.build_categorical_column(["a", "b"], cudf.Series([0, 1, 0], dtype="uint8")._column, size=3)
    assert cudf.Series(column).to_pandas().tolist() == ["a", "b", "a"]
