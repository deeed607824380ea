"""Catalogue updates: new, changed and retired items without training; everything else keeps its score."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from missrec_t4r import commands
from missrec_t4r.bundle import update_catalogue as updates
from missrec_t4r.bundle.bundle import LoadedBundle, load_bundle, write_bundle
from missrec_t4r.bundle.catalogue_changes import Changes
from missrec_t4r.bundle.manifest import catalogue_version, verify_bundle
from missrec_t4r.bundle.update_catalogue import previous_of, rollback_catalogue, update_catalogue
from missrec_t4r.cli import app
from missrec_t4r.commands.bundles import _require_same_encoder
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import BundleError, DataError, ModalityError, ParityError
from missrec_t4r.export.export import export
from missrec_t4r.io import atomic
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.serving.deploy.blue_green import deploy
from tests.serving import shop

NAN = float("nan")
CHANGED, RETIRED, NO_IMAGE = "ware-3-ü", "ware-9-ü", "neu-2"
ITEMS = pa.table(
    {
        "item_id": ["neu-1", CHANGED, NO_IMAGE, RETIRED],
        "title": ["Neu 1", "Ware 3, neu", "Neu 2", "Ware 9"],
        "price": pa.array([1, 2, None, 4], pa.int64()),
        "retired": [False, False, None, True],
    }
)


def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    text, image = rng.normal(size=(4, 12)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    text[3], image[2:] = NAN, NAN
    return {"text": text, "image": image}


@pytest.fixture
def before(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def after(before: Path) -> LoadedBundle:
    update_catalogue(before, ITEMS, modalities=vectors())
    return load_bundle(before)


def scores_of(loaded: LoadedBundle, rows: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        sessions = torch.from_numpy(rows)
        return loaded.model.score(loaded.model(sessions), loaded.model.candidates(), sessions).numpy()


def test_known_items_keep_their_rows_and_untouched_ones_their_scores(before: Path, after: LoadedBundle) -> None:
    old = load_bundle(previous_of(before))
    n = old.catalogue.n_rows
    assert after.catalogue.items["item_id"].to_pylist()[: n - 3] == old.catalogue.items["item_id"].to_pylist()
    assert after.catalogue.items["item_id"].to_pylist()[n - 3 :] == ["neu-1", NO_IMAGE]
    touched = old.catalogue.rows_of([CHANGED, RETIRED])
    rest = np.setdiff1d(np.arange(3, n), touched)
    sessions = np.random.default_rng(0).choice(rest, (50, 6))
    np.testing.assert_allclose(
        scores_of(after, sessions)[:, rest], scores_of(old, sessions)[:, rest], atol=1e-6, rtol=0
    )
    with torch.inference_mode():
        ranked = [
            Ranker(one.model, one.catalogue).rank(sessions, top_k=5, allow=np.tile(rest, (50, 1)))
            for one in (old, after)
        ]
    assert ranked[0].rows.tolist() == ranked[1].rows.tolist()
    np.testing.assert_allclose(ranked[0].scores, ranked[1].scores, rtol=0, atol=1e-6)


def test_a_new_item_is_scored_by_its_modalities_alone_and_has_the_nearest_interests(after: LoadedBundle) -> None:
    (row,) = after.catalogue.rows_of(["neu-1"])
    sessions = np.array([[5, 9, 4]])
    with torch.inference_mode():
        model, candidates = after.model, after.model.candidates()
        votes = torch.einsum("d,md->m", model(torch.from_numpy(sessions))[0], candidates.modality[:, row])
        expected = float((torch.softmax(model.fusion.phi * votes, 0) * votes).sum())
        tokens = model.item_encoder.catalogue().modality[:, row]
        nearest = torch.cdist(tokens, model.interests.centroids[1:]).argmin(1) + 1
    assert abs(scores_of(after, sessions)[0, row] - expected) < 1e-6
    assert model.interests.assignment[:, row].tolist() == nearest.tolist()
    assert len(model.interests.centroids) < model.interests.size(0.5, model.item_encoder.masks(dropout=False).mask) + 1
    (text_only,) = after.catalogue.rows_of([NO_IMAGE])
    assert int(model.interests.assignment[1, text_only]) == 0
    assert model.recommendable[text_only]
    assert not bool(model.item_encoder.trained_ids[[row, text_only]].any())
    assert model(torch.tensor([[row, text_only]])).isfinite().all()  # new items may stand in a session


def test_a_changed_item_has_new_vectors_columns_and_interests(before: Path, after: LoadedBundle) -> None:
    old = load_bundle(previous_of(before))
    (row,) = old.catalogue.rows_of([CHANGED])
    np.testing.assert_array_equal(after.catalogue.modalities["text"].vectors[row], vectors()["text"][1])
    line = after.catalogue.items.slice(row - 3, 1).to_pylist()[0]
    in_stock = old.catalogue.items["in_stock"][row - 3].as_py()
    assert (line["title"], line["price"], line["in_stock"]) == ("Ware 3, neu", 2.0, in_stock)
    assert line["train_count"] == old.catalogue.items["train_count"][row - 3].as_py()
    assert after.catalogue.items["train_count"].to_pylist()[-2:] == [0, 0]
    assert after.catalogue.items["brand"].to_pylist()[-2:] == [None, None]


def test_the_version_changes_when_a_vector_does(before: Path) -> None:
    text = load_bundle(before).catalogue.modalities["text"]
    (row,) = load_bundle(before).catalogue.rows_of([CHANGED])
    moved = text.vectors[[row]] + 1e-3
    done = update_catalogue(before, pa.table({"item_id": [CHANGED]}), modalities={"text": moved})
    assert done["updated"]
    assert done["catalogue_version"] != done["previous"]
    after = load_bundle(before).catalogue
    np.testing.assert_array_equal(after.modalities["text"].vectors[row], moved[0])
    assert after.items.equals(load_bundle(previous_of(before)).catalogue.items)  # no column has changed
    again = update_catalogue(before, pa.table({"item_id": [CHANGED]}), modalities={"text": moved})
    assert (again["updated"], again["catalogue_version"]) == (False, done["catalogue_version"])
    assert catalogue_version(verify_bundle(previous_of(before))) == done["previous"]  # repeating it changes nothing


def test_the_version_changes_when_a_column_does(before: Path) -> None:
    done = update_catalogue(before, pa.table({"item_id": [CHANGED], "title": ["Ware 3, billiger"]}))
    assert done["catalogue_version"] != done["previous"]


def test_an_item_with_new_vectors_gets_the_interests_nearest_to_them(before: Path) -> None:
    old = load_bundle(before)
    rows = old.catalogue.rows_of([CHANGED, "ware-5-ü"])
    assignment = old.model.interests.assignment  # [modality, catalogue]
    others = [  # per item, one of another interest of the texts, whose vector they get
        int(np.flatnonzero((assignment[0] != assignment[0, row]).numpy() & (assignment[0] > 0).numpy())[-1])
        for row in rows
    ]
    vectors = old.catalogue.modalities["text"].vectors[others]
    update_catalogue(before, pa.table({"item_id": [CHANGED, "ware-5-ü"]}), modalities={"text": vectors})
    new = load_bundle(before).model
    with torch.inference_mode():
        tokens = new.item_encoder.catalogue().modality[0, rows]
        nearest = torch.cdist(tokens, new.interests.centroids[1:]).argmin(1) + 1
    assert new.interests.assignment[0, rows].tolist() == nearest.tolist()
    assert (new.interests.assignment[0, rows] != assignment[0, rows]).any()
    assert new.interests.assignment[1].tolist() == assignment[1].tolist()  # their images have not changed


def test_a_dry_run_of_an_update_changes_nothing(before: Path) -> None:
    version = catalogue_version(verify_bundle(before))
    done = update_catalogue(before, ITEMS, modalities=vectors(), dry_run=True)
    assert (done["updated"], done["added"]) == (False, 2)
    assert done["catalogue_version"] != version == catalogue_version(verify_bundle(before))
    assert [entry.name for entry in before.parent.iterdir()] == ["bundle"]


def test_popularity_is_that_of_the_training_whatever_an_update_says(before: Path) -> None:
    counts = load_bundle(before).catalogue.train_count.tolist()
    update_catalogue(before, pa.table({"item_id": [CHANGED, "neu-1"], "train_count": [10_000, 10_000]}))
    assert load_bundle(before).catalogue.train_count.tolist() == [*counts, 0]


def test_the_id_column_of_the_new_items_may_have_another_name(before: Path, tmp_path: Path) -> None:
    file = tmp_path / "new.parquet"
    pq.write_table(pa.table({"sku": ["neu-1"], "item_id": [17], "title": ["Neu 1"]}), file)
    words = ["catalogue", "update", "--bundle", str(before), "--items", str(file)]
    refused = CliRunner().invoke(app, [*words, "--item-column", "skuu"])
    assert "expected: a column 'skuu'. name yours with --item-column" in refused.output
    done = CliRunner().invoke(app, [*words, "--item-column", "sku"])
    assert json.loads(done.stdout.splitlines()[-1])["added"] == 1
    assert load_bundle(before).catalogue.items["item_id"].to_pylist()[-1] == "neu-1"


def test_an_update_that_is_killed_between_its_renames_loses_no_version(
    before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = update_catalogue(before, ITEMS, modalities=vectors())["catalogue_version"]
    more = pa.table({"item_id": [CHANGED], "retired": [True]})

    def killed(one: Path, other: Path) -> None:
        if other == before:
            raise KeyboardInterrupt
        atomic.exchange(one, other)

    with monkeypatch.context() as patched:
        patched.setattr("missrec_t4r.bundle.update_catalogue.exchange", killed)
        with pytest.raises(KeyboardInterrupt):
            update_catalogue(before, more)
    assert catalogue_version(verify_bundle(before)) == version
    assert update_catalogue(before, more)["previous"] == version
    assert rollback_catalogue(before)["catalogue_version"] == version


def test_a_damaged_version_before_is_not_rolled_back_to(before: Path) -> None:
    done = update_catalogue(before, ITEMS, modalities=vectors())
    file = previous_of(before) / "items.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"items\.parquet is damaged"):
        rollback_catalogue(before)
    assert catalogue_version(verify_bundle(before)) == done["catalogue_version"]


def test_a_retired_item_is_not_recommended_but_known_in_a_session_until_it_comes_back(
    before: Path, after: LoadedBundle
) -> None:
    (row,) = after.catalogue.rows_of([RETIRED])
    ranking = Ranker(after.model, after.catalogue).rank(np.array([[row, 5], [2, 0]]), top_k=100)
    assert row not in ranking.rows
    assert ranking.n_unknown.tolist() == [0, 1]
    np.testing.assert_array_equal(  # no vector was given: it keeps its own
        after.catalogue.modalities["text"].vectors[row],
        load_bundle(previous_of(before)).catalogue.modalities["text"].vectors[row],
    )
    update_catalogue(before, pa.table({"item_id": [RETIRED], "retired": [False]}))
    back = load_bundle(before)
    assert row in Ranker(back.model, back.catalogue).rank(np.array([[5]]), top_k=100).rows
    assert "neu-1" in back.catalogue.items["item_id"].to_pylist()


def test_rollback_exchanges_the_versions_and_a_second_one_undoes_it(before: Path) -> None:
    first = catalogue_version(verify_bundle(before))
    done = update_catalogue(before, ITEMS, modalities=vectors())
    assert (done["previous"], done["added"], done["changed"], done["retired"]) == (first, 2, 2, 1)
    assert done["largest_difference"] <= 1e-6
    assert done["catalogue_version"] == catalogue_version(verify_bundle(before)) != first
    assert rollback_catalogue(before)["catalogue_version"] == first == catalogue_version(verify_bundle(before))
    assert rollback_catalogue(before)["catalogue_version"] == done["catalogue_version"]
    assert sorted(entry.name for entry in before.parent.iterdir()) == ["bundle", "bundle.previous"]


def test_rows_that_say_what_the_catalogue_says_are_no_change(before: Path) -> None:
    """A team exports its whole catalogue every night: one new item is one change."""
    old = load_bundle(before).catalogue
    news = pa.table({name: old.items.slice(0, 1)[name] for name in ("title", "price")}).append_column(
        "item_id", [["neu-1"]]
    )
    names = ["item_id", "title", "price"]
    table = pa.concat_tables([old.items.select(names), news.select(names)])
    text = np.concatenate([old.modalities["text"].vectors[3:], np.ones((1, 12), np.float32)])
    text[:-1][~old.modalities["text"].present[3:]] = NAN
    done = update_catalogue(before, table, modalities={"text": text})
    assert (done["added"], done["changed"], done["unchanged"]) == (1, 0, old.n_items)
    again = update_catalogue(before, table, modalities={"text": text})
    assert (again["updated"], again["added"], again["changed"], again["unchanged"]) == (False, 0, 0, old.n_items + 1)
    other = table.set_column(2, "price", pa.array([1234, *table["price"].to_pylist()[1:]], table["price"].type))
    assert update_catalogue(before, other)["changed"] == 1


def test_a_row_index_of_pandas_is_no_change(before: Path, tmp_path: Path) -> None:
    """Two tables joined in pandas leave their row numbers in the file."""
    old = load_bundle(before).catalogue
    told = old.items.select(["item_id", "title", "price"]).to_pandas()
    news = told.head(1).assign(item_id="neu-1")
    pd.concat([told, news]).to_parquet(tmp_path / "items.parquet")
    assert "__index_level_0__" in pq.read_schema(tmp_path / "items.parquet").names
    done = update_catalogue(before, tmp_path / "items.parquet")
    assert (done["added"], done["changed"], done["unchanged"]) == (1, 0, old.n_items)
    assert "__index_level_0__" not in load_bundle(before).catalogue.items.column_names


def test_a_bundle_without_a_version_before_cannot_be_rolled_back(before: Path) -> None:
    with pytest.raises(BundleError, match="no version before"):
        rollback_catalogue(before)


def test_an_update_that_would_move_scores_does_not_appear(before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, version = updates.load_bundle, catalogue_version(verify_bundle(before))

    def disturbed(folder: Path) -> LoadedBundle:
        loaded = real(folder)
        if folder != before:
            with torch.no_grad():
                loaded.model.decoder.norm.weight.mul_(1.001).add_(1e-4)
        return loaded

    monkeypatch.setattr(updates, "load_bundle", disturbed)
    with pytest.raises(ParityError, match="would change their scores"):
        update_catalogue(before, ITEMS, modalities=vectors())
    assert catalogue_version(verify_bundle(before)) == version
    assert [entry.name for entry in before.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("items", "given", "error", "words"),
    [
        ({"name": ["a"]}, {}, DataError, "item_id"),
        ({"item_id": pa.array([], pa.string())}, {}, DataError, "0 rows"),
        ({"item_id": ["a", "a"]}, {}, DataError, "repeated"),
        ({"item_id": ["a", None]}, {}, DataError, "missing or repeated"),
        ({"item_id": ["a"], "price": ["dear"]}, {}, DataError, "column 'price'"),
        ({"item_id": ["a"]}, {"sound": np.zeros((1, 3))}, ModalityError, "modality 'sound'"),
        ({"item_id": ["a"]}, {"text": np.zeros((2, 12))}, ModalityError, r"\(2, 12\)"),
        ({"item_id": ["a"]}, {"text": np.zeros((1, 12), np.int64)}, ModalityError, "int64"),
        ({"item_id": ["a"]}, {"text": np.array([[NAN, *range(11)]])}, ModalityError, "row 0"),
        ({"item_id": [""]}, {"text": np.ones((1, 12))}, BundleError, "the empty string"),
    ],
)
def test_items_and_vectors_that_do_not_fit_are_refused(
    before: Path, items: dict[str, object], given: dict[str, np.ndarray], error: type[Exception], words: str
) -> None:
    version = catalogue_version(verify_bundle(before))
    with pytest.raises(error, match=words):
        update_catalogue(before, pa.table(items), modalities=given)
    assert catalogue_version(verify_bundle(before)) == version


def test_files_are_read_and_a_damaged_one_is_named(before: Path, tmp_path: Path) -> None:
    pq.write_table(ITEMS, tmp_path / "new.parquet")
    np.save(tmp_path / "text.npy", vectors()["text"])
    done = update_catalogue(before, tmp_path / "new.parquet", modalities={"text": tmp_path / "text.npy"})
    assert done["added"] == 2
    (tmp_path / "new.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"new\.parquet cannot be read"):
        update_catalogue(before, tmp_path / "new.parquet")
    with pytest.raises(DataError, match=r"gone\.parquet cannot be read \(there is no such file\)"):
        update_catalogue(before, tmp_path / "gone.parquet")


@pytest.mark.parametrize(
    "settings",
    [
        {"candidate_fusion": "dynamic_instance", "sequence_fusion": "contextual", "attention": "bidirectional"},
        {"missing_modality": "zero_row", "mask_untrained_ids": False},
        {"item_ids": False, "candidate_fusion": "static"},
        {"candidate_ids": "own"},
        {"interest_ratio": 0.0},
    ],
)
def test_every_configuration_can_grow(tmp_path: Path, settings: dict[str, object]) -> None:
    own = shop.catalogue()
    model = shop.model_for(own, **settings)
    data = shop.data_folder(tmp_path / "data", own)
    write_bundle(tmp_path / "bundle", model=model, catalogue=own, data=data)
    done = update_catalogue(tmp_path / "bundle", ITEMS, modalities=vectors())
    assert done["largest_difference"] <= 1e-6
    grown = load_bundle(tmp_path / "bundle")
    ranking = Ranker(grown.model, grown.catalogue).rank(np.array([[5, 33]]), top_k=100)
    assert {33, 34} <= set(ranking.rows[0].tolist())


def test_the_commands_update_and_roll_back(before: Path, tmp_path: Path) -> None:
    pq.write_table(ITEMS, tmp_path / "new.parquet")
    np.save(tmp_path / "text.npy", vectors()["text"])
    options = ["--bundle", str(before), "--items", str(tmp_path / "new.parquet")]
    run = CliRunner().invoke(app, ["catalogue", "update", *options, "--modality", f"text={tmp_path / 'text.npy'}"])
    assert run.exit_code == 0, run.output
    done = json.loads(run.stdout.splitlines()[-1])
    assert done["added"] == 2
    run = CliRunner().invoke(app, ["catalogue", "rollback", "--bundle", str(before)])
    assert json.loads(run.stdout.splitlines()[-1])["catalogue_version"] == done["previous"]


def test_what_looks_like_a_mistake_is_told(before: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A mistyped id among the retired ones, a mistyped column."""
    retired = pa.table({"item_id": [RETIRED, "ware-99-ü"], "retired": [True, True], "prize": [1.0, None]})
    told = update_catalogue(before, retired)
    assert (told["added"], told["without_vectors"]) == (1, 0)
    assert "1 retired items are not in the catalogue, such as 'ware-99-ü'" in caplog.text
    assert "new columns, without a value for all other items: prize" in caplog.text
    assert "have no vector" not in caplog.text


def test_what_the_next_export_and_deploy_undo_is_told(
    before: Path, bundle: Path, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A training knows neither the items that were added to the bundle since, nor those that were retired there."""
    told = (
        "no longer in the catalogue, without events in training: 2 items (neu-1, neu-2); give them in the item table",
        f"retired in the bundle that is replaced, and recommended again: 1 item ({RETIRED})",
    )
    update_catalogue(before, ITEMS, modalities=vectors())
    deploy(tmp_path / "live", bundle=before)
    caplog.clear()
    deploy(tmp_path / "live", bundle=bundle)
    assert all(words in caplog.text for words in told)
    caplog.clear()
    export(run, before)
    assert all(words in caplog.text for words in told)
    caplog.clear()
    export(run, before)
    deploy(tmp_path / "live", bundle=before)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    commands.catalogue_update(
        pa.table({"item_id": [CHANGED, RETIRED], "retired": [True, True]}), repository=tmp_path / "live"
    )
    commands.catalogue_update(pa.table({"item_id": [RETIRED], "retired": [False]}), repository=tmp_path / "live")
    assert "recommended again" not in caplog.text  # that is what was asked for
    deploy(tmp_path / "live", bundle=_of_integers(tmp_path))
    assert "item ids are of type int64, not string: clients connect again" in caplog.text


def _of_integers(folder: Path) -> Path:
    """Write a bundle of another catalogue, whose ids are integers."""
    own = shop.catalogue(integers=True)
    data = shop.data_folder(folder / "data", own)
    write_bundle(folder / "integers", model=shop.model_for(own), catalogue=own, data=data)
    return folder / "integers"


def test_a_modality_that_new_items_do_not_get_is_told(
    run: Path, before: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the items have another vector, and where --data is given: its catalogue has no encoder of pictures."""
    new = pa.table({"item_id": ["neu-1", "neu-2", "neu-3"], "retired": [False, None, True]})
    commands.catalogue_update(
        new, bundle=before, data=run.parent / "data", modality={"text": vectors()["text"][:3]}, dry_run=True
    )
    assert (
        "2 new items get no vector of image, which 67% of the items have; expected: --modality image=FILE.npy, or "
        "--data with a folder whose catalogue holds the encoder of image" in caplog.text
    )
    assert "no vector of text" not in caplog.text
    caplog.clear()
    none = {"text": vectors()["text"][:3], "image": np.full((3, 6), NAN, np.float32)}
    update_catalogue(before, new, modalities=none, dry_run=True)  # says that they have none
    update_catalogue(before, pa.table({"item_id": [CHANGED], "price": [1.0]}))  # known ones keep theirs
    assert "no vector" not in caplog.text


def test_new_texts_without_vectors_are_told() -> None:
    catalogue = shop.catalogue()
    text = replace(catalogue.modalities["text"], encoder={"columns": ["title", "subtitle"]})
    read = Catalogue(catalogue.items, {**catalogue.modalities, "text": text})
    title = read.items["title"].to_pylist()[read.rows_of([RETIRED])[0] - 3]
    table = pa.table({"item_id": [CHANGED, RETIRED, "neu"], "title": ["Neues", title, "Neu"], "price": [1.0, 2, 3]})
    assert Changes.of(table, {}, read).with_old_vectors(read) == {"text": 1}
    assert Changes.of(table, {"text": vectors()["text"][:3]}, read).with_old_vectors(read) == {}


def test_another_encoder_than_the_served_one_is_refused() -> None:
    ours = {"fingerprint": "sha256:ours"}
    _require_same_encoder("text", ours, ours, Path("data"))
    with pytest.raises(ModalityError, match="text encoder of data has .* sha256:other; expected: that of the bundle"):
        _require_same_encoder("text", ours, {"fingerprint": "sha256:other"}, Path("data"))


def test_two_updates_at_once_are_both_in_the_bundle(
    before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second one starts while the first one compares scores, and waits for it."""
    real = updates._compare_untouched
    second = threading.Thread(target=update_catalogue, args=(before, pa.table({"item_id": ["later"]})))
    refused: list[str] = []

    def meanwhile(*given: Any) -> float:
        if second.ident is None:
            second.start()
            while second.is_alive() and "waiting until it ends" not in caplog.text:
                time.sleep(0.01)
            rolling_back = threading.Thread(target=lambda: refused.append(refusal_of_a_rollback(before)))
            rolling_back.start()
            rolling_back.join()
        return real(*given)

    monkeypatch.setattr(updates, "_compare_untouched", meanwhile)
    update_catalogue(before, pa.table({"item_id": ["earlier"]}))
    second.join()
    ids = load_bundle(before).catalogue.items["item_id"].to_pylist()
    assert ids[-2:] == ["earlier", "later"]
    assert "earlier" in load_bundle(previous_of(before)).catalogue.items["item_id"].to_pylist()
    assert refused[0].startswith(f"{before} is being changed by process {os.getpid()}; expected: one change at a time")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "bundle.previous"]


def refusal_of_a_rollback(bundle: Path) -> str:
    previous_of(bundle).mkdir()
    try:
        rollback_catalogue(bundle)
    except BundleError as error:
        return str(error)
    finally:
        previous_of(bundle).rmdir()
    return ""


@pytest.fixture
def numbered(make_run: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a bundle whose item ids are integers."""
    export(make_run(integers=True), tmp_path / "numbered")
    return tmp_path / "numbered"


def test_text_ids_are_those_of_integers_only_if_they_are_written_so(
    numbered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = load_bundle(numbered).catalogue
    known = before.ids_of([5])[0]
    for wrong in (f"0{known}", f"+{known}", f" {known}", "neu", ""):
        with pytest.raises(
            DataError, match=rf"the item id {re.escape(repr(wrong))}, a text; expected: integers, as in"
        ):
            update_catalogue(numbered, pa.table({"item_id": [str(known), wrong], "retired": [True, True]}))
    for odd in (pa.array([True, False]), pa.array([1, 2], pa.timestamp("s"))):
        with pytest.raises(DataError, match=f"item ids of type {re.escape(str(odd.type))}"):
            update_catalogue(numbered, pa.table({"item_id": odd}))
    with caplog.at_level("INFO"):
        done = update_catalogue(numbered, pa.table({"item_id": [str(known), "-7"], "retired": [True, False]}))
    assert (done["changed"], done["added"], done["retired"]) == (1, 1, 1)
    assert "2 item ids are texts, and integers in the catalogue: they are read as integers" in caplog.text
    assert load_bundle(numbered).catalogue.items["item_id"].to_pylist()[-1] == -7
