"""Partitions on the GPU make the CPU's folder: the same tasks on frames of pandas, and on a stand-in for cuDF.

On a machine with a GPU the tests marked ``gpu`` run on cuDF itself, with a pool of memory that the events exceed.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import LocalCluster
from nvtabular.ops import categorify

from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl import pipeline
from missrec_t4r.etl.engine.executor import ThreadExecutor, open_executor
from missrec_t4r.etl.gpu import device as gpu
from missrec_t4r.etl.gpu import partitions, tasks
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.etl.task import Task
from tests.workflows import strict_cudf
from tests.workflows.frame_kinds import HAS_CUDF, PandasFiles, needs_cudf
from tests.workflows.tables import write
from tests.workflows.test_cluster import cluster
from tests.workflows.test_gpu_engine import MORE, compare
from tests.workflows.test_scale import OPTIONS, same_folder, shop

LITTLE = 200_000
"""Bytes of memory for which the shop's 400 events make a few partitions."""

WITH_A_NULL = pd.array([*range(5), None, *range(5, 399)], "Int32")
"""One null, in an event that is complete otherwise: the column is one of floats in all partitions."""


def raw_files(folder: Path, events: pd.DataFrame) -> tuple[Path, Path]:
    """Write the tables, the events in several row groups, so that there are several chunks."""
    file, items = write(folder, events)
    pq.write_table(pq.read_table(file), file, row_group_size=60)
    return file, items


def assert_same(cpu: Path, gpu_folder: Path) -> None:
    """Compare all that two runs wrote; rows in the order of users."""
    same_folder(cpu, gpu_folder)
    reports = [json.loads((folder / "etl.json").read_text()) for folder in (cpu, gpu_folder)]
    for report in reports:
        del report["seconds"]
    assert reports[0] == reports[1]
    for name in ("workflow/workflow.json", "request_workflow/workflow.json"):
        assert (cpu / name).read_text() == (gpu_folder / name).read_text()
    assert not [path for path in gpu_folder.parent.iterdir() if path.name.startswith(".")]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--engine gpu`` computes with pandas and says to have little memory."""
    monkeypatch.setattr(gpu, "open_device", PandasFiles)
    monkeypatch.setattr(PandasFiles, "free", LITTLE)


@pytest.mark.parametrize("number", range(len(OPTIONS + MORE)))
def test_the_folder_is_the_cpus(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Texts and integers, dates, nulls, equal times, duplicates, unknown items; every option that changes rows.

    At once, and in partitions where the memory is little.
    """
    monkeypatch.setattr(gpu, "open_device", PandasFiles)
    text = tmp_path / "text.npy"
    np.save(text, np.arange(8, dtype=np.float32).reshape(4, 2))
    events = shop(number).assign(stock=WITH_A_NULL[:400], paid=np.arange(400) % 3 == 0)
    files = raw_files(tmp_path / "raw", events)
    options = (OPTIONS + MORE)[number] | {"modality": {"text": text}}
    cpu = etl(*files, tmp_path / "cpu", engine="memory", **options)
    with caplog.at_level("INFO"):
        compare(tmp_path, cpu, etl(*files, tmp_path / "gpu", engine="gpu", **options))
        assert "partitions" not in caplog.text
        assert "the CPU reads the events" not in caplog.text
        monkeypatch.setattr(PandasFiles, "free", LITTLE)
        etl(*files, tmp_path / "gpu", engine="gpu", **options)
    assert_same(tmp_path / "cpu", tmp_path / "gpu")
    assert "on the GPU in 4 partitions" in caplog.text
    parts = {file.name[:10] for file in (tmp_path / "gpu" / "train").glob("*.parquet")}
    assert len(parts) == 4


class Small(PandasFiles):
    """A card that holds some rows, whatever it says."""

    def read_parquet(
        self, files: Sequence[Path], columns: Sequence[str], row_groups: Sequence[int] | None = None
    ) -> pd.DataFrame:
        frame = super().read_parquet(files, columns, row_groups)
        if len(frame) > 150:
            raise MemoryError("std::bad_alloc: out_of_memory")
        return frame


def test_where_the_guess_was_too_low_it_begins_again_in_more_partitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "open_device", Small)
    files = raw_files(tmp_path / "raw", shop(1))
    with pytest.raises(DataError, match="memory of the GPU does not suffice .*out_of_memory.*--engine disk"):
        etl(*files, tmp_path / "gpu", engine="gpu")
    assert not (tmp_path / "gpu").exists()
    monkeypatch.setattr(partitions, "FEWEST_EVENTS", 50)
    etl(*files, tmp_path / "gpu", engine="gpu", k_core=2)
    etl(*files, tmp_path / "cpu", engine="memory", k_core=2)
    assert_same(tmp_path / "cpu", tmp_path / "gpu")
    assert "beginning again in 2 partitions" in caplog.text
    assert "beginning again in 4 partitions" in caplog.text
    with pytest.raises(DataError, match="a GPU that holds a partition"):  # as many as were asked for, and no more
        etl(*files, tmp_path / "gpu", engine="gpu", partitions=2)
    etl(*files, tmp_path / "cpu", engine="memory")  # what was there stays until a run succeeds
    assert (tmp_path / "gpu" / "etl.json").is_file()


@pytest.mark.parametrize("number", [None, 2])
def test_an_encoder_without_memory_begins_again_in_more_partitions(
    tmp_path: Path, number: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """NVTabular's Categorify makes a RuntimeError of the error that says so."""
    encode = categorify._encode

    def small(name: str, storage_name: str, path: str, df: pd.DataFrame, *others: Any, **options: Any) -> Any:
        if len(df) > 150:
            raise MemoryError("std::bad_alloc: out_of_memory")
        return encode(name, storage_name, path, df, *others, **options)

    monkeypatch.setattr(gpu, "open_device", PandasFiles)
    monkeypatch.setattr(categorify, "_encode", small)
    monkeypatch.setattr(partitions, "FEWEST_EVENTS", 10)
    files = raw_files(tmp_path / "raw", shop(1))
    if number is None:
        etl(*files, tmp_path / "gpu", engine="gpu")
        assert "(std::bad_alloc: out_of_memory): beginning again in 2 partitions" in caplog.text
        return
    with pytest.raises(DataError, match="memory of the GPU does not suffice .*out_of_memory"):
        etl(*files, tmp_path / "gpu", engine="gpu", partitions=number)


def test_what_filled_the_memory_is_freed_before_it_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[Any]] = []

    class Full(PandasFiles):
        def read_parquet(
            self, files: Sequence[Path], columns: Sequence[str], row_groups: Sequence[int] | None = None
        ) -> pd.DataFrame:
            assert all(one() is None for one in held)
            frame = super().read_parquet(files, columns, row_groups)
            if len(frame) > 150:
                held.append(weakref.ref(frame))
                error = MemoryError("std::bad_alloc: out_of_memory")  # it and this frame refer to each other, as dask's
                raise error
            return frame

    monkeypatch.setattr(gpu, "open_device", Full)
    monkeypatch.setattr(partitions, "FEWEST_EVENTS", 50)
    gc.disable()
    try:
        etl(*raw_files(tmp_path / "raw", shop(1)), tmp_path / "gpu", engine="gpu")
    finally:
        gc.enable()
    assert len(held) > 1


@pytest.mark.usefixtures("little_memory")
def test_a_workflow_file_is_fitted_partition_by_partition(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "workflows" / "session_features.py"
    files = raw_files(tmp_path / "raw", shop(1))
    for engine in ("memory", "gpu"):
        etl(*files, tmp_path / engine, engine=engine, workflow=example)  # type: ignore[arg-type]  # from the tuple
    same_folder(tmp_path / "memory", tmp_path / "gpu")
    numbers = raw_files(tmp_path / "numbers", shop(1).assign(note="1,5"))
    with pytest.raises(DataError, match="--engine memory"):  # the engine that works out of core runs no workflow file
        etl(*numbers, tmp_path / "gpu", engine="gpu", workflow=example)


@pytest.mark.usefixtures("little_memory")
def test_what_only_the_cpu_reads_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A column is numbers if all its texts are, which one partition alone cannot tell."""
    words = [*(f"{number},5" for number in range(399)), "n/a"]
    files = raw_files(tmp_path / "raw", shop(1).assign(note=words))
    with pytest.raises(
        DataError, match="texts of column 'note' are numbers, and only the CPU reads that.*--engine disk"
    ):
        etl(*files, tmp_path / "gpu", engine="gpu")
    monkeypatch.setattr(gpu, "obstacle", lambda: None)
    monkeypatch.setattr(pipeline, "has_cudf", lambda: True)
    monkeypatch.setattr(pipeline, "GPU_EVENTS", 400)
    with caplog.at_level("INFO"):
        etl(*files, tmp_path / "gpu", workers=1)
    assert "the texts of column 'note' are numbers: on the CPU, out of core" in caplog.text
    assert (tmp_path / "gpu" / "state").is_dir()
    mixed = raw_files(tmp_path / "mixed", shop(1).assign(note=["1,5"] * 399 + ["a word"]))
    etl(*mixed, tmp_path / "mixed-gpu", engine="gpu")
    etl(*mixed, tmp_path / "mixed-cpu", engine="memory")
    assert_same(tmp_path / "mixed-cpu", tmp_path / "mixed-gpu")


@pytest.mark.usefixtures("little_memory")
def test_bad_input_is_refused_in_the_words_of_the_engine_in_memory(tmp_path: Path) -> None:
    seconds = shop(1).assign(timestamp=1_700_000_000)
    seconds.loc[7, "timestamp"] = 1_700_000_000_000  # in another partition than most
    nobody = shop(1).assign(item_id="nothing")
    for events, options in ((seconds, {}), (nobody, {"unknown_items": "drop"}), (shop(1), {"k_core": 300})):
        files, words = raw_files(tmp_path / "raw", events), []
        for engine in ("memory", "gpu"):
            with pytest.raises(DataError) as refused:
                etl(*files, tmp_path / "data", engine=engine, **options)  # type: ignore[arg-type]  # from the tuple
            words.append(str(refused.value))
        assert words[0] == words[1]
    assert {path.name for path in tmp_path.iterdir()} == {"raw"}


@pytest.mark.usefixtures("little_memory")
def test_an_interrupted_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = raw_files(tmp_path / "raw", shop(2))
    write_splits = tasks.write_splits

    def interrupted(work: str, partition: int) -> dict[str, Any]:
        if partition == 2:
            raise KeyboardInterrupt
        return write_splits(work, partition)

    monkeypatch.setattr(tasks, "write_splits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        etl(*files, tmp_path / "gpu", engine="gpu")
    monkeypatch.setattr(tasks, "write_splits", write_splits)

    def read_again(*_: Any) -> None:
        raise AssertionError("the events are read again")

    monkeypatch.setattr(tasks, "read_complete", read_again)
    etl(*files, tmp_path / "gpu", engine="gpu")
    etl(*files, tmp_path / "cpu", engine="memory")
    assert_same(tmp_path / "cpu", tmp_path / "gpu")


# Several GPUs


@pytest.mark.usefixtures("little_memory")
def test_a_scheduler_distributes_the_partitions(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = raw_files(tmp_path / "raw", shop(1))
    options: dict[str, Any] = {"split": "time", "k_core": 2}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster,
        caplog.at_level("INFO"),
    ):
        etl(*files, tmp_path / "gpu", engine="gpu", dask_scheduler=cluster.scheduler_address, **options)
    etl(*files, tmp_path / "cpu", engine="memory", **options)
    assert_same(tmp_path / "cpu", tmp_path / "gpu")
    assert "in 4 partitions" in caplog.text


ON_PANDAS = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from missrec_t4r.etl.gpu import device
from tests.workflows.frame_kinds import PandasFiles

device.open_device = PandasFiles
"""
"""Loaded by the workers: pandas is their GPU."""


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_worker_processes_share_the_partitions(tmp_path: Path) -> None:
    files, here = raw_files(tmp_path / "raw", shop(4)), tmp_path / "cluster"
    here.mkdir()
    options: dict[str, Any] = {"engine": "gpu", "partitions": 4, **OPTIONS[4]}
    with cluster(here, 2, ON_PANDAS) as (address, workers):
        etl(*files, tmp_path / "gpu", dask_scheduler=address, **options)
        for worker in workers.values():
            assert worker.poll() is None
        numbers = shop(4).assign(note=[f"{number},5" for number in range(400)])
        with pytest.raises(DataError, match="texts of column 'note' are numbers, and only the CPU reads that"):
            etl(*raw_files(tmp_path / "numbers", numbers), tmp_path / "gpu", dask_scheduler=address, **options)
    etl(*files, tmp_path / "cpu", engine="memory", **OPTIONS[4])
    assert_same(tmp_path / "cpu", tmp_path / "gpu")


def test_processes_are_those_of_dask_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dask_cuda", None)  # as if it were not installed
    with (
        pytest.raises(ConfigError, match="dask-cuda does not import.*pip install dask-cuda"),
        open_executor("processes", gpu=True),
    ):
        pass
    with open_executor("threads", 8, gpu=True) as executor:
        assert executor.workers == 1


def test_more_processes_than_gpus_are_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneGpu(LocalCluster):
        """dask-cuda on a machine with one GPU: it starts, and refuses to add workers beyond the visible devices."""

        def __init__(self, n_workers: int | None, **options: Any) -> None:
            super().__init__(n_workers=0, processes=False, **options)
            if (n_workers or 1) > 1:
                raise ValueError("Can not scale beyond visible devices", [0])

    monkeypatch.setitem(sys.modules, "dask_cuda", SimpleNamespace(LocalCUDACluster=OneGpu))
    with (
        pytest.raises(ConfigError, match="--workers 3 .*visible devices.*leave --workers out"),
        open_executor("processes", 3, gpu=True),
    ):
        pass


def _fail_or_wait(number: int, folder: str) -> None:
    """Fail at once, or wait until the test says that the failure was seen."""
    if number == 0:
        raise DataError("the first task failed")
    deadline = time.monotonic() + 30
    while not (Path(folder) / "seen").exists():
        if time.monotonic() > deadline:
            (Path(folder) / "in vain").touch()
            return
        time.sleep(0.01)


def test_a_cluster_stops_at_the_first_error(tmp_path: Path) -> None:
    """Not after all the other tasks, which may be hours."""
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as workers,
        open_executor(workers.scheduler_address) as executor,
    ):
        with pytest.raises(DataError, match="the first task failed"):
            executor.run(_fail_or_wait, [(0, str(tmp_path)), (1, str(tmp_path))], "")
        assert not (tmp_path / "in vain").exists()
        (tmp_path / "seen").touch()


# cuDF


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_CUDF:
        return
    for name, module in strict_cudf.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


def prepared(folder: Path, file: Path, device: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[Any]:
    """Yield all that is put together before the workflow, and the events that it gets, by user."""
    monkeypatch.setattr(gpu, "open_device", lambda: device)
    names = {name: name for name in ("user_id", "item_id", "timestamp")}
    findings = Findings()
    settings = {
        "unknown_items": "drop" if seed % 2 else "append",
        "drop_duplicates": seed > 1,
        "k_core": 2 if seed > 2 else 0,
        "min_item_count": 3 if seed == 2 else 0,
        "split": "time",
        "valid_from": None,
        "test_from": None,
        "event_weights": {},
        "event_type_column": "event_type",
        "drop_columns": ["split"],
        "catalogue_item_column": "item_id",
        "categorical_columns": ["aisle"],
    }
    task = Task(
        files=[file], names=names, settings=settings, modality_files={}, findings=findings,
        items=file.with_name("items.parquet"), workflow=None,
    )  # fmt: skip
    summary, parts = partitions.prepare(task, folder, 3, ThreadExecutor(1))
    yield {name: values.tolist() for name, values in summary.categories.items()}
    yield summary.items.to_pylist(), summary.events, summary.users, summary.newest, summary.features, findings.to_list()
    frames = [tasks.clean_events(str(parts.work), number) for number in parts.numbers]
    tables = [pa.table({name: device.to_arrow(frame[name]) for name in frame.columns}) for frame in frames]
    rows = pa.concat_tables(tables, promote_options="permissive")
    yield [str(kind) for kind in rows.schema.types]
    yield [
        row for user in sorted(set(rows["user_id"].to_pylist())) for row in rows.to_pylist() if row["user_id"] == user
    ]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("seed", range(4))
def test_partitions_of_cudf_hold_the_events_of_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    events = shop(seed, 300).assign(stock=WITH_A_NULL[:300], split="train")
    file, _ = raw_files(tmp_path / "raw", events)
    made = [
        list(prepared(tmp_path / type(device).__name__, file, device, monkeypatch, seed))
        for device in (PandasFiles(), gpu.CudfDevice())
    ]
    for here, there in zip(*made, strict=True):
        assert here == there


@pytest.mark.usefixtures("stand_in")
def test_files_that_cudf_alone_would_read_otherwise(tmp_path: Path) -> None:
    """A named index of pandas, an index that no longer fits, columns in another order, a folder named KEY=VALUE."""
    frame = pd.DataFrame({"user_id": ["a", "b", "c"], "item_id": ["x", "y", "z"], "timestamp": [3, 2, 1]})
    (tmp_path / "user_id=7").mkdir()
    named, filtered, turned = (tmp_path / "user_id=7" / f"{name}.parquet" for name in ("named", "filtered", "turned"))
    frame.set_index("user_id").to_parquet(named)
    pq.write_table(pa.Table.from_pandas(frame).slice(1), filtered)
    frame[["timestamp", "item_id", "user_id"]].to_parquet(turned)
    columns = ["user_id", "item_id", "timestamp"]
    for files in ([named], [filtered], [turned], [named, filtered, turned]):
        rows = pa.concat_tables([pq.ParquetFile(file).read().select(columns) for file in files])
        read_there = gpu.CudfDevice().read_parquet(files, columns)
        assert len(read_there[read_there["timestamp"] > 0]) == rows.num_rows
        assert {name: read_there[name].to_arrow().to_pylist() for name in columns} == rows.to_pydict()


# On a card


@pytest.fixture
def pool() -> Iterator[None]:
    """RMM's pool of 2 GiB."""
    import rmm

    rmm.reinitialize(pool_allocator=True, initial_pool_size=2 << 30, maximum_pool_size=2 << 30)
    yield
    rmm.reinitialize(pool_allocator=False)


@pytest.mark.gpu
@pytest.mark.usefixtures("pool")
@needs_cudf
def test_more_events_than_a_pool_of_2_gib_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from benchmarks.speed.etl import generate, sessions_of

    generate(15_000_000, tmp_path / "raw")
    files = tmp_path / "raw" / "events.parquet", tmp_path / "raw" / "items.parquet"
    with caplog.at_level("INFO"):
        etl(*files, tmp_path / "gpu", engine="gpu")
    assert "partitions" in caplog.text
    etl(*files, tmp_path / "disk", engine="disk")
    assert sessions_of("ours", tmp_path / "gpu") == sessions_of("ours", tmp_path / "disk")


@pytest.mark.gpu
@needs_cudf
@pytest.mark.parametrize(
    ("number", "scheduler"), [(2, "processes"), *((number, "threads") for number in range(len(OPTIONS + MORE)))]
)
def test_the_folder_is_the_cpus_on_a_gpu(tmp_path: Path, number: int, scheduler: str) -> None:
    files = raw_files(tmp_path / "raw", shop(number))
    options = (OPTIONS + MORE)[number]
    etl(*files, tmp_path / "cpu", engine="memory", **options)
    etl(*files, tmp_path / "gpu", engine="gpu", partitions=3, dask_scheduler=scheduler, **options)
    assert_same(tmp_path / "cpu", tmp_path / "gpu")
