"""Layout and configurations of a deployment folder, without a server."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r import commands
from missrec_t4r.commands import bundles
from missrec_t4r.errors import BundleError, ConfigError, ServingError, UnavailableError
from missrec_t4r.io import atomic
from missrec_t4r.io.lock import locked
from missrec_t4r.serving.client.protocol import Recommendation
from missrec_t4r.serving.deploy import blue_green
from missrec_t4r.serving.deploy.blue_green import deploy, rollback
from missrec_t4r.serving.deploy.smoke_test import differences
from missrec_t4r.serving.triton import model_control
from missrec_t4r.serving.triton.deployment import bundle_of, current_version, start_arguments, versions_of
from missrec_t4r.serving.triton.model_config import read_config
from missrec_t4r.serving.triton.model_control import SERVER_FILE, Control, SilentError
from tests.meanwhile import beginning_inside
from tests.serving.conftest import url_of

EARLIER = """# The door: raw item ids in, raw item ids and scores out.
name: "missrec"
platform: "ensemble"
max_batch_size: 64
ensemble_scheduling {
  step [
    { model_name: "missrec_sessions_v12" model_version: -1 input_map { key: "item_ids" value: "item_ids" } },
    { model_name: "missrec_ranker_v12" model_version: -1 input_map { key: "rows" value: "rows" } }
  ]
}
version_policy { specific { versions: [ 12 ] } }
"""
"""Entry model as `missrec deploy` wrote it before configurations were written with protobuf."""


def test_the_configuration_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    assert current_version(tmp_path) is None
    (tmp_path / "missrec").mkdir()
    (tmp_path / "missrec" / "config.pbtxt").write_text(EARLIER)
    assert current_version(tmp_path) == 12
    assert start_arguments(tmp_path)[-2:] == ["--load-model=missrec", "--load-model=missrec_v12"]


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "missrec").mkdir()
    (tmp_path / "missrec" / "config.pbtxt").write_text('name: "missrec\nmax_batch_size: x')
    with pytest.raises(BundleError, match=r"missrec/config\.pbtxt cannot be read"):
        current_version(tmp_path)


def test_a_version_names_its_own_models_and_bundle_and_is_added_once(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    assert deploy(folder, bundle=bundle)["version"] == 1
    assert deploy(folder, bundle=bundle)["version"] == 1  # the same bundle and settings: nothing is added
    assert deploy(folder, bundle=bundle, threads=2)["version"] == 2
    assert versions_of(folder) == [1, 2]
    ensemble, entry = read_config(folder / "missrec_v2"), read_config(folder / "missrec")
    steps = ["missrec_sessions_v2", "missrec_ranker_v2"]
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == steps
    assert [step.model_name for step in entry.ensemble_scheduling.step] == steps
    assert (ensemble.name, entry.name) == ("missrec_v2", "missrec")
    assert list(entry.version_policy.specific.versions) == [2]
    for model in steps:
        config = read_config(folder / model)
        assert config.name == model
        path = folder / model / config.parameters["bundle"].string_value
        assert path.resolve() == bundle_of(folder, 2).resolve()
        assert (path / "manifest.json").is_file()


@pytest.mark.parametrize("part", ["missrec_sessions", "missrec_ranker"])
def test_a_version_with_the_code_of_another_release_is_written_again(part: str, bundle: Path, tmp_path: Path) -> None:
    """docs/migration.md: `missrec deploy` the bundle again."""
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)
    code = folder / f"{part}_v1" / "1" / "model.py"
    written = code.read_text()
    code.write_text("from missrec_t4r.serving.backend import execute\n")
    assert deploy(folder, bundle=bundle)["version"] == 2
    assert (folder / f"{part}_v2" / "1" / "model.py").read_text() == written
    assert deploy(folder, bundle=bundle)["version"] == 2


def test_the_oldest_versions_go_and_the_one_to_roll_back_to_stays(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2, 3, 4):
        deploy(folder, bundle=bundle, threads=threads, keep=3)
    assert versions_of(folder) == [2, 3, 4]
    assert rollback(folder)["version"] == 3
    deploy(folder, bundle=bundle, threads=5, keep=2)
    assert versions_of(folder) == [3, 5]  # the one that served before, not the newest one
    assert rollback(folder)["version"] == current_version(folder) == 3


def test_a_rollback_does_not_return_to_a_version_that_was_left(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2):
        deploy(folder, bundle=bundle, threads=threads)
    assert rollback(folder)["version"] == 1  # 2 was bad
    deploy(folder, bundle=bundle, threads=3, switch=False)  # 3 is a candidate
    assert deploy(folder, version=3)["previous"] == 1
    assert rollback(folder)["version"] == 1
    deploy(folder, version=2)  # once more
    deploy(folder, bundle=bundle, threads=4, keep=4)
    assert [rollback(folder)["version"] for _ in range(2)] == [2, 1]
    with pytest.raises(ServingError, match="no version before 1"):
        rollback(folder)


def test_a_version_that_was_left_goes_before_those_to_roll_back_to(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2):
        deploy(folder, bundle=bundle, threads=threads)
    rollback(folder)  # 2 was bad
    for threads in (3, 4):
        deploy(folder, bundle=bundle, threads=threads, keep=3)
    assert versions_of(folder) == [1, 3, 4]
    assert [rollback(folder)["version"] for _ in range(2)] == [3, 1]


def test_a_rollback_passes_over_versions_that_were_left_where_the_one_before_is_gone(
    bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2):
        deploy(folder, bundle=bundle, threads=threads)
    rollback(folder)  # 2 was bad
    deploy(folder, bundle=bundle, threads=3)
    shutil.rmtree(folder / "missrec_v1")
    with pytest.raises(ServingError, match="no version before 3"):
        rollback(folder)


@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "replaced": {"3": 3, "2": 7}}'])
def test_a_folder_of_an_earlier_version_or_with_a_nonsensical_note_rolls_back_to_the_newest_below(
    content: str, bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2, 3):
        deploy(folder, bundle=bundle, threads=threads)
    (folder / "deployment.json").write_text(content)
    assert [rollback(folder)["version"] for _ in range(2)] == [2, 1]


@pytest.mark.parametrize("content", ["{", "[]", '{"replaced": {"2": null}}', '{"replaced": [1]}'])
def test_a_damaged_deployment_file_is_named_before_anything_changes(content: str, bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for threads in (1, 2):
        deploy(folder, bundle=bundle, threads=threads)
    (folder / "deployment.json").write_text(content)
    for change in (
        lambda: rollback(folder),
        lambda: deploy(folder, bundle=bundle, threads=3),
        lambda: deploy(folder, version=1),
        lambda: deploy(folder, version=1, dry_run=True),
    ):
        with pytest.raises(BundleError, match=r'deployment\.json cannot be read.*write \{"format": 1\} into it'):
            change()
    assert (versions_of(folder), current_version(folder)) == ([1, 2], 2)
    (folder / "deployment.json").write_text('{"format": 1}')  # the cure
    assert rollback(folder)["version"] == 1


def test_a_mistyped_path_makes_no_folder(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    with pytest.raises(ServingError, match="models has no version 3; expected: one of none"):
        deploy(folder, version=3)
    with pytest.raises(ServingError, match="models serves no version"):
        rollback(folder)
    with pytest.raises(BundleError, match=r"bundel holds no manifest\.json"):
        deploy(folder, bundle=bundle.with_name("bundel"))
    assert list(tmp_path.iterdir()) == []


def test_settings_of_a_version_that_is_there_are_refused(bundle: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "models", bundle=bundle)
    with pytest.raises(ConfigError, match="--threads, --queue-delay-us with --version; expected: --bundle"):
        deploy(tmp_path / "models", version=1, threads=2, queue_delay_us=0)


def test_one_deploy_at_a_time(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)
    words = r"models is being changed by process \d+; expected: one change at a time\. wait until it ends"
    with locked(folder), ThreadPoolExecutor() as others:
        for change in (lambda: deploy(folder, bundle=bundle, threads=2), lambda: rollback(folder, version=1)):
            with pytest.raises(ServingError, match=words):
                others.submit(change).result()
    assert versions_of(folder) == [1]


def test_two_updates_of_what_is_served_are_both_deployed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)

    def update(name: str) -> None:
        pq.write_table(pa.table({"item_id": [name]}), tmp_path / f"{name}.parquet")
        commands.catalogue_update(tmp_path / f"{name}.parquet", repository=folder)

    with beginning_inside("_served_bundle", bundles, lambda: update("later"), monkeypatch, caplog):
        update("earlier")
    served = pq.read_table(bundle_of(folder, current_version(folder)) / "items.parquet")
    assert served["item_id"].to_pylist()[-2:] == ["earlier", "later"]


def test_a_copy_that_somebody_keeps_of_a_model_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)
    for name in ("missrec_ranker_v1.bak", "missrec_ranker_v1_0", "missrec_ranker_v7"):
        shutil.copytree(folder / "missrec_ranker_v1", folder / name)
    assert deploy(folder, bundle=bundle, threads=2)["version"] == 2
    assert (folder / "missrec_ranker_v1.bak").is_dir()
    assert (folder / "missrec_ranker_v1_0").is_dir()
    assert not (folder / "missrec_ranker_v7").exists()  # what a killed deploy leaves looks like this


def test_a_server_that_does_not_answer_is_not_taken_for_none(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_control, "_SECONDS", 0.5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "triton.log").write_text("loading: missrec_ranker_v1\n")
    deploy(tmp_path / "models", bundle=bundle)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url, log = f"127.0.0.1:{silent.getsockname()[1]}", str(tmp_path / "triton.log")
        Control(url, "0" * 32, os.getpid(), log).write(tmp_path / "models")
        with pytest.raises(ServingError, match="does not answer: listing the models took too long") as refused:
            deploy(tmp_path / "models", bundle=bundle, threads=2)
        (evidence,) = tmp_path.glob("missrec-triton-*.txt")
        assert str(evidence) in str(refused.value)
        kept = evidence.read_text()
        assert "loading: missrec_ranker_v1" in kept
        assert f"process {os.getpid()}: the server" in kept
        assert f"  {threading.get_native_id()} " in kept
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
        with pytest.raises(ServingError, match="does not answer: .* look into its log, or restart it"):
            deploy(tmp_path / "models", bundle=bundle, threads=2)
    assert current_version(tmp_path / "models") == 1


@pytest.mark.parametrize("silent", ["missrec_v2", "missrec"])
def test_a_load_without_an_answer_is_not_followed_by_another_wait(
    silent: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "models", []
    deploy(folder, bundle=bundle)

    def load(control: Control, model: str) -> None:
        asked.append(model)
        if model == silent:
            raise SilentError("loading took too long")

    monkeypatch.setattr(Control, "find", lambda folder: Control("127.0.0.1:1", "0" * 32, os.getpid()))
    monkeypatch.setattr(Control, "ready", lambda control: {"missrec_v1": "1"})
    monkeypatch.setattr(Control, "load", load)
    monkeypatch.setattr(Control, "unload", load)
    monkeypatch.setattr(blue_green, "smoke_test", lambda *_: {})
    with pytest.raises(SilentError, match="loading took too long"):
        deploy(folder, bundle=bundle, threads=2)
    assert asked == ["missrec_v2", "missrec"][: 1 + (silent == "missrec")]
    assert current_version(folder) == 1


def answer(*items: tuple[str, float]) -> list[Recommendation]:
    return [Recommendation([item for item, _ in items], [score for _, score in items], 0, False)]


@pytest.mark.parametrize(
    ("served", "wrong"),
    [
        (answer(("a", 0.9), ("b", 0.5), ("c", 0.5)), 0),
        (answer(("a", 0.9), ("c", 0.5), ("b", 0.5)), 0),  # a tie
        (answer(("a", 0.9), ("b", 0.5), ("d", 0.5)), 0),  # a tie where the list is cut
        (answer(("b", 0.9), ("a", 0.5), ("c", 0.5)), 1),
        (answer(("d", 0.9), ("b", 0.5), ("c", 0.5)), 1),
        (answer(("a", 0.9), ("b", 0.5)), 1),
    ],
)
def test_another_item_is_right_only_where_scores_are_tied(served: list[Recommendation], wrong: int) -> None:
    expected = answer(("a", 0.9), ("b", 0.5), ("c", 0.5))
    assert differences(served, expected) == (wrong, 0.0)


def test_the_largest_difference_of_a_score_is_that_of_any_rank() -> None:
    assert differences(answer(("a", 0.9), ("b", 0.5)), answer(("a", 0.9), ("b", 0.25))) == (0, 0.25)


def test_a_server_that_is_gone_has_no_control(tmp_path: Path, refusing: socket.socket) -> None:
    control = Control(url_of(refusing), "0" * 32, os.getpid())
    control.write(tmp_path)
    assert (tmp_path / SERVER_FILE).stat().st_mode & 0o777 == 0o600
    assert Control.find(tmp_path) is None
    with pytest.raises(UnavailableError, match="no answer from"):
        control.load("missrec")
    Control.remove(tmp_path, os.getpid() + 1)
    assert (tmp_path / SERVER_FILE).is_file()
    Control.remove(tmp_path, os.getpid())
    assert list(tmp_path.iterdir()) == []


def test_what_deploys_left_that_were_killed_elsewhere_is_removed(bundle: Path, tmp_path: Path) -> None:
    """By an earlier version, in another container, and in one where the process had the number that this one has."""
    for name in ("0a1b2c3d", "anotherhost-1-0a1b2c3d", f"{atomic._HOST}-{os.getpid()}-0a1b2c3d"):
        (tmp_path / f".models-deploy-{name}").mkdir()
    deploy(tmp_path / "models", bundle=bundle)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".models-")] == []
