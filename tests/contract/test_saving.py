"""`save_run`: what a T4R script trained becomes a run folder, with score terms and a comparison of the scores."""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers4rec.torch as tr
from transformers4rec.config.trainer import T4RecTrainingArguments

import missrec_t4r as mr
from missrec_t4r import commands
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, ParityError
from missrec_t4r.evaluation.full_ranking import top_items
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.tune import fit_terms
from missrec_t4r.runs.run_folder import load_run
from missrec_t4r.t4r.build import to_core
from missrec_t4r.t4r.task import _top_items_of_a_trace
from missrec_t4r.training.warm_start.nightly import load_continued
from missrec_t4r.training.warm_start.transfer import read_source
from tests import processes
from tests.contract import shop
from tests.ddp import group
from tests.shop import make_catalogue


def by_hand(**changes: Any) -> tr.Model:
    """A script's own model, with the terms of the recipe."""
    torch.manual_seed(0)
    config = shop.config(**{"attention": "causal", "n_neighbours": 20, "n_similar_items": 20} | changes)
    inputs = mr.MultiModalSequenceFeatures.from_schema(shop.schema(), catalogue=shop.catalogue(), config=config)
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(config=config))
    return tr.Model(tr.Head(body, [mr.MISSRecNextItemTask(config=config)], inputs=inputs))


def a_trainer(model: tr.Model, data: Path, folder: Path, **changes: Any) -> tr.Trainer:
    settings = {
        "output_dir": str(folder),
        "data_loader_engine": "merlin",
        "max_sequence_length": 12,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 1,
        "learning_rate": 0.01,
        "report_to": [],
        "no_cuda": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    paths = {name: str(data / split / "part_0.parquet") for name, split in {"train": "train", "eval": "valid"}.items()}
    return tr.Trainer(
        model=model,
        args=T4RecTrainingArguments(**(settings | changes)),
        schema=shop.schema(),
        train_dataset_or_path=paths["train"],
        eval_dataset_or_path=paths["eval"],
        compute_metrics=True,
    )


def test_a_t4r_script_ends_with_a_run_that_the_commands_take(data: Path, tmp_path: Path, caplog: Any) -> None:
    model = by_hand()
    trainer = a_trainer(model, data, tmp_path / "t4r")
    trainer.train()
    info = mr.save_run(model, trainer=trainer, out=tmp_path / "run")
    assert info["score_terms"]["valid_ndcg@10"] >= info["score_terms"]["valid_ndcg@10_without_terms"]
    loaded = load_run(tmp_path / "run")
    assert loaded.recipe.train.learning_rate == 0.01
    assert terms_of(loaded.model).item_knn is not None
    assert terms_of(loaded.model).item_knn.frequency.sum() > 0, "co-occurrences were counted on train"
    batch = {"item_id-list": torch.tensor([[5, 6, 8, 0], [40, 41, 0, 0]])}
    with torch.no_grad():
        expected = loaded.model.score(
            loaded.model(batch["item_id-list"]), loaded.model.candidates(), batch["item_id-list"]
        )
        torch.testing.assert_close(model.eval()(dict(batch)), expected, rtol=1e-5, atol=1e-5)
    report = commands.evaluate(tmp_path / "run", split="valid", baselines=False)
    assert report["n_users"] == 33
    page = Path(commands.run_page(tmp_path / "run", split="valid")["page"]).read_text(encoding="utf-8")
    assert "<b>1</b><span>epochs</span>" in page
    assert "<b>-</b>" not in page, "what a script does not note is left out"
    assert "No epoch is recorded in log.jsonl: a script of Transformers4Rec logs into" in page
    assert not caplog.records or "learning_rate" not in caplog.text
    assert "trained on other sessions" not in caplog.text


@pytest.mark.ddp
def test_of_several_processes_the_first_one_writes_the_run(data: Path, tmp_path: Path) -> None:
    """The second one would set the first one's aside, or rename the folder while it is written."""
    for code, message in group.run(["-m", "tests.contract.script", data, tmp_path]):
        assert code == 0, message[-3000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "t4r"]
    assert load_run(tmp_path / "run").recipe.train.learning_rate == 0.01


def test_validation_sessions_without_a_known_target_are_left_out(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("train", "test", "catalogue"):
        (folder / name).symlink_to(data / name)
    valid = shop.sessions(33, 1)
    shop.write_sessions(folder / "valid", [valid[0] + [2], [2], *valid[1:]])
    info = mr.save_run(by_hand(), out=tmp_path / "run", data=folder)
    shop.write_sessions(folder / "valid", valid[1:])
    assert info["valid"] == mr.save_run(by_hand(), out=tmp_path / "run", data=folder)["valid"]


def test_a_run_is_written_where_only_its_folder_can_be(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As into one that is mounted: a lock, or an earlier run, cannot be beside it."""
    out = tmp_path / "run"
    out.mkdir()
    monkeypatch.setattr("missrec_t4r.t4r.saving.os.access", lambda path, _: path != tmp_path)
    monkeypatch.setattr("missrec_t4r.t4r.saving.locked", None)
    for _ in range(2):
        mr.save_run(by_hand(), out=out, data=data)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert f"{out} held a finished run, which is replaced: {out} cannot be renamed" in caplog.text


def test_a_run_that_the_folder_holds_is_kept_beside_it_unless_it_is_to_be_replaced(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A script that is repeated ends with its own run, and with that of before it."""
    model, out, kept = by_hand(), tmp_path / "run", tmp_path / "run-earlier-1"
    mr.save_run(model, out=out, data=data)
    (out / "metrics_test.json").write_text("{}")  # an evaluation of that run
    out.chmod(0o775)
    assert "earlier" not in caplog.text
    weights = load_run(out).model.state_dict()
    with torch.no_grad():
        to_core(model).item_encoder.id_embedding.weight.add_(0.1)
    mr.save_run(model, out=out, data=data)
    assert f"{out} held a finished run, which is kept as {kept}; save_run(..., overwrite=True) replaces" in caplog.text
    assert (kept / "metrics_test.json").is_file()
    assert out.stat().st_mode & 0o777 == 0o775, "of those who may write into it"
    assert not (out / "metrics_test.json").exists()
    name = "item_encoder.id_embedding.weight"
    assert torch.equal(load_run(kept).model.state_dict()[name], weights[name])
    assert not torch.equal(load_run(out).model.state_dict()[name], weights[name])
    mr.save_run(model, out=out, data=data, overwrite=True)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["run", "run-earlier-1"]


def test_a_run_beside_whose_files_its_data_lie_is_replaced_since_they_must_stay(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, out = by_hand(), tmp_path / "run"
    shutil.copytree(data, out / "data")
    for _ in range(2):
        mr.save_run(model, out=out, data=out / "data")
    assert f"{out} held a finished run, which is replaced: {out / 'data'} could not stay" in caplog.text
    assert [folder.name for folder in tmp_path.iterdir()] == ["run"]
    assert load_run(out).catalogue.n_rows == to_core(model).item_encoder.n_rows


def a_batch_of(trainer: tr.Trainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_eval_dataloader()))[0]


def test_a_run_reads_event_features_as_the_model_was_trained_on_them(data: Path, tmp_path: Path) -> None:
    """A workflow's steps on numbers are not taken back, and requests hold raw values, not codes; 1 is a null's."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    for file in folder.glob("*/*.parquet"):
        if file.parent.name != "catalogue":  # no event has the code of padding
            table = pq.read_table(file).to_pydict()
            table["category-list"] = [[code or 1 for code in codes] for codes in table["category-list"]]
            pq.write_table(pa.table(table), file)
    colours = [f"colour {code}" for code in range(shop.N_CATEGORIES - 3)]
    price = {"kind": "continuous", "steps": [["log1p"], ["standardise", 0.4, 0.2]]}
    transform = {"features": {"category": {"kind": "categorical", "values": colours}, "price": price}}
    (folder / "session_transform.json").write_text(json.dumps(transform), encoding="utf-8")
    model = by_hand(n_neighbours=0, n_similar_items=0, cold_start_exposure=0.0)
    trainer = a_trainer(model, folder, tmp_path / "t4r")
    trainer.train()
    trained, batch = trainer.evaluate(), a_batch_of(trainer)
    with torch.no_grad():
        scores = model.eval()(dict(batch))
    info = mr.save_run(model, trainer=trainer, out=tmp_path / "run")
    ndcg = info["valid"]["kept_with_history_term"]["ndcg@10"]
    assert ndcg == pytest.approx(trained["eval_/next-item/ndcg_at_10"], abs=1e-6)
    assert (batch["category-list"] == 1).any()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(dict(batch)), scores)
    category, number = load_run(tmp_path / "run").model.event_columns
    assert category.encode(["colour 1", None, "mauve"]).tolist() == [4, 0, 2]
    assert number.encode([0.5]) == pytest.approx((np.log1p(0.5) - 0.4) / 0.2)


def test_a_script_goes_on_with_new_items_from_the_run_of_before(data: Path, tmp_path: Path) -> None:
    """As docs/t4r_contract.md says: weights follow the raw ids, whatever rows a new fit of the workflow gives them."""
    before = by_hand()
    mr.save_run(before, out=tmp_path / "run", data=data)
    former, ids = shop.catalogue(), shop.catalogue().items["item_id"].to_pylist()
    order = list(reversed(range(len(ids))))
    modalities = {}
    for name, modality in former.modalities.items():
        vectors = np.concatenate(
            [np.zeros((3, modality.width)), modality.vectors[3:][order], np.ones((2, modality.width))]
        )
        modalities[name] = mr.Modality(vectors.astype(np.float32), vectors.any(1))
    grown = make_catalogue([*(ids[place] for place in order), "new 1", "new 2"], modalities, np.full(len(ids) + 2, 4))
    config, schema = to_core(before).config, shop.schema(maximum=grown.n_rows - 1)
    inputs = mr.MultiModalSequenceFeatures.from_schema(schema, catalogue=grown, config=config)
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(config=config))
    model = tr.Model(tr.Head(body, [mr.MISSRecNextItemTask()], inputs=inputs))
    _, items = load_continued(mr.to_core(model), grown, read_source(tmp_path / "run"))
    assert items == {"kept": len(ids), "new": 2, "retired": 0}
    one, other = (to_core(each).item_encoder.id_embedding.weight.detach() for each in (before, model))
    torch.testing.assert_close(other[3:-2], one[3:].flip(0))
    model.train()
    rows = torch.tensor([[3, 4, grown.n_rows - 1, 5]])
    batch = {"item_id-list": rows, "category-list": rows % 8, "price-list": rows / 120}
    model(batch, training=True)["loss"].backward()
    assert to_core(model).item_encoder.id_embedding.weight.grad[-1].any(), "new items are trained as well"


def test_what_a_run_does_not_hold_of_a_script_is_told(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = by_hand()
    head = model.heads[0]
    head.prediction_task_dict["click"] = tr.BinaryClassificationTask("click", task_name="click")
    trainer = a_trainer(model, data, tmp_path / "t4r", data_loader_engine="missrec", max_sequence_length=4)
    mr.save_run(model, trainer=trainer, out=tmp_path / "run")
    assert "holds the next-item task alone; model.save(folder) also keeps click" in caplog.text
    assert "trained on at most 4 items of a session (max_sequence_length=4" in caplog.text
    assert f"the run reads up to {shop.MAX_LENGTH}" in caplog.text


def test_the_default_learning_rate_of_transformers_is_reported(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = by_hand()
    trainer = a_trainer(model, data, tmp_path / "t4r", learning_rate=5e-5)
    mr.save_run(model, trainer=trainer, out=tmp_path / "run")
    assert "pass learning_rate=0.001 to T4RecTrainingArguments" in caplog.text


@pytest.mark.parametrize("overwrite", [None, True, False])
def test_a_run_that_scores_otherwise_is_not_kept_and_an_earlier_one_stays(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool | None
) -> None:
    from missrec_t4r.runs import run_folder

    def damaged(path: Path, tensors: Any, metadata: Any = None) -> None:
        changed = {
            name: t + 0.1 if name.startswith("decoder") and t.is_floating_point() else t for name, t in tensors.items()
        }
        written(path, changed, metadata)

    if overwrite is not None:
        mr.save_run(by_hand(), out=tmp_path / "run", data=data)
    before, written = _content(tmp_path), run_folder.save_tensors
    monkeypatch.setattr(run_folder, "save_tensors", damaged)
    with pytest.raises(ParityError, match="read back scores validation sessions"):
        mr.save_run(by_hand(), out=tmp_path / "run", data=data, overwrite=bool(overwrite))
    assert _content(tmp_path) == before


_KILLED = """
import os, signal, sys
from pathlib import Path

import torch

import missrec_t4r.t4r as mr
from tests.contract.test_saving import by_hand

out, data, overwrite, left = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", 0
torch.set_num_threads(1)  # a fork has none of the threads that torch would wait for
model = by_hand()
with torch.no_grad():
    mr.to_core(model).item_encoder.id_embedding.weight.add_(0.1)


def kill_at_a_change_of_names(event, arguments):
    global left
    if event not in ("os.rename", "os.rmdir", "os.remove"):
        return
    path = Path(os.fsdecode(arguments[1 if event == "os.rename" else 0]))
    if path.parent in (out, out.parent):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(kill_at_a_change_of_names)
for number in range(1, 100):
    if not (child := os.fork()):
        left = number
        mr.save_run(model, out=out, data=data, overwrite=overwrite)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    weight = mr.saving.run_folder.load_run(out).model.item_encoder.id_embedding.weight
    print(number, status, float(weight[3].detach().sum()))
    if not status:
        break
"""


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_holds_the_earlier_or_the_new_run_wherever_its_process_is_killed(
    data: Path, tmp_path: Path, overwrite: bool
) -> None:
    out, name = tmp_path / "run", "item_encoder.id_embedding.weight"
    mr.save_run(by_hand(), out=out, data=data)
    before = float(load_run(out).model.state_dict()[name][3].sum())
    (out / "notes.txt").touch()
    done = processes.run(["-c", _KILLED, out, data, overwrite], cwd=Path.cwd())
    assert not done.returncode, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) > 2
    assert [int(status) for _, status, _ in lines] == [signal.SIGKILL] * (len(lines) - 1) + [0]
    sums = [float(value) for *_, value in lines]
    after = before + 0.1 * shop.SMALL["d_model"]
    assert all(min(abs(value - before), abs(value - after)) < 1e-3 for value in sums)
    assert sums[-1] == pytest.approx(after, abs=1e-3)
    with_notes = [folder.name for folder in sorted(tmp_path.iterdir()) if (folder / "notes.txt").is_file()]
    assert with_notes == (["run"] if overwrite else ["run-earlier-1"])
    assert not [path.name for path in (*tmp_path.iterdir(), *out.iterdir()) if path.name.startswith(".")]


def _content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_script_without_a_data_folder_is_told_what_to_pass(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no trainer"):
        mr.save_run(by_hand(), out=tmp_path / "run")
    with pytest.raises(DataError, match="hold no train, valid, catalogue"):
        mr.save_run(by_hand(), out=tmp_path / "run", data=tmp_path)
    other = mr.Catalogue(shop.catalogue().items.slice(0, 50), {})
    (tmp_path / "data").mkdir()
    for split in ("train", "valid"):
        (tmp_path / "data" / split).symlink_to(data / split)
    other.save(tmp_path / "data" / "catalogue")
    with pytest.raises(ConfigError, match="a model of 120 rows and a catalogue of 53"):
        mr.save_run(by_hand(), out=tmp_path / "run", data=tmp_path / "data")


def test_a_model_with_score_terms_is_traced_for_sessions_of_any_number_and_width(data: Path) -> None:
    """As T4R's deployment does after `save_run`; terms are switched on, whatever validation says of random weights."""
    model = by_hand().eval()
    core = to_core(model)
    train, valid = (load_sessions(data, split, core.event_columns).known() for split in ("train", "valid"))
    fit_terms(core, shop.catalogue(), train, valid)
    item_knn, content_knn, rare_items = (core.terms[name] for name in ("item_knn", "content_knn", "rare_items"))
    batches = [batch_of(size, valid, width) for size, width in ((4, 12), (7, 12), (1, 12), (4, 9), (4, 5), (3, 1))]
    with torch.no_grad():
        without = model(dict(batches[0]))
    item_knn.choose(item_knn.chosen._replace(weight=0.5))
    content_knn.choose(content_knn.chosen._replace(weight=0.3))
    item_knn.frequency[3:9] = 1.0
    rare_items.choose(torch.full_like(rare_items.settings, 0.1), [1.0] * len(rare_items.names))
    with torch.no_grad():
        assert not torch.allclose(without, model(dict(batches[0])), atol=1e-3)
    require_right_traces(model, batches)


@pytest.mark.parametrize(
    "settings",
    [
        {"sequence_fusion": "contextual", "attention": "bidirectional"},
        {"candidate_fusion": "static"},
        {"interest_ratio": 0.0},
    ],
)
def test_other_models_are_traced_without_a_warning_too(data: Path, settings: dict[str, Any]) -> None:
    model = by_hand(**settings).eval()
    sessions = load_sessions(data, "valid", to_core(model).event_columns).known()
    require_right_traces(model, [batch_of(size, sessions, width) for size, width in ((3, 1), (32, 12), (4, 5))])


def test_the_best_items_of_a_trace_are_those_of_the_model(data: Path) -> None:
    """T4R's serving notebooks set ``model.top_k`` before they trace; equal items keep the catalogue's order."""
    model = by_hand(interest_ratio=0.0).eval()
    sessions = load_sessions(data, "valid", to_core(model).event_columns).known()
    model.top_k = 7
    traced = torch.jit.trace(model, batch_of(4, sessions), check_trace=False)
    for batch in (batch_of(size, sessions, width) for size, width in ((4, 12), (9, 12), (1, 3))):
        with torch.no_grad():
            for found, expected in zip(traced(dict(batch)), model(dict(batch))):
                torch.testing.assert_close(found, expected)

    scores = torch.randint(5, (50, 30)).float()
    scores[scores == 0] = -torch.inf
    for k in (1, 7, 30):
        for found, expected in zip(_top_items_of_a_trace(scores, k), top_items(scores, k)):
            assert torch.equal(found, expected)


def require_right_traces(model: tr.Model, batches: list[dict[str, torch.Tensor]]) -> None:
    """Trace with the first batch and with the last one, and compare the scores of all; nothing of ours warns."""
    for example in (batches[0], batches[-1]):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            traced = torch.jit.trace(model, dict(example), strict=False, check_trace=False)
        ours = [one for one in said if Path(mr.__file__).parent in Path(one.filename).parents]
        assert [f"{one.filename}:{one.lineno}" for one in ours] == []
        for batch in batches:
            with torch.no_grad():
                torch.testing.assert_close(traced(dict(batch)), model(dict(batch)), atol=1e-4, rtol=1e-4)


def batch_of(size: int, sessions: Sessions, width: int = 12) -> dict[str, torch.Tensor]:
    """Return the first sessions as T4R's loaders do, all as wide."""
    columns = {"item_id": sessions.padded(range(size), width), **sessions.padded_features(range(size), width)}
    return {
        f"{name}-list": torch.nn.functional.pad(torch.from_numpy(of), (0, width - of.shape[1]))
        for name, of in columns.items()
    }
