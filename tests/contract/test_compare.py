"""Saved Transformers4Rec models in `missrec compare`: XLNet, and our blocks after the swap."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags

import missrec_t4r as mr
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.t4r.scorer import T4RScorer
from tests.contract import shop

LENGTH = 6


@pytest.fixture(scope="module")
def saved(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two untrained models, as ``model.save(folder)`` writes them."""
    torch.manual_seed(0)
    schema = shop.schema(event_features=False)
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=LENGTH, d_output=16, aggregation="concat", masking="clm"
    )
    config = tr.XLNetConfig.build(d_model=16, n_head=2, n_layer=1, total_seq_length=LENGTH)
    task = tr.NextItemPredictionTask(weight_tying=True)
    models = {
        "xlnet": config.to_torch_model(inputs, task),
        "ours": missrec(data),
    }
    folders = {}
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        model.save(folders[name])
    return folders


def missrec(data: Path) -> tr.Model:
    inputs = mr.MultiModalSequenceFeatures.from_schema(
        shop.schema(event_features=False), catalogue=Catalogue.load(data / "catalogue"), max_sequence_length=LENGTH
    )
    body = tr.SequentialBlock(inputs, mr.MISSRecBlock(**shop.SMALL))
    return tr.Model(tr.Head(body, [mr.MISSRecNextItemTask()], inputs=inputs))


def test_saved_models_are_ranked_like_runs(data: Path, saved: dict[str, Path]) -> None:
    result = mr.compare([saved["xlnet"], saved["ours"]], data=data, trust_pickle=True, max_sequence_length=LENGTH)
    assert result["systems"][result["current"]]["kind"] == "t4r model"
    assert result["systems"][result["current"]]["bytes"] > 1000
    assert f"reads the last {LENGTH} items of a session" in result["systems"][result["current"]]["notes"][0]
    assert set(result["protocols"]) == {EXCLUDED, KEPT_WITH_HISTORY_TERM}, "ours has a history bias"
    sessions = Sessions.load(data / "test", ())
    histories, targets = sessions.split_last()
    model = tr.Model.load(saved["xlnet"]).eval()
    with torch.no_grad():
        scores = model({"item_id-list": torch.from_numpy(histories.padded(range(len(histories)), LENGTH))})
    scores[:, :3] = -torch.inf
    own = scores.gather(1, torch.from_numpy(targets)[:, None])
    ranks = 1 + (scores > own).sum(1).numpy()
    expected = np.where(ranks <= 50, 1 / ranks, 0)[histories.known().lengths > 0].sum()
    measured = result["protocols"][KEPT_WITH_HISTORY_TERM][result["current"]]["mrr@50"]
    assert measured * len(targets) == pytest.approx(expected, rel=1e-5)


def test_a_model_in_memory_is_a_system_too(data: Path, saved: dict[str, Path]) -> None:
    systems = {"saved": saved["xlnet"], "loaded": tr.Model.load(saved["xlnet"])}
    result = mr.compare(systems, data=data, trust_pickle=True, max_sequence_length=LENGTH)
    assert result["verdict"]["decision"] == "no difference shown"
    assert set(result["protocols"]) == {EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM}


def test_a_model_of_several_tasks_is_ranked_by_its_next_item_task(data: Path) -> None:
    catalogue, alone = Catalogue.load(data / "catalogue"), missrec(data)
    body, task = alone.heads[0].body, alone.heads[0].prediction_task_dict["next-item"]
    several = tr.Model(tr.Head(body, [tr.BinaryClassificationTask("click"), task], inputs=body.inputs))
    histories, _ = Sessions.load(data / "test", ()).split_last()
    assert torch.equal(T4RScorer(several, catalogue)(histories), T4RScorer(alone, catalogue)(histories))
    click = tr.Model(tr.Head(body, [tr.BinaryClassificationTask("click")], inputs=body.inputs))
    with pytest.raises(ConfigError, match="tasks BinaryClassificationTask; expected: one head, and one NextItemPred"):
        T4RScorer(click, catalogue)


def test_a_pickle_is_read_with_consent_only(data: Path, saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="can run any code when it is read; expected: your consent.*add trust_pickle=True"
    ):
        mr.compare(["popularity", saved["xlnet"]], data=data)
    (tmp_path / "t4rec_model_class.pkl").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="save the model again"):
        mr.compare(["popularity", tmp_path], data=data, trust_pickle=True)


def test_a_t4r_model_with_our_history_bias_has_no_figure_under_strict(data: Path, saved: dict[str, Path]) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    scorers = {name: T4RScorer(tr.Model.load(folder), catalogue, LENGTH) for name, folder in saved.items()}
    found = evaluate_sessions(scorers, Sessions.load(data / "test", ()), catalogue)["protocols"]
    assert set(found[KEPT_STRICT]) == {"xlnet"}
    assert set(found[EXCLUDED]) == {"xlnet", "ours"}


def test_a_model_that_was_given_the_whole_schema_is_ranked(data: Path) -> None:
    user = ColumnSchema("user_id", dtype="str", tags=[Tags.USER_ID])
    schema = Schema([user, *shop.schema()])  # T4R's inputs take what they read: items, category, price
    inputs = tr.TabularSequenceFeatures.from_schema(
        schema, max_sequence_length=LENGTH, continuous_projection=8, d_output=16, masking="mlm"
    )
    config = tr.XLNetConfig.build(d_model=16, n_head=2, n_layer=1, total_seq_length=LENGTH)
    body = tr.SequentialBlock(inputs, tr.TransformerBlock(config, masking=inputs.masking))
    model = tr.Model(tr.Head(body, tr.NextItemPredictionTask(weight_tying=True), inputs=inputs))
    systems = {"xlnet": model, "popularity": "popularity"}
    result = mr.compare(systems, data=data, protocols=[EXCLUDED], max_sequence_length=LENGTH)
    assert 0 <= result["protocols"][EXCLUDED]["xlnet"]["recall@10"] <= 1
    assert result["sessions"]["left_out"] == 0
