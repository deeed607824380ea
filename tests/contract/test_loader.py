"""Our loader beside T4R's: what is in a batch, in which order, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from merlin.schema import ColumnSchema, Schema, Tags
from transformers4rec.torch.utils.data_utils import T4RecDataLoader

import missrec_t4r.t4r as mr
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.t4r import PrefixLoader
from tests.contract import shop
from tests.workflows import strict_cudf


def test_t4rs_loader_keeps_the_first_items_of_a_long_session(data: Path, loader: Callable[..., Any]) -> None:
    batch, _ = next(iter(loader("merlin", data / "valid", shop.schema(), batch_size=33, shuffle=False, width=4)))
    rows = shop.sessions(33, seed=1)
    assert any(len(row) > 4 for row in rows)
    assert [row[:4] + [0] * (4 - len(row)) for row in rows] == batch["item_id-list"].tolist()


def test_rows_that_t4rs_loader_cut_are_told_once_with_the_cure(
    data: Path, loader: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def inputs(longest: int) -> mr.MultiModalSequenceFeatures:
        schema = shop.schema(event_features=False)
        column = schema.first.with_properties({**schema.first.properties, "value_count": {"min": 0, "max": longest}})
        parts = {"catalogue": shop.catalogue(), "max_sequence_length": shop.MAX_LENGTH}
        return mr.MultiModalSequenceFeatures.from_schema(type(schema)([column]), **parts)

    def batches(width: int, engine: str = "merlin") -> list[Any]:
        schema = shop.schema(event_features=False)
        return [batch for batch, _ in loader(engine, data / "train", schema, batch_size=16, width=width)]

    for longest, width, engine, times in [
        (9, 4, "merlin", 1),
        (9, 9, "merlin", 0),
        (4, 4, "merlin", 0),
        (9, 4, "missrec", 0),
    ]:
        caplog.clear()
        module = inputs(longest)
        for batch in batches(width, engine):
            module(batch, training=True)
        assert caplog.text.count('data_loader_engine="missrec"') == times, (longest, width, engine)


def test_loader_order_depends_on_seed_and_epoch_alone(data: Path) -> None:
    def epochs(seed: int, **more: Any) -> list[list[list[int]]]:
        loader = PrefixLoader.from_schema(shop.schema(), data / "train", 32, shop.MAX_LENGTH, seed=seed, **more)
        return [[batch["item_id-list"].flatten().tolist() for batch, _ in loader] for _ in range(2)]

    first, second = epochs(1)
    assert first != second
    assert epochs(1) == [first, second]
    assert epochs(2)[0] != first
    ranks = [epochs(1, global_rank=rank, global_size=2)[0] for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    assert all(batch in first for part in ranks for batch in part)
    assert not any(batch in ranks[0] for batch in ranks[1])


def test_loader_pads_little_and_samples_prefixes(data: Path) -> None:
    loader = PrefixLoader.from_schema(shop.schema(), data / "train", 16, shop.MAX_LENGTH, seed=0)
    cells = [batch["item_id-list"] for batch, _ in loader]
    padding = sum(int((ids == 0).sum()) for ids in cells) / sum(ids.numel() for ids in cells)
    assert padding < 0.05
    drawn = PrefixLoader.from_schema(shop.schema(), data / "train", 16, shop.MAX_LENGTH, per_session=1, drop_last=True)
    rows = [len(batch["item_id-list"]) for batch, _ in drawn]
    assert rows == [16] * (96 // 16) == [16] * len(drawn)


@pytest.mark.parametrize(("spoil", "error"), [("missing", DataError), ("column", SchemaError), ("ragged", SchemaError)])
def test_loader_refuses_what_it_cannot_read(tmp_path: Path, spoil: str, error: type[Exception]) -> None:
    path = shop.write_sessions(tmp_path / "split", [[4, 5, 6]])
    table = pq.read_table(path)
    if spoil == "column":
        pq.write_table(table.drop_columns(["price-list"]), path)
    if spoil == "ragged":
        short = pa.array([[1, 2]], pa.list_(pa.int64()))
        pq.write_table(table.set_column(table.column_names.index("category-list"), "category-list", short), path)
    source = tmp_path / ("nowhere.parquet" if spoil == "missing" else "split")
    with pytest.raises(error):
        PrefixLoader.from_schema(shop.schema(), source, 4, shop.MAX_LENGTH)


def test_loader_leaves_out_sessions_whose_target_is_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shop.write_sessions(tmp_path, [[4, 5, 2], [6, 2, 7], [8]])
    batch, _ = next(iter(PrefixLoader.from_schema(shop.schema(), tmp_path, 4, shop.MAX_LENGTH, shuffle=False)))
    assert batch["item_id-list"].tolist() == [[6, 7]]
    assert batch["category-list"].tolist() == [[6, 7]]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("2 of 3 sessions are not in the batches of the loader missrec")


def test_loader_says_which_labels_of_other_tasks_it_leaves_out(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = ColumnSchema("clicks", dtype="int64", is_list=True, is_ragged=True, tags=[Tags.TARGET])
    PrefixLoader.from_schema(shop.schema() + Schema([labels]), data / "train", 32, shop.MAX_LENGTH)
    assert len(caplog.messages) == 1
    assert "no clicks (tagged TARGET): labels are columns of parquet files with one value for a" in caplog.messages[0]


def test_batches_that_no_process_evaluates_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shop.write_sessions(tmp_path, shop.sessions(5, seed=0))
    loaders = [
        PrefixLoader.from_schema(shop.schema(), tmp_path, 2, 6, shuffle=False, global_rank=rank, global_size=2)
        for rank in range(2)
    ]
    assert sum(len(batch["item_id-list"]) for loader in loaders for batch, _ in loader) == 4
    assert caplog.messages == ["1 of 3 batches are not evaluated: each of 2 processes takes as many"]


def test_an_evaluated_session_keeps_as_many_items_as_the_model_reads_and_its_target(tmp_path: Path) -> None:
    session = list(range(10, 20))
    shop.write_sessions(tmp_path, [session, [5, 6]])
    batch, _ = next(iter(PrefixLoader.from_schema(shop.schema(), tmp_path, 4, shop.MAX_LENGTH, shuffle=False)))
    assert batch["item_id-list"].tolist() == [session[-shop.MAX_LENGTH - 1 :], [5, 6, *[0] * (shop.MAX_LENGTH - 1)]]


def test_hidden_files_beside_the_sessions_are_left_out_and_read_by_t4rs_loader(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = shop.write_sessions(tmp_path, [[3, 4, 5], [6, 7]])
    shutil.copy(file, tmp_path / "_old.parquet")
    shutil.copy(file, tmp_path / ".old.parquet")

    def n_rows(engine: str, source: Path) -> int:
        make = T4RecDataLoader.parse(engine).from_schema
        batches = make(shop.schema(), str(source), 16, max_sequence_length=shop.MAX_LENGTH, shuffle=False)
        return sum(len(batch["item_id-list"]) for batch, _ in batches)

    assert n_rows("missrec", tmp_path) == 2
    assert "left out by its name: _old.parquet" in caplog.text
    assert n_rows("merlin", tmp_path) == 6
    assert n_rows("merlin", tmp_path / "*.parquet") == 4
    assert n_rows("merlin", tmp_path / "[!_]*.parquet") == 2
    (tmp_path / "._part_0.parquet").write_bytes(b"what macOS keeps of a file")
    assert n_rows("missrec", tmp_path) == 2


def test_loader_needs_the_models_length(data: Path) -> None:
    with pytest.raises(ConfigError, match="without max_sequence_length"):
        PrefixLoader.from_schema(shop.schema(), data / "train", 4, None)


class OnGpu:
    """A data set of Merlin where cuDF is installed: a collection of its frames."""

    def __init__(self, file: Path) -> None:
        self.frame = strict_cudf.DataFrame.from_arrow(pq.read_table(file).replace_schema_metadata())

    def to_ddf(self) -> OnGpu:
        return self

    def __getitem__(self, names: list[str]) -> OnGpu:
        return self

    def compute(self) -> strict_cudf.DataFrame:
        return self.frame


def test_loader_takes_a_merlin_dataset(data: Path) -> None:
    from merlin.io import Dataset

    file = data / "valid" / "part_0.parquet"
    sources = (file, Dataset(str(file), schema=shop.schema()), OnGpu(file))
    loaders = [
        PrefixLoader.from_schema(shop.schema(), source, 16, shop.MAX_LENGTH, shuffle=False) for source in sources
    ]
    for batches in zip(*loaders, strict=True):
        expected, *others = ({name: values.tolist() for name, values in batch.items()} for batch, _ in batches)
        assert others == [expected, expected]
