"""Tasks of T4R beside ours: each session's label, with both loaders and both attentions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags
from torch import Tensor
from transformers4rec.config.trainer import T4RecTrainingArguments

from missrec_t4r.errors import SchemaError
from missrec_t4r.t4r import MISSRecBlock, MISSRecNextItemTask, MultiModalSequenceFeatures, PrefixLoader
from missrec_t4r.t4r import inputs as module
from tests.contract import shop


def with_labels(schema: Schema, *names: str) -> Schema:
    return schema + Schema([ColumnSchema(name, dtype="int64", tags=[Tags.TARGET]) for name in names])


def write_labelled(folder: Path, rows: list[list[int]], **labels: list[Any]) -> Path:
    """Write sessions with labels, one of each a session."""
    file = shop.write_sessions(folder, rows)
    table = pq.read_table(file)
    for name, values in labels.items():
        table = table.append_column(name, pa.array(values))
    pq.write_table(table, file)
    return folder


def of_two_tasks(attention: str) -> tr.Model:
    inputs = MultiModalSequenceFeatures.from_schema(
        shop.schema(), catalogue=shop.catalogue(), max_sequence_length=shop.MAX_LENGTH
    )
    body = tr.SequentialBlock(inputs, MISSRecBlock(attention=attention, **shop.SMALL))
    tasks = [MISSRecNextItemTask(), tr.BinaryClassificationTask("click")]
    return tr.Model(tr.Head(body, tasks, inputs=inputs))


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("engine", ["merlin", "missrec"])
def test_a_binary_task_trains_beside_the_next_item(tmp_path: Path, engine: str, attention: str) -> None:
    """Whether a session is in the first half of the catalogue can be learned from its items."""
    rows = shop.sessions(64, seed=0)
    rows[5] = rows[5][:1]  # without a next item, but with a label
    data = write_labelled(tmp_path / "train", rows, click=[int(row[0] < shop.N_ROWS // 2) for row in rows])
    torch.manual_seed(0)
    args = T4RecTrainingArguments(
        output_dir=str(tmp_path / "out"),
        data_loader_engine=engine,
        max_sequence_length=10 if engine == "merlin" else shop.MAX_LENGTH,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        num_train_epochs=20,
        learning_rate=1e-2,
        report_to=[],
        no_cuda=True,
    )
    file = str(data / "part_0.parquet")
    trainer = tr.Trainer(
        model=of_two_tasks(attention),
        args=args,
        schema=with_labels(shop.schema(), "click"),
        compute_metrics=True,
        train_dataset_or_path=file,
        eval_dataset_or_path=file,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_/click/binary_classification_task/binary_accuracy"] > 0.8
    assert metrics["eval_/next-item/ndcg_at_10"] > 0.2


def test_every_prefix_of_our_loader_has_the_labels_of_its_session(tmp_path: Path) -> None:
    rows = [[10, 2, 11, 12], [20, 21], [30], [40, 41, 42]]  # 2: an unknown item
    data = write_labelled(tmp_path, rows, click=[1, 0, 1, 0], money=[1.0, 2.0, 3.0, 4.0])
    known = {10: (1, 1.0), 20: (0, 2.0), 40: (0, 4.0)}
    schema = with_labels(shop.schema(), "click", "money")
    for shuffle, n_rows in [(True, 5), (False, 3)]:
        loader = PrefixLoader.from_schema(schema, data, 8, shop.MAX_LENGTH, shuffle=shuffle)
        batch, labels = next(iter(loader))
        assert isinstance(labels, dict)
        assert not {"click", "money"} & set(batch)
        assert [known[row] for row in batch["item_id-list"][:, 0].tolist()] == list(
            zip(labels["click"].tolist(), labels["money"].tolist(), strict=True)
        )
        assert len(labels["click"]) == n_rows
    _, label = next(iter(PrefixLoader.from_schema(with_labels(shop.schema(), "click"), data, 8, shop.MAX_LENGTH)))
    assert isinstance(label, Tensor)  # of one column T4R's loader gives no dict


def test_labels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    data = write_labelled(tmp_path, [[10, 11], [20, 21]], click=[1, None])
    with pytest.raises(SchemaError, match=r"'click' of type int64 with 1 nulls; expected: a number for every session"):
        PrefixLoader.from_schema(with_labels(shop.schema(), "click"), data, 8, shop.MAX_LENGTH)


@pytest.mark.parametrize("most", [1 << 16, 40], ids=["all prefixes", "a random part"])
def test_a_task_reads_one_vector_for_each_row_where_rows_become_several(
    tmp_path: Path, loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(module, "_MOST_EXPANDED", most)  # 4 prefixes of 10 columns
    rows = [[3, 4, 5, 6], [7], [8, 9], [2, 2], [10, 11, 12]]
    shop.write_sessions(tmp_path, rows)
    batch, _ = next(iter(loader("merlin", tmp_path, shop.schema(), batch_size=5, shuffle=False)))
    body = of_two_tasks("bidirectional").heads[0].body.eval()
    whole = body(dict(batch), testing=True)
    output = body(dict(batch), training=True)
    assert output.shape == whole.shape
    state = body[0].state.sessions
    longest = (state.item_ids[state.longest] > 0).sum(1).tolist()
    trained = int((body[0].masking.masked_targets > 0).sum())
    assert longest == [3, 1, 1, 0, 2]
    torch.testing.assert_close(output, whole)
    assert trained == 6 if most > 40 else 2 <= trained <= 4  # two of the rows have no label that could be drawn
