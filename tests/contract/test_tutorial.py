"""T4R's end-to-end tutorial on sessions by day, run as it is and run with inputs, block and task swapped, nothing else.

The recipe in our words: day by day, train on the day's sessions, evaluate on the next day's, with an XLNet over item,
category and a continuous column; then a batch is predicted and the model traced for deployment.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers4rec.torch as tr
from transformers4rec.config.trainer import T4RecTrainingArguments
from transformers4rec.torch.utils.data_utils import MerlinDataLoader
from transformers4rec.torch.utils.examples_utils import fit_and_evaluate

import missrec_t4r.t4r as mr
from tests.contract import shop

WIDTH = 12
"""Longest session after the tutorial's ETL, which cuts lists."""


def xlnet(schema: Any) -> tr.Model:
    """The tutorial's three objects."""
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=WIDTH, continuous_projection=16, d_output=24, masking="mlm"
    )
    config = tr.XLNetConfig.build(d_model=16, n_head=2, n_layer=1, total_seq_length=WIDTH)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([16]), tr.TransformerBlock(config, masking=inputs.masking))
    task = tr.NextItemPredictionTask(weight_tying=True)
    return tr.Model(tr.Head(body, task, inputs=inputs))


def missrec(schema: Any) -> tr.Model:
    """Ours in their places."""
    inputs = mr.MultiModalSequenceFeatures.from_schema(
        schema, max_sequence_length=WIDTH, continuous_projection=16, catalogue=shop.catalogue()
    )
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(d_model=16, n_head=2, d_feedforward=16, dropout=0.1))
    task = mr.MISSRecNextItemTask()
    return tr.Model(tr.Head(body, task, inputs=inputs))


def run_tutorial(build: Callable[[Any], tr.Model], folder: Path) -> tuple[dict[str, list[float]], Any, tr.Trainer]:
    """The recipe itself: knows neither model."""
    schema = shop.schema()
    for day in (1, 2, 3):
        for index, (split, count) in enumerate((("train", 160), ("valid", 40))):
            rows = shop.sessions(count, 10 * day + index, longest=WIDTH)
            path = shop.write_sessions(folder / str(day) / split, rows)
            path.rename(folder / str(day) / f"{split}.parquet")
    torch.manual_seed(1)
    arguments = T4RecTrainingArguments(
        output_dir=str(folder / "tmp"),
        max_sequence_length=WIDTH,
        data_loader_engine="merlin",
        num_train_epochs=4,
        dataloader_drop_last=False,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        learning_rate=0.01,
        report_to=[],
        logging_steps=200,
        no_cuda=True,
        disable_tqdm=True,
    )
    trainer = tr.Trainer(model=build(schema), args=arguments, schema=schema, compute_metrics=True)
    results = fit_and_evaluate(trainer, start_time_index=1, end_time_index=2, input_dir=str(folder))
    trainer.test_dataset_or_path = str(folder / "3" / "valid.parquet")
    predicted = trainer.predict(trainer.test_dataset_or_path).predictions
    return results, predicted, trainer


@pytest.mark.parametrize(("build", "times_chance"), [(xlnet, 0.5), (missrec, 2.0)], ids=["xlnet", "missrec"])
def test_the_tutorial_runs(build: Callable[[Any], tr.Model], times_chance: float, tmp_path: Path) -> None:
    results, (rows, scores), trainer = run_tutorial(build, tmp_path)
    assert sorted(results) == [
        f"indexed_by_time_eval_/next-item/{metric}@{cut}"
        for metric in ("avg_precision", "ndcg", "recall")
        for cut in (10, 20)
    ]
    recall = results["indexed_by_time_eval_/next-item/recall@20"]
    assert len(recall) == 2
    assert recall[-1] > times_chance * 20 / shop.N_ROWS
    assert rows.shape == scores.shape == (40, 100)
    assert (scores[:, :-1] >= scores[:, 1:]).all()

    model = trainer.model.eval()
    loader = MerlinDataLoader.from_schema(
        shop.schema(), str(tmp_path / "1" / "valid.parquet"), batch_size=8, max_sequence_length=WIDTH, shuffle=False
    )
    batches = [dict(batch) for batch, _ in loader]
    traced = torch.jit.trace(model, batches[0], strict=False)
    for batch in batches:
        with torch.no_grad():
            torch.testing.assert_close(traced(dict(batch)), model(dict(batch)), atol=1e-4, rtol=1e-4)
