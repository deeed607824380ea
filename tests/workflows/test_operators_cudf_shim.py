"""The shim adds what RAPIDS 24.12 lacks, and nothing else; with cuDF at hand, Merlin imports."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from missrec_t4r.etl.dataframe import CudfFrames
from missrec_t4r.etl.installed import has_cudf
from missrec_t4r.etl.nvt import cudf_compat as cudf_shim
from tests.workflows.frame_kinds import needs_cudf


def _installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, ModuleType]:
    """Empty packages under these names; they hold no behaviour that a test could pass by."""
    made = {}
    for name in names:
        made[name] = ModuleType(name)
        made[name].__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, made[name])
    return made


def test_without_cudf_nothing_is_touched() -> None:
    if has_cudf():
        pytest.skip("cuDF is at hand")
    assert cudf_shim.apply() == []
    assert "cudf" not in sys.modules


def test_missing_names_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column", "dask_cudf")
    monkeypatch.setenv("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")  # and forgotten afterwards
    assert cudf_shim.apply() == ["cudf.core.column.build_categorical_column", "dask_cudf.from_dask_dataframe"]
    assert made["cudf.core.column"].build_categorical_column is cudf_shim.build_categorical_column
    assert cudf_shim.apply() == []


@pytest.mark.parametrize("chosen", [None, "0"])
def test_numba_uses_nvidias_binding_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    monkeypatch.setenv("NUMBA_CUDA_USE_NVIDIA_BINDING", chosen or "")
    if chosen is None:
        monkeypatch.delenv("NUMBA_CUDA_USE_NVIDIA_BINDING")
    _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column")
    cudf_shim.apply()
    assert os.environ["NUMBA_CUDA_USE_NVIDIA_BINDING"] == (chosen or "1")


@pytest.mark.parametrize("of_the_system", [False, True])
def test_cupys_compiler_is_loaded_from_its_wheel_where_the_system_has_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, of_the_system: bool
) -> None:
    monkeypatch.setenv("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
    _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column")
    facts = tmp_path / "nvidia_cuda_nvrtc_cu12-12.9.86.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvrtc-cu12\nVersion: 12.9.86\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded: list[str] = []

    def load(name: str) -> None:
        if "/" not in name and not of_the_system:
            raise OSError(f"{name}: cannot open shared object file")
        loaded.append(name)

    monkeypatch.setattr("ctypes.CDLL", load)
    cudf_shim.apply()
    own = str(tmp_path / "nvidia" / "cuda_nvrtc" / "lib" / "libnvrtc.so.12")
    assert loaded == (["libnvrtc.so.12"] if of_the_system else [own])


class _Column:
    """A list column of cuDF: two child columns."""

    def __init__(self, elements: object, offsets: object) -> None:
        self.elements, self.offsets = elements, offsets


class _Series:
    """As in RAPIDS 24.12, which refuses a column in the constructor."""

    def __init__(self, data: object) -> None:
        assert not isinstance(data, _Column), "Use cudf.Series._from_column"

    @classmethod
    def _from_column(cls, column: object) -> _Series:
        series = cls(None)
        series._column = column  # type: ignore[attr-defined]
        return series


def test_list_columns_are_taken_apart_and_built_without_the_constructor(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _installed(monkeypatch, "cudf")
    made["cudf"].Series = _Series
    monkeypatch.setattr("merlin.core.dispatch.build_cudf_list_column", lambda values, offsets: _Column(values, offsets))
    inner, offsets = _Column(None, None), SimpleNamespace(values=np.array([0, 2, 3]))
    parts = CudfFrames().take_apart(_Series._from_column(_Column(inner, offsets)))
    assert parts.values._column is inner
    built = CudfFrames().build(parts)._column
    assert built.elements is parts.values
    assert built.offsets.dtype == np.int32


def test_strings_can_be_counted_and_columns_become_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `Categorify.fit` on strings and Merlin's reader of partitioned parquet call."""
    made = _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column", "cudf._lib", "cudf._lib.groupby")
    monkeypatch.setenv("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
    made["cudf"].Series = _Series
    made["cudf.core.column"].build_categorical_column = object()
    made["cudf.core.column"].ColumnBase = type("ColumnBase", (_Column,), {})
    made["cudf._lib.groupby"]._STRING_AGGS = aggregations = {"COUNT", "SIZE"}
    assert cudf_shim.apply() == ["cudf.core.column.ColumnBase.as_frame", "size of strings"]
    assert aggregations == {"COUNT", "SIZE", "size"}
    column = made["cudf.core.column"].ColumnBase(None, None)
    assert column.as_frame()._column is column
    assert cudf_shim.apply() == []


def test_names_that_are_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _installed(monkeypatch, "cudf", "cudf.core", "cudf.core.column")
    monkeypatch.setenv("NUMBA_CUDA_USE_NVIDIA_BINDING", "1")
    own = object()
    made["cudf.core.column"].build_categorical_column = own
    assert cudf_shim.apply() == []
    assert made["cudf.core.column"].build_categorical_column is own


def test_where_cudf_refuses_the_card_all_goes_on_as_without_it(tmp_path: Path) -> None:
    """As with an old driver, or a server whose fabric manager has not started; cuDF raises while it is imported."""
    (tmp_path / "cudf").mkdir()
    (tmp_path / "cudf" / "__init__.py").write_text("raise RuntimeError('cudaErrorSystemNotReady:\\n not initialized')")
    code = """
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.gpu import device
try:
    import cudf
except ImportError:  # which Merlin expects
    print(device.obstacle())
try:
    device.open_device()
except ConfigError as error:
    print(error)
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    why = "cuDF does not import (RuntimeError: cudaErrorSystemNotReady: not initialized)"
    assert ran.stdout.startswith(f"{why}\n--engine gpu, and {why}; expected: cuDF 24.12")
    assert f"{why}: tables are read and transformed on the CPU" in ran.stderr


def test_the_parts_for_transformers4rec_apply_it_before_merlin_is_imported(tmp_path: Path) -> None:
    for package in ("cudf", "cudf/core", "cudf/core/column"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    code = """
import sys
sys.modules["transformers4rec"] = None
try:
    import missrec_t4r.t4r
except ImportError:
    import cudf.core.column
    assert cudf.core.column.build_categorical_column
else:
    raise AssertionError("transformers4rec cannot be imported here")
"""
    path = os.pathsep.join([str(tmp_path), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.gpu
@needs_cudf
def test_merlin_imports_on_rapids() -> None:
    import cudf

    assert importlib.import_module("merlin.io.fsspec_utils")
    column = cudf_shim.build_categorical_column(["a", "b"], cudf.Series([0, 1, 0], dtype="uint8")._column, size=3)
    assert cudf.Series(column).to_pandas().tolist() == ["a", "b", "a"]
