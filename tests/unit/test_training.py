"""Training: it learns, is deterministic, and a killed run is resumed with the same result."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from missrec_t4r import commands
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError, DataError
from missrec_t4r.runs.run_folder import RUN_FILE, STATE_FILE, load_run, load_tensors
from missrec_t4r.training.fit import train
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.trainer import Trainer

SMALL = {
    "model.d_model": 16,
    "model.n_head": 2,
    "model.dropout": 0.0,
    "model.max_sequence_length": 5,
    "train.patience": 99,
}


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_training_learns_the_order_of_items(data: Path, tmp_path: Path, attention: str) -> None:
    settings = SMALL | {
        "train.epochs": 12,
        "train.batch_size": 64,
        "train.ema_decay": 0.0,
        "train.learning_rate": 1e-2,
        "model.attention": attention,
        "model.n_neighbours": 0,
        "model.n_similar_items": 0,
    }
    result = train(data, tmp_path / "run", recipe="tiny", settings=settings)
    assert _losses(tmp_path / "run")[-1] < _losses(tmp_path / "run")[0] - 0.5
    assert result["valid_ndcg@10"] > 0.8  # popularity: every item is as popular as any other, about .38 of 12 items


@pytest.mark.parametrize(("failing", "dry_run"), [("_step", False), ("_step", True), ("__init__", False)])
def test_a_training_that_does_not_fit_into_a_gpu_says_what_needs_less(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, dry_run: bool
) -> None:
    def step(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 80 GiB.\nSee docs")

    monkeypatch.setattr(Trainer, failing, step)
    with pytest.raises(ConfigError, match=r"Tried to allocate 2.00 GiB.*; expected: .*double train.accumulate"):
        train(data, tmp_path / "run", recipe="tiny", settings=SMALL, dry_run=dry_run)


def test_a_loaded_run_gives_the_same_scores(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 2})
    loaded = load_run(tmp_path / "run")
    assert loaded.data == data.resolve() or loaded.data.samefile(data)
    session = torch.tensor([[3, 4, 5]])
    scores = loaded.model.score(loaded.model(session), loaded.model.candidates(), session)
    again = load_run(tmp_path / "run", data).model
    assert torch.equal(scores, again.score(again(session), again.candidates(), session))
    assert torch.isneginf(scores[0, :3]).all()


@pytest.mark.parametrize(
    ("settings", "stopped_by"),
    [
        ({"train.epochs": 1}, "epochs"),
        ({"train.epochs": 50, "train.patience": 1, "train.learning_rate": 1e-12}, "patience"),
        ({"train.epochs": 50, "train.max_minutes": 1e-9}, "max_minutes"),
    ],
)
def test_a_run_stores_what_ended_it(data: Path, tmp_path: Path, settings: dict[str, float], stopped_by: str) -> None:
    result = train(data, tmp_path / "run", recipe="tiny", settings=SMALL | settings)
    assert result["stopped_by"] == stopped_by
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped_by"] == stopped_by
    assert result["epochs"] <= 2


def test_a_killed_run_is_resumed_and_ends_like_an_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    settings = SMALL | {
        "train.epochs": 4,
        "train.batch_size": 64,
        "model.dropout": 0.3,
        "train.reverse_probability": 0.5,
    }
    train(data, tmp_path / "whole", recipe="tiny", settings=settings)
    recipe, catalogue = Recipe.load("tiny", settings), Catalogue.load(data / "catalogue")
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]

    class Killed(Exception):
        pass

    class Dies(Trainer):
        def _epoch(self) -> dict[str, object]:
            if self.status["epoch"] == 2:
                raise Killed
            return super()._epoch()

    victim = Dies(recipe, TrainingData(catalogue, *sessions), tmp_path / "killed")
    with pytest.raises(Killed):
        victim.run(data)
    assert (tmp_path / "killed" / STATE_FILE).is_file()
    assert not (tmp_path / "killed" / RUN_FILE).exists()
    torch.manual_seed(123)  # whatever happened meanwhile
    train(data, tmp_path / "killed", recipe="tiny", settings=settings)
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")
    whole, killed = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_finished_run_stays_while_another_training_would_replace_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, or killed, that training leaves the earlier run, and goes on from where it was."""
    out, settings = tmp_path / "run", SMALL | {"train.epochs": 2}
    train(data, out, recipe="tiny", settings=settings)
    before = {name: (out / name).read_bytes() for name in ("run.json", "recipe.json", "weights.safetensors")}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    changed = settings | {"train.learning_rate": 0.02}
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_finish", full)
        with pytest.raises(OSError, match="No space left"):
            train(data, out, recipe="tiny", settings=changed, resume=False)
    assert {name: (out / name).read_bytes() for name in before} == before
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_epoch", lambda self: pytest.fail("both epochs were trained"))
        train(data, out, recipe="tiny", settings=changed)
    assert load_run(out).recipe.train.learning_rate == 0.02


def test_a_finished_run_counts_as_one_where_a_restart_died_before_its_first_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same command without --restart returns it, and other settings need --restart again."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    def run(**more: Any) -> dict[str, Any]:
        how = {"resume": resume, "reuse": True}
        return commands.train(data, out=tmp_path / "run", recipe="tiny", settings=settings | more, **how)

    settings, resume = SMALL | {"train.epochs": 1}, True
    run()
    weights = (tmp_path / "run" / "weights.safetensors").read_bytes()
    resume = False
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(**{"train.batch_size": 8})
    resume = True
    with pytest.raises(ConfigError, match="holds a finished run with other settings: train.batch_size"):
        run(**{"train.batch_size": 8})
    assert "was killed before its first checkpoint: the run is as it was" in caplog.text
    assert run()["found"] is True
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == weights


def test_an_interrupted_run_is_not_resumed_with_other_settings(data: Path, tmp_path: Path) -> None:
    recipe, catalogue = Recipe.load("tiny", SMALL), Catalogue.load(data / "catalogue")
    sessions = [Sessions.load(data / split).known() for split in ("train", "valid")]
    (tmp_path / "run").mkdir()
    Trainer(recipe, TrainingData(catalogue, *sessions), tmp_path / "run").save_checkpoint()
    with pytest.raises(ConfigError, match="--restart"):
        train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 3, "train.batch_size": 8})
    with pytest.raises(ConfigError, match="epochs, patience and max_minutes may grow"):
        train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 1})
    train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 1}, resume=False)
    assert (tmp_path / "run" / RUN_FILE).is_file()


def test_loading_lists_all_differences_of_weights(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 1})
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    recipe["model"] |= {"d_feedforward": 64, "n_decoder_layers": 2, "history_bias": False}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError) as gap:
        load_run(tmp_path / "run")
    assert 'Missing key(s) in state_dict: "decoder.layers.1' in str(gap.value)
    with pytest.raises(CheckpointError, match="a finished run"):
        load_run(tmp_path / "nowhere")


def test_sessions_of_another_catalogue_are_an_error(data: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(data, tmp_path / "data")
    catalogue = Catalogue.load(data / "catalogue")
    Catalogue(catalogue.items.slice(0, 4), {}).save(tmp_path / "data" / "catalogue")
    with pytest.raises(DataError, match="re-run the ETL"):
        train(tmp_path / "data", tmp_path / "run", recipe="tiny")


def test_the_blend_weight_is_tuned_on_validation_and_zero_changes_nothing(data: Path, tmp_path: Path) -> None:
    from missrec_t4r.ranking.hybrid import terms_of
    from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings

    result = train(data, tmp_path / "run", recipe="tiny", settings=SMALL | {"train.epochs": 1})
    assert result["score_terms"]["valid_ndcg@10"] >= result["score_terms"]["valid_ndcg@10_without_terms"]
    model = load_run(tmp_path / "run").model
    assert terms_of(model).item_knn.active  # one epoch has learned little; what follows what is known from counting
    session = torch.tensor([[3, 4, 5]])
    with_prior = model.score(model(session), model.candidates(), session)
    terms_of(model).item_knn.choose(ItemKNNSettings(0.0, 1.0, 0.0))
    without = model.score(model(session), model.candidates(), session)
    assert with_prior[0, 6] > without[0, 6]  # item 6 follows item 5 in every session


def test_cold_items_are_no_candidates_of_the_training_softmax(data: Path) -> None:
    from missrec_t4r.config import MISSRecConfig
    from missrec_t4r.ranking.hybrid import build_missrec

    catalogue = Catalogue.load(data / "catalogue")
    counts = catalogue.items["train_count"].to_numpy().copy()
    counts[4] = 0  # row 7 arrives after training
    items = catalogue.items.set_column(1, "train_count", [counts])
    model = build_missrec(MISSRecConfig(d_model=16, n_head=2, n_neighbours=0), Catalogue(items, catalogue.modalities))
    session = torch.tensor([[3, 4]])
    trained = model.train().score(model(session), model.candidates(), session)
    served = model.eval().score(model(session), model.candidates(), session)
    assert torch.isneginf(trained[0, 7])
    assert torch.isfinite(served[0, 7])  # and yet it can be recommended
