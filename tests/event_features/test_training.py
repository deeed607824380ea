"""`missrec train` with event features: columns read, effect, content of the run, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r.commands import evaluate, train
from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.errors import SchemaError
from missrec_t4r.evaluation.full_ranking import quick_metrics
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.training.fit import train as fit
from tests.event_features import shop
from tests.settings import EVERY_PART

SMALL = {
    **EVERY_PART,
    "d_model": 32,
    "d_feedforward": 32,
    "n_head": 2,
    "dropout": 0.0,
    "n_neighbours": 0,
    "temperature": 0.1,
    "event_feature_dropout": 0.1,
}


def small(**model: Any) -> Recipe:
    settings = TrainConfig.paper(batch_size=128, epochs=14, learning_rate=1e-2, patience=14)
    return Recipe(name="small", model=MISSRecConfig(**(SMALL | model)), train=settings)


def found(run: Path) -> float:
    loaded = load_run(run)
    columns = () if loaded.model.event_features is None else loaded.model.event_features.columns
    test = load_sessions(loaded.data, "test", columns)
    ranked = quick_metrics(ModelScorer.with_popularity(loaded.model, loaded.catalogue), test, loaded.catalogue.n_rows)
    return float(ranked["kept_with_history_term"]["ndcg@10"] or 0.0)


def test_a_side_feature_tells_the_next_item(tmp_path: Path) -> None:
    data = shop.write(tmp_path / "data")
    info = fit(data, tmp_path / "run", recipe=small(), device="cpu")
    assert info["valid_ndcg@10"] > 0.8
    assert found(tmp_path / "run") > 0.8
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["event_features"]
    assert [(column["name"], column["kind"], column["size"]) for column in stored] == [
        ("event_type", "categorical", 6),
        ("dwell", "continuous", 1),
        ("scene", "pretrained", shop.WIDTH),
    ]
    assert stored[1]["log"] is True, "1, 10 and 100 seconds: a long tail"


def test_without_them_the_next_item_is_a_guess(tmp_path: Path) -> None:
    data = shop.write(tmp_path / "data")
    recipe = dataclasses.replace(
        small(event_features="none"), train=TrainConfig.paper(batch_size=128, epochs=5, learning_rate=1e-2)
    )
    fit(data, tmp_path / "run", recipe=recipe, device="cpu")
    guess = 0.5 * (1 + 1 / np.log2(3))  # knows the three places an item leads to, not which: about (1+.63+.5)/3 = .71
    assert found(tmp_path / "run") < guess
    assert load_run(tmp_path / "run").model.event_features is None


def test_the_choice_of_columns(tmp_path: Path) -> None:
    data = shop.write(tmp_path / "data", sizes=(30, 10, 10))
    tiny = {"train.epochs": 1, "model.d_model": 16, "model.n_head": 2, "model.n_neighbours": 0}
    train(data, tmp_path / "run", recipe="tiny", settings=tiny | {"model.event_features": "dwell, event_type-list"})
    model = load_run(tmp_path / "run").model
    assert [column.name for column in model.event_features.columns] == ["dwell", "event_type"]
    with pytest.raises(SchemaError, match=r"'dwel' is not an input column .*; expected: dwell"):
        train(data, tmp_path / "other", recipe="tiny", settings={"model.event_features": "dwel"})
    with pytest.raises(SchemaError, match="'timestamp' is not an input column"):
        train(data, tmp_path / "other", recipe="tiny", settings={"model.event_features": "timestamp"})


def test_a_run_on_data_that_lacks_a_column_is_refused(tmp_path: Path) -> None:
    data = shop.write(tmp_path / "data", sizes=(30, 10, 10))
    train(data, tmp_path / "run", recipe="tiny", settings={"train.epochs": 1, "model.event_features": "dwell"})
    file = data / "test" / "part_0.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["dwell-list"]), file)
    with pytest.raises(SchemaError, match="has no column dwell; expected: every event feature"):
        evaluate(tmp_path / "run", baselines=False)


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from missrec_t4r.training import fit as finetune

    data = shop.write(tmp_path / "data", sizes=(60, 20, 20))
    settings = TrainConfig.paper(batch_size=64, epochs=3, patience=3)
    recipe = Recipe(name="small", model=MISSRecConfig(**SMALL), train=settings)
    fit(data, tmp_path / "whole", recipe=recipe, device="cpu")

    saved = finetune.Trainer.save_checkpoint

    def killed(self: Any, *arguments: Any, **options: Any) -> None:
        saved(self, *arguments, **options)
        if self.status["epoch"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.Trainer, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(data, tmp_path / "halved", recipe=recipe, device="cpu")
    fit(data, tmp_path / "halved", recipe=recipe, device="cpu")
    whole, halved = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "halved"))
    assert [name for name in whole if not torch.equal(whole[name], halved[name])] == []
