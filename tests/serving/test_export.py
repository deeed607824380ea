from __future__ import annotations

import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r.bundle.bundle import LoadedBundle, load_bundle
from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import BundleError, ConfigError, DataError, ParityError
from missrec_t4r.export import export as export_module
from missrec_t4r.export.export import export
from missrec_t4r.export.parity import RankedItems, check_rows, compare_ranked, raw_ids, sample_histories
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun, load_run
from missrec_t4r.schema import ITEM_LIST, USER_ID
from missrec_t4r.serving.triton.backend import RankerBackend, SessionsBackend, bundle_folder, device_of, parameter
from missrec_t4r.serving.triton.model_config import configure, read_config, settings_of
from missrec_t4r.serving.triton.repository import (
    BUNDLE_IN_REPOSITORY,
    MODELS,
    RANKER,
    ServingSettings,
    fill_repository,
    write_repository,
)
from tests.serving import shop

TEMPLATES = Path(__file__).parents[2] / "triton_models"


def test_a_run_becomes_a_bundle_and_a_repository(run: Path, tmp_path: Path) -> None:
    result = export(run, tmp_path / "bundle", triton=tmp_path / "repository", sessions=210)
    assert result["parity"]["sessions"] == 210
    assert result["parity"]["equal"]
    assert result["parity"]["max_abs_diff"] <= 1e-5
    assert result["items"] == shop.N_ITEMS
    assert verify_bundle(tmp_path / "bundle") == verify_bundle(tmp_path / "repository" / BUNDLE_IN_REPOSITORY)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bundle", "repository"]


def test_without_a_repository_only_the_bundle_appears(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "bundle")["repository"] is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "settings",
    [{"item_ids": False}, {"candidate_ids": "own"}, {"attention": "bidirectional"}, {"candidate_fusion": "static"}],
)
def test_other_models_export_too(make_run: Callable[..., Path], tmp_path: Path, settings: dict[str, object]) -> None:
    assert export(make_run(**settings), tmp_path / "bundle", sessions=40)["parity"]["equal"]


@pytest.mark.parametrize(
    "part", ["item_encoder.adapters.text.weight", "terms.history_bias.bias", "interests.centroids"]
)
def test_an_export_that_answers_differently_is_refused_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def altered(folder: Path) -> LoadedBundle:
        loaded = load_bundle(folder)
        with torch.no_grad():
            loaded.model.state_dict()[part].add_(0.5 if "bias" in part else 0.01)
        return loaded

    monkeypatch.setattr(export_module, "load_bundle", altered)
    with pytest.raises(ParityError, match="recommended items differ from the run's"):
        export(run, tmp_path / "bundle", triton=tmp_path / "repository")
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_fit_the_catalogue_are_refused(loaded: LoadedRun, bundle: Path) -> None:
    histories = sample_histories(Sessions.load(loaded.data / "test"), 20)
    requests = raw_ids(loaded.catalogue, histories)
    check_rows(load_bundle(bundle).transform, histories, requests)
    moved = Sessions(histories.values[::-1].copy(), histories.offsets)
    with pytest.raises(ParityError, match="test session 0 becomes rows"):
        check_rows(load_bundle(bundle).transform, moved, requests)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda rows, scores: (rows, scores), 0),
        (lambda rows, scores: (rows, scores + 5e-6), 0),
        (lambda rows, scores: (rows, scores + 2e-5), 0),
        (lambda rows, scores: (rows[::-1], scores), 6),
        (lambda rows, scores: (rows[[0, 0, 2, 3, 4, 5]], scores), 2),
        (lambda rows, scores: (rows[:-1], scores[:-1]), 1),
        (lambda rows, scores: (rows, scores * np.nan), 0),
    ],
)
def test_answers_that_differ_are_counted(loaded: LoadedRun, change: Callable[..., RankedItems], wrong: int) -> None:
    histories = Sessions.from_lists([[5, 9, 4]])
    ranking = Ranker(loaded.model, loaded.catalogue).rank(np.array([[5, 9, 4]]), top_k=6)
    rows, scores = change(ranking.rows[0], ranking.scores[0])
    parity = compare_ranked(loaded.model, histories, [(rows, scores)], 6)
    assert parity.wrong_items == wrong
    assert parity.equal == (wrong == 0 and np.abs(scores - ranking.scores[0]).max() < 1e-5)


def test_tied_items_may_change_places() -> None:
    catalogue = shop.catalogue()
    for modality in catalogue.modalities.values():
        modality.vectors[10], modality.present[10] = modality.vectors[11], modality.present[11]
    model = shop.model_for(catalogue, item_ids=False)
    ranking = Ranker(model, catalogue).rank(np.array([[5, 9, 4]]), top_k=shop.N_ITEMS)
    rows = ranking.rows[0]
    first = int(np.flatnonzero(rows == 10)[0])
    assert rows[first + 1] == 11
    assert ranking.scores[0, first] == ranking.scores[0, first + 1]
    swapped = rows.copy()
    swapped[first : first + 2] = [11, 10]
    parity = compare_ranked(model, Sessions.from_lists([[5, 9, 4]]), [(swapped, ranking.scores[0])], shop.N_ITEMS)
    assert parity.equal


def test_unknown_and_missing_rows_of_test_sessions_travel_as_such(loaded: LoadedRun) -> None:
    ids = raw_ids(loaded.catalogue, Sessions.from_lists([[3, 2, 1]]))[0]
    assert loaded.catalogue.rows_of(ids).tolist() == [3, 2, 1]


def test_histories_are_spread_over_the_file_without_their_targets() -> None:
    sessions = Sessions.from_lists([[row, row, 3] for row in range(3, 33)])
    chosen = sample_histories(sessions, 4)
    assert [session.tolist() for session in chosen] == [[3, 3], [12, 12], [22, 22], [32, 32]]
    assert len(sample_histories(sessions, 1000)) == 30


def test_overlapping_targets_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one is inside the other"):
        export(run, tmp_path / "bundle", triton=tmp_path / "bundle" / "repository")
    assert not list(tmp_path.iterdir())


def test_a_foreign_target_stops_the_export_and_stays(run: Path, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a model repository: it holds no"):
        export(run, tmp_path / "bundle", triton=tmp_path / "repository")
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["repository", "repository/notes.txt"]


def test_retired_items_of_the_data_folder_are_not_recommended(run: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    data = Path(shutil.copytree(loaded.data, tmp_path / "data"))
    items = loaded.catalogue.items
    retired = items.append_column("retired", pa.array([index < 3 for index in range(len(items))]))
    Catalogue(retired, loaded.catalogue.modalities).write_items(data / "catalogue")
    assert {3, 4, 5} <= set(load_run(run, data).model.excluded.tolist())  # evaluated as they are served
    assert export(run, tmp_path / "bundle", data=data)["parity"]["equal"]


def test_a_run_without_test_sessions_is_refused(run: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    data = Path(shutil.copytree(loaded.data, tmp_path / "data"))
    shutil.rmtree(data / "test")
    with pytest.raises(DataError, match="no parquet file"):
        export(run, tmp_path / "bundle", data=data)
    (data / "test").mkdir()
    pq.write_table(pa.table({USER_ID: ["a"], ITEM_LIST: [[3, 4]]}), data / "test" / "part_0.parquet")
    assert export(run, tmp_path / "bundle", data=data)["parity"]["sessions"] == 1


@pytest.mark.parametrize(("integers", "id_type"), [(False, "TYPE_STRING"), (True, "TYPE_INT64")])
def test_the_repository_is_typed_by_the_catalogue(
    make_run: Callable[..., Path], tmp_path: Path, integers: bool, id_type: str
) -> None:
    export(make_run(integers=integers), tmp_path / "bundle")
    files = write_repository(tmp_path / "bundle", tmp_path / "repository", max_batch_size=16, threads=2, instances=3)
    assert "missrec_sessions/1/model.py" in files
    assert (tmp_path / "repository" / "missrec" / "1").is_dir()  # Triton wants a version, even of an ensemble
    for model in MODELS:
        text = (tmp_path / "repository" / model / "config.pbtxt").read_text()
        template = (TEMPLATES / model / "config.pbtxt").read_text()
        given = {"item_id_type": id_type, "max_batch_size": "16", "threads": "2", "instances": "3"}
        for name, value in {**given, "kind": "KIND_AUTO", "preferred_batch_size": "", "queue_delay_us": "0"}.items():
            template = template.replace(f"${{{name}}}", value)
        assert text == template
        assert "$" not in text
        assert str(tmp_path) not in text


def test_a_damaged_bundle_makes_no_repository(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    (copy / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"weights\.safetensors"):
        write_repository(copy, tmp_path / "repository")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize("wrong", [{"max_batch_size": 0}, {"threads": 0}, {"queue_delay_us": -1}])
def test_sizes_below_one_are_refused(bundle: Path, tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        fill_repository(tmp_path, bundle, ServingSettings(**wrong))


def test_models_find_the_bundle_wherever_the_repository_lies(exported: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(exported / "repository", tmp_path / "else where"))
    for model in ("missrec_sessions", "missrec_ranker"):
        text = (moved / model / "config.pbtxt").read_text()
        path = re.search(r'key: "bundle"\s+value: \{ string_value: "([^"]+)" \}', text)
        assert path
        args = {
            "model_repository": str(moved / model),
            "model_config": f'{{"parameters": {{"bundle": {{"string_value": "{path[1]}"}}}}}}',
        }
        verify_bundle(bundle_folder(args))


def test_settings_are_written_read_and_changed_without_a_change_of_anything_else(bundle: Path, tmp_path: Path) -> None:
    plain, folder = ServingSettings(), tmp_path / "models"
    tuned = ServingSettings(128, 2, 3, 16, 500, "KIND_CPU")
    for settings in (plain, tuned):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        fill_repository(folder, bundle, settings)
        assert settings_of(folder / RANKER) == settings
    configs = {model: read_config(folder / model) for model in MODELS}
    configure(folder, plain)
    assert settings_of(folder / RANKER) == plain
    assert {read_config(folder / model).max_batch_size for model in MODELS} == {plain.max_batch_size}
    configure(folder, tuned)
    assert {model: read_config(folder / model) for model in MODELS} == configs
    with pytest.raises(ConfigError, match="a preferred batch that is not larger"):
        configure(folder, plain._replace(preferred_batch_size=65))


def test_an_export_keeps_the_settings_of_the_repository_that_it_replaces(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(run, tmp_path / "bundle", triton=tmp_path / "models", sessions=8)
    tuned = ServingSettings(instances=2, queue_delay_us=200, kind="KIND_CPU")
    configure(tmp_path / "models", tuned)
    with caplog.at_level("INFO"):
        export(run, tmp_path / "bundle", triton=tmp_path / "models", sessions=8)
    assert settings_of(tmp_path / "models" / RANKER) == tuned
    assert "keeps the settings of the old one: instances 2, queue_delay_us 200, kind KIND_CPU" in caplog.text
    (tmp_path / "models" / RANKER / "config.pbtxt").write_text("something else")
    export(run, tmp_path / "bundle", triton=tmp_path / "models", sessions=8)
    assert settings_of(tmp_path / "models" / RANKER) == ServingSettings()
    assert "the new repository has the default settings" in caplog.text


def test_the_two_models_in_a_row_answer_as_the_ranker(bundle: Path, loaded: LoadedRun) -> None:
    raw = shop.raw_sessions(loaded.catalogue, 12, seed=4)
    back = load_bundle(bundle)
    requests = [
        {"item_ids": back.transform.to_wire(session or [None])[None], "length": np.array([[len(session)]], np.int32)}
        for session in raw
    ]
    asked = [dict(answer) | {"top_k": np.array([[3]], np.int32)} for answer in SessionsBackend(bundle).infer(requests)]
    answers = RankerBackend(bundle).infer(asked)
    expected = Ranker(back.model, back.catalogue).rank(shop.padded(back.transform(*raw)), top_k=3)
    for index, answer in enumerate(answers):
        assert not isinstance(answer, Exception)
        assert answer["item_id"][0].tolist() == back.transform.wire_ids_of(expected.rows[index]).tolist()
        np.testing.assert_allclose(answer["score"][0], expected.scores[index], atol=1e-6)
        assert answer["fallback"].tolist() == [[bool(expected.fallback[index])]]


def test_a_batch_that_does_not_fit_gives_its_memory_back_before_its_requests_are_tried_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scores:
        """What a pass keeps in its frames."""

    backend = RankerBackend(bundle)
    real, kept = backend.ranker.rank, list[weakref.ref[Scores]]()

    def rank(rows: np.ndarray, **asked: Any) -> Any:  # type: ignore[type-arg]
        assert [one() for one in kept] == [None] * len(kept)
        scores = Scores()
        kept.append(weakref.ref(scores))
        if len(rows) > 1 or rows[0, 0] == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(rows, **asked)

    monkeypatch.setattr(backend.ranker, "rank", rank)
    requests = [{"rows": np.array([[row]]), "seen": np.array([[row]])} for row in (3, 5, 4)]
    first, failed, last = backend.infer(requests)
    assert len(kept) == 4
    assert "CUDA out of memory" in str(failed)
    assert not isinstance(first, Exception)
    assert not isinstance(last, Exception)


def test_one_wrong_request_does_not_fail_its_neighbours(bundle: Path) -> None:
    good = {"rows": np.array([[3, 4]]), "seen": np.array([[3, 4]])}
    ranked = RankerBackend(bundle).infer(
        [
            good,
            good | {"top_k": np.array([[0]])},
            good | {"rows": np.array([[10**6]])},
            good | {"seen": np.array([[-1]])},
            good,
        ]
    )
    assert "top_k is 0" in str(ranked[1])
    assert "rows holds values from 1000000" in str(ranked[2])
    assert "seen holds values from -1" in str(ranked[3])
    assert ranked[0]["item_id"].tolist() == ranked[4]["item_id"].tolist()  # type: ignore[index]  answers, not errors
    lengths = [np.array([[1]]), np.array([[9]]), np.array([[2]])]
    wire = np.array([[b"ware-1-\xc3\xbc", b"x"]], object)
    mapped = SessionsBackend(bundle).infer([{"item_ids": wire, "length": length} for length in lengths])
    assert [isinstance(answer, DataError) for answer in mapped] == [False, True, False]


def test_every_field_of_the_templates_is_documented() -> None:
    text = (TEMPLATES / "README.md").read_text()
    names = {
        name
        for model in MODELS
        for name in re.findall(r'(?:name|key): "(\w+)"|\$\{(\w+)\}', (TEMPLATES / model / "config.pbtxt").read_text())
        for name in name
        if name
    }
    assert {"item_ids", "exclude_seen", "max_batch_size"} <= names
    assert not [name for name in sorted(names) if f"`{name}`" not in text]


@pytest.mark.parametrize(
    ("kind", "torch_has_gpu", "device"), [("CPU", True, "cpu"), ("GPU", True, "cuda:1"), ("GPU", False, "cpu")]
)
def test_the_ranker_runs_where_triton_and_torch_agree(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, torch_has_gpu: bool, device: str
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: torch_has_gpu)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert device_of({"model_instance_kind": kind, "model_instance_device_id": "1"}) == device
    assert chosen == ([1] if device == "cuda:1" else [])  # else pinned memory would take some of the first GPU
    assert ("serves on the CPU; install torch for CUDA" in caplog.text) == (kind == "GPU" and device == "cpu")


def test_a_missing_parameter_is_named() -> None:
    with pytest.raises(BundleError, match="lacks the parameter 'threads'"):
        parameter({"model_config": '{"parameters": {}}'}, "threads")
