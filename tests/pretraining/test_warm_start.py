"""`missrec train --warm-start`: items are matched by raw id in a grown, permuted or shrunken catalogue."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from missrec_t4r.commands.training import train
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.run_folder import VOCABULARY_FILE, load_run, load_tensors
from missrec_t4r.training import fit
from missrec_t4r.training.warm_start.nightly import load_continued
from missrec_t4r.training.warm_start.transfer import read_source
from tests.pretraining.conftest import IMAGE_WIDTH, SMALL, TEXT_WIDTH, angles, modality, write_shop

TODAY = [11, 4, 0, 12, 9, 2, 3, 8, 10, 13, 7, 1, 5]  # place 6 is retired, 12 and 13 are new, and all rows moved


def _text(places: list[int], fingerprint: str | None = "ring-text@1") -> object:
    return modality(np.asarray(places) * 2 * np.pi / 14, TEXT_WIDTH, 1, fingerprint)


@pytest.fixture(scope="module")
def earlier_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nightly")
    write_shop(folder / "monday", [f"P{place}" for place in range(12)], {"text": _text(list(range(12)))})
    settings = SMALL | {"train.epochs": 8, "train.learning_rate": 5e-3, "model.candidate_fusion": "dynamic_instance"}
    train(folder / "monday", folder / "run", recipe="pretrain", settings=settings | {"model.item_ids": True})
    places = np.argsort(np.argsort(TODAY))
    modalities = {"text": _text(TODAY)}
    write_shop(folder / "tuesday", [f"P{place}" for place in TODAY], modalities, order=places.tolist())
    write_shop(
        folder / "shuffled",
        [f"P{place}" for place in TODAY if place < 12] + ["P6"],
        {"text": _text([*(p for p in TODAY if p < 12), 6])},
    )
    return folder


def _row(catalogue: Catalogue, place: int) -> int:
    return int(catalogue.rows_of([f"P{place}"])[0])


def test_kept_items_keep_their_id_embeddings_and_new_ones_are_initialised(earlier_run: Path) -> None:
    catalogue, source = Catalogue.load(earlier_run / "tuesday" / "catalogue"), read_source(earlier_run / "run")
    torch.manual_seed(3)
    model = build_missrec(source.recipe.model, catalogue)
    initial = model.item_encoder.id_embedding.weight.detach().clone()
    report, items = load_continued(model, catalogue, source)
    assert items == {"kept": 11, "new": 2, "retired": 1}
    monday = Catalogue.load(earlier_run / "monday" / "catalogue")
    for place in range(14):
        if place == 6:
            continue
        row, own = _row(catalogue, place), model.item_encoder.id_embedding.weight[_row(catalogue, place)]
        kept = source.weights["item_encoder.id_embedding.weight"][_row(monday, place)] if place < 12 else initial[row]
        assert torch.equal(own, kept), place
        phi = source.weights["fusion.phi"][_row(monday, place)] if place < 12 else torch.zeros(())
        assert torch.equal(model.fusion.phi[row], phi)
    parts = {part["name"]: part for part in report["parts"]}
    assert parts["item IDs"]["note"] == "11 rows by raw id, the rest new"
    assert {part["status"] for part in report["parts"]} <= {"loaded", "missing", "re-initialised"}
    assert report["trainable_share"] == 1.0


def test_candidate_ids_of_their_own_are_kept_by_raw_id_as_well(earlier_run: Path) -> None:
    source, tuesday = read_source(earlier_run / "run"), Catalogue.load(earlier_run / "tuesday" / "catalogue")
    monday = Catalogue.load(earlier_run / "monday" / "catalogue")
    name = "item_encoder.candidate_id_embedding.weight"
    own = torch.randn_like(source.weights["item_encoder.id_embedding.weight"])
    model = build_missrec(source.recipe.changed({"model.candidate_ids": "own"}).model, tuesday)
    initial = model.item_encoder.id_tables[1].detach().clone()
    report, _ = load_continued(model, tuesday, source)  # the earlier run had none
    assert {part["name"]: part["status"] for part in report["parts"]}["candidate IDs"] == "missing"
    assert torch.equal(model.item_encoder.id_tables[1], initial)
    load_continued(model, tuesday, dataclasses.replace(source, weights={**source.weights, name: own}))
    found = model.item_encoder.id_tables[1]
    for place in (0, 4, 11):
        assert torch.equal(found[_row(tuesday, place)], own[_row(monday, place)])
    assert torch.equal(found[_row(tuesday, 12)], initial[_row(tuesday, 12)])


def test_kept_items_keep_their_interests_and_new_ones_get_the_nearest(earlier_run: Path) -> None:
    catalogue, source = Catalogue.load(earlier_run / "tuesday" / "catalogue"), read_source(earlier_run / "run")
    monday = Catalogue.load(earlier_run / "monday" / "catalogue")
    before, centroids = source.weights["interests.assignment"], source.weights["interests.centroids"]
    n_embeddings = sum(int(modality.present.sum()) for modality in catalogue.modalities.values())
    ratio = (len(centroids) - 1.5) / n_embeddings  # as many interests for more items
    model = build_missrec(source.recipe.changed({"model.interest_ratio": ratio}).model, catalogue)
    load_continued(model, catalogue, source)
    assert len(model.interests.centroids) == len(centroids)
    assert torch.equal(model.interests.centroids, centroids)
    for place in (0, 5, 11):
        assert model.interests.assignment[0, _row(catalogue, place)] == before[0, _row(monday, place)]
    tokens = model.eval().item_encoder.catalogue().modality[0]
    for place in (12, 13):
        row = _row(catalogue, place)
        nearest = (centroids[1:] - tokens[row]).square().sum(1).argmin() + 1
        assert model.interests.assignment[0, row] == nearest


@pytest.mark.parametrize("ratio", [0.01, 0.9])
def test_interests_can_become_more_or_fewer(earlier_run: Path, ratio: float) -> None:
    catalogue, source = Catalogue.load(earlier_run / "tuesday" / "catalogue"), read_source(earlier_run / "run")
    model = build_missrec(source.recipe.changed({"model.interest_ratio": ratio}).model, catalogue)
    load_continued(model, catalogue, source)
    places = model.interests.assignment[0, 3:]
    assert places.min() >= 1
    assert places.max() <= len(model.interests.centroids) - 1
    model.discover_interests(seed=0)  # goes on from there
    assert model.interests.assignment[0, 3:].min() >= 1


def test_moved_rows_alone_change_no_score(earlier_run: Path) -> None:
    """The same items in another order: every session scores every item as before."""
    catalogue, source = Catalogue.load(earlier_run / "shuffled" / "catalogue"), read_source(earlier_run / "run")
    monday = load_run(earlier_run / "run", earlier_run / "monday")
    model = build_missrec(source.recipe.model, catalogue)
    load_continued(model, catalogue, source)
    model.eval()
    walk = [2, 3, 4]
    old = torch.tensor([[_row(monday.catalogue, place) for place in walk]])
    new = torch.tensor([[_row(catalogue, place) for place in walk]])
    before = monday.model.score(monday.model(old), monday.model.candidates(), old)[0]
    after = model.score(model(new), model.candidates(), new)[0]
    for place in range(12):
        assert after[_row(catalogue, place)].item() == pytest.approx(
            before[_row(monday.catalogue, place)].item(), abs=1e-6
        )


def test_a_warm_started_run_can_be_warm_started_from(earlier_run: Path, tmp_path: Path) -> None:
    settings = {"train.epochs": 1}
    result = train(earlier_run / "tuesday", tmp_path / "tuesday", warm_start=earlier_run / "run", settings=settings)
    assert result["weight_loading"]["kind"] == "warm_start"
    assert result["weight_loading"]["items"] == {"kept": 11, "new": 2, "retired": 1}
    assert load_run(tmp_path / "tuesday").recipe.model == read_source(earlier_run / "run").recipe.model
    fresh = fit.train(
        earlier_run / "tuesday", tmp_path / "fresh", recipe=read_source(earlier_run / "run").recipe.changed(settings)
    )
    assert result["valid_ndcg@10"] > fresh["valid_ndcg@10"]
    again = train(
        earlier_run / "monday",
        tmp_path / "wednesday",
        warm_start=tmp_path / "tuesday",
        settings=settings,
        freeze="encoder_decoder",
    )
    assert again["weight_loading"]["items"] == {"kept": 11, "new": 1, "retired": 2}
    before, after = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("tuesday", "wednesday"))
    assert torch.equal(before["encoder.norm.weight"], after["encoder.norm.weight"])


def test_the_vocabulary_is_stored_in_the_run(earlier_run: Path, tmp_path: Path) -> None:
    """The nightly ETL overwrites the data folder, so the rows of items must not be read from it."""
    import shutil

    shutil.copytree(earlier_run / "run", tmp_path / "run")
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"data": "gone"}))
    catalogue = Catalogue.load(earlier_run / "tuesday" / "catalogue")
    source = read_source(tmp_path / "run")
    assert load_continued(build_missrec(source.recipe.model, catalogue), catalogue, source)[1]["kept"] == 11
    (tmp_path / "run" / VOCABULARY_FILE).unlink()  # as an older run
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"data": str(earlier_run / "tuesday")}))
    with pytest.raises(CheckpointError, match="holds no item ids.*16 rows now"):
        load_continued(build_missrec(source.recipe.model, catalogue), catalogue, read_source(tmp_path / "run"))


def test_a_new_modality_gets_an_adapter_and_a_removed_one_is_reported(earlier_run: Path, tmp_path: Path) -> None:
    places = list(range(12))
    image = modality(angles(12), IMAGE_WIDTH, 2, "ring-image@1")
    write_shop(tmp_path / "more", [f"P{i}" for i in places], {"image": image, "text": _text(places)})
    source = read_source(earlier_run / "run")
    catalogue = Catalogue.load(tmp_path / "more" / "catalogue")
    report, _ = load_continued(build_missrec(source.recipe.model, catalogue), catalogue, source)
    parts = {part["name"]: part for part in report["parts"]}
    assert (parts["adapter image"]["status"], parts["adapter image"]["note"]) == ("missing", "a new modality")
    assert parts["adapter text"]["status"] == "loaded"
    write_shop(tmp_path / "less", [f"P{i}" for i in places], {"image": image})
    catalogue = Catalogue.load(tmp_path / "less" / "catalogue")
    report, _ = load_continued(build_missrec(source.recipe.model, catalogue), catalogue, source)
    assert {part["name"] for part in report["parts"] if part["status"] == "unexpected"} == {"adapter text"}


def test_unfit_runs_and_options_are_errors(
    earlier_run: Path, shops: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    out, run = tmp_path / "out", earlier_run / "run"
    with pytest.raises(CheckpointError, match="--from"):
        train(earlier_run / "tuesday", out, warm_start=pretrained)
    with pytest.raises(CheckpointError, match="ids are int64 here and string"):
        train(shops["toys"], out, warm_start=run)
    with pytest.raises(CheckpointError, match="no item of this catalogue"):
        train(shops["tools"], out, warm_start=run)
    with pytest.raises(CheckpointError, match="--set model.n_head=2"):
        train(earlier_run / "tuesday", out, warm_start=run, settings={"model.n_head": 4})
    with pytest.raises(ConfigError, match="a new folder"):
        train(earlier_run / "tuesday", run, warm_start=run)
    write_shop(tmp_path / "other", [f"P{i}" for i in range(12)], {"text": _text(list(range(12)), "ring-text@2")})
    with pytest.raises(CheckpointError, match=r"another encoder.*ring-text@2.*missrec features --like"):
        train(tmp_path / "other", out, warm_start=run)
    assert not out.exists()


def test_an_unstated_encoder_is_assumed_to_be_the_same_and_reported(earlier_run: Path, tmp_path: Path) -> None:
    write_shop(tmp_path / "silent", [f"P{i}" for i in range(12)], {"text": _text(list(range(12)), None)})
    source, catalogue = read_source(earlier_run / "run"), Catalogue.load(tmp_path / "silent" / "catalogue")
    report, _ = load_continued(build_missrec(source.recipe.model, catalogue), catalogue, source)
    assert report["parts"][0]["note"] == "its encoder is not stated: assumed to be the same"


def test_new_categories_of_events_are_appended(tmp_path: Path) -> None:
    from missrec_t4r.data.event_features import EventColumn
    from missrec_t4r.training.warm_start.nightly import _extend_values

    (tmp_path / "session_transform.json").write_text(json.dumps({"features": {"event": {"values": ["gift", "view"]}}}))
    column = EventColumn("event", "categorical", 5, values=("view", "buy"))
    assert _extend_values(column, tmp_path).values == ("view", "buy", "gift")
    assert _extend_values(column, tmp_path).size == 6
    assert _extend_values(EventColumn("price", "continuous"), tmp_path) == EventColumn("price", "continuous")


def test_event_features_keep_their_tables_and_new_categories_are_random(earlier_run: Path) -> None:
    import dataclasses

    from missrec_t4r.data.event_features import EventColumn
    from missrec_t4r.training.warm_start.transfer import Source

    catalogue, source = Catalogue.load(earlier_run / "monday" / "catalogue"), read_source(earlier_run / "run")
    then = [EventColumn("event", "categorical", 5, 4, values=("view", "buy")), EventColumn("price", "continuous", 1, 4)]
    weights = build_missrec(source.recipe.model, catalogue, then).state_dict()
    now = [dataclasses.replace(then[0], size=6, values=("view", "buy", "gift")), then[1]]
    model = build_missrec(source.recipe.model, catalogue, now)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report, _ = load_continued(model, catalogue, Source(source.run, source.recipe, source.info, weights))
    [table] = [
        name for name, tensor in weights.items() if name.startswith("event_features.") and tuple(tensor.shape) == (5, 4)
    ]
    after = model.state_dict()
    assert torch.equal(after[table][:5], weights[table])
    assert torch.equal(after[table][5], before[table][5])
    assert torch.equal(after["event_features.projection.weight"], weights["event_features.projection.weight"])
    assert {part["name"]: part["status"] for part in report["parts"]}["event features"] == "loaded"


def test_contradictory_options_are_errors(earlier_run: Path, tmp_path: Path) -> None:
    from missrec_t4r import commands

    data, run = earlier_run / "tuesday", earlier_run / "run"
    for options, words in [
        ({"start_from": run, "warm_start": run}, "both .start_from. and .warm_start."),
        ({"start_from": run, "trainer": "t4r"}, "native"),
        ({"freeze": "none"}, "start_from"),
        ({"trainer": "keras"}, "native or t4r"),
    ]:
        with pytest.raises(ConfigError, match=words):
            commands.train(data, tmp_path / "out", **options)
    result = commands.train(data, tmp_path / "out", warm_start=run, settings={"train.epochs": 1})
    assert result["weight_loading"]["freeze"] == "none"
    assert Recipe.from_dict(json.loads((tmp_path / "out" / "recipe.json").read_text())).train.epochs == 1
