"""Blue/green deployment under load: no failed request, no mixed response, and a complete version after kill -9."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tritonclient import grpc as grpcclient

from missrec_t4r.bundle.manifest import verify_bundle
from missrec_t4r.errors import BundleError, ConfigError, ParityError, ServingError
from missrec_t4r.export.export import export
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.deploy import blue_green
from missrec_t4r.serving.deploy.blue_green import deploy, rollback
from missrec_t4r.serving.shadow.grpc_proxy import GrpcShadowProxy
from missrec_t4r.serving.shadow.http_proxy import HttpShadowProxy
from missrec_t4r.serving.shadow.http_proxy import shadow as shadow_command
from missrec_t4r.serving.triton import model_control, stubs
from missrec_t4r.serving.triton.deployment import bundle_of, current_version, versions_of
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.model_config import read_config
from missrec_t4r.serving.triton.model_control import SERVER_FILE, Control
from tests import processes
from tests.serving.conftest import serving

SESSION = ["ware-3-ü", "ware-9-ü"]
DEPLOY = "import sys; from missrec_t4r.serving.deploy.blue_green import deploy; deploy(sys.argv[1], bundle=sys.argv[2])"


@pytest.fixture(scope="module")
def other_bundle(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose recommendations differ from the first one's."""
    folder = tmp_path_factory.mktemp("other") / "bundle"
    export(make_run(n_encoder_layers=2), folder)
    return folder


@pytest.fixture(scope="module")
def answers(bundle: Path, other_bundle: Path) -> tuple[list[float], list[float]]:
    """Scores of the two models for SESSION."""
    scores = []
    for one in (bundle, other_bundle):
        with MISSRecClient.of_bundle(one) as client:
            scores.append([round(score, 4) for score in client.recommend([SESSION], 5)[0].scores])
    assert scores[0] != scores[1]
    return scores[0], scores[1]


def asked(server: LocalTriton, model: str = "missrec") -> list[float]:
    with MISSRecClient(server.grpc_url, model=model) as client:
        return [round(score, 4) for score in client.recommend([SESSION], 5)[0].scores]


@pytest.fixture(scope="module")
def live(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "models"
    assert deploy(folder, bundle=bundle)["live"] is False
    return folder


@pytest.fixture(scope="module")
def running(live: Path) -> Iterator[LocalTriton]:
    yield from serving(live)


@pytest.mark.triton
def test_models_change_under_load_without_a_failed_or_mixed_answer(
    running: LocalTriton, live: Path, other_bundle: Path, bundle: Path, answers: tuple[list[float], list[float]]
) -> None:
    seen: list[tuple[float, ...]] = []
    failures: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        with MISSRecClient(running.grpc_url) as client:
            while not stop.is_set():
                try:
                    time.sleep(0.01)  # a visit, not an attack: the machine also has a model to load
                    answer = client.recommend([SESSION] * 3, 5)
                    seen.extend(tuple(round(score, 4) for score in one.scores) for one in answer)
                except Exception as error:  # every one counts
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    first, second = answers
    try:
        assert asked(running) == first
        result = deploy(live, bundle=other_bundle)
        assert (result["version"], result["previous"], result["live"]) == (2, 1, True)
        assert result["warmup_sessions"] > 30
        assert asked(running) == second
        assert asked(running, "missrec_v1") == first  # still loaded, to go back to
        back = rollback(live)
        assert (back["version"], back["previous"]) == (1, 2)
        assert asked(running) == first
        assert deploy(live, version=2)["version"] == 2
        assert asked(running) == second
        deploy(live, bundle=bundle)
        assert asked(running) == first
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(seen) == {tuple(first), tuple(second)}
    assert versions_of(live) == [1, 2, 3]
    assert set(running.control.ready()) >= {"missrec", "missrec_v3", "missrec_v2"}
    assert "missrec_ranker_v1" not in running.control.ready()  # two versions stay loaded, no more
    text = running.log_file.read_text(errors="replace")
    loads = [
        text.count(f'loading: {model}_v{version}:1"')
        for model in ("missrec_sessions", "missrec_ranker")
        for version in (1, 2, 3)
    ]
    # neither the switch nor the way back starts a model again that is loaded; a busy machine may repeat a load
    assert loads == [1] * 6 or stubs.UNHEALTHY in text


@pytest.mark.triton
def test_a_version_can_be_loaded_and_asked_before_it_answers(
    running: LocalTriton, live: Path, other_bundle: Path, answers: tuple[list[float], list[float]]
) -> None:
    before = asked(running)
    result = deploy(live, bundle=other_bundle, switch=False)
    assert result["switched"] is False
    candidate = f"missrec_v{result['version']}"
    with (
        HttpShadowProxy(running.http_url, candidate, share=0.5, seed=3) as shadow,
        MISSRecClient(shadow.url, "http") as client,
    ):
        mirrored = [client.recommend([SESSION, [], ["ware-1-ü"]], 6) for _ in range(20)]
        with MISSRecClient(running.grpc_url) as direct:
            expected = direct.recommend([SESSION, [], ["ware-1-ü"]], 6)
        assert [one.item_ids for one in mirrored[0]] == [one.item_ids for one in expected]
    report = shadow.comparison.report()
    assert 0 < report["mirrored_sessions"] < 60
    assert report["failed"] == report["dropped"] == 0
    assert 0 < report["overlap_at_k"] < 1  # the fallback is the same, the models are not
    assert report["mean_abs_score_difference"] > 0
    assert report["candidate_ms"]["p50"] > 0
    with HttpShadowProxy(running.http_url, "gone", share=1) as shadow, MISSRecClient(shadow.url, "http") as client:
        assert client.recommend([SESSION], 6)[0].item_ids == mirrored[0][0].item_ids
    assert shadow.comparison.report()["failed"] == 1
    for url, protocol in ((running.http_url, "http"), (running.grpc_url, "grpc")):
        with pytest.raises(ServingError, match="model 'missrec_v99' is not ready.*missrec deploy --no-switch"):
            shadow_command("missrec_v99", url=url, protocol=protocol, port=0, seconds=0.01)
    with GrpcShadowProxy(running.grpc_url, candidate, share=1) as shadow, MISSRecClient(shadow.url) as client:
        through = [client.recommend([SESSION, [], ["ware-1-ü"]], 6) for _ in range(5)]
        assert grpcclient.InferenceServerClient(shadow.url).is_model_ready("missrec")  # a client without a deadline
        with MISSRecClient(shadow.url, model="gone") as other, pytest.raises(ServingError, match="gone"):
            other.recommend([SESSION], 6)
    assert [[one.item_ids for one in answer] for answer in through] == [[one.item_ids for one in expected]] * 5
    over_grpc = shadow.comparison.report()
    assert (over_grpc["mirrored_sessions"], over_grpc["failed"]) == (15, 0)
    assert over_grpc["overlap_at_k"] == pytest.approx(report["overlap_at_k"])
    assert over_grpc["mean_abs_score_difference"] == pytest.approx(report["mean_abs_score_difference"], abs=1e-5)
    assert asked(running) == before
    assert asked(running, f"missrec_v{result['version']}") == answers[1]
    assert current_version(live) != result["version"]
    deploy(live, version=result["version"], keep=2)
    assert asked(running) == answers[1]
    assert len(versions_of(live)) == 2


@pytest.mark.triton
def test_a_version_that_cannot_be_loaded_changes_nothing(
    running: LocalTriton, live: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, version = asked(running), current_version(live)
    with monkeypatch.context() as alone:
        alone.setattr(Control, "find", lambda folder: None)  # files only: the server loads nothing yet
        staged = deploy(live, bundle=bundle, switch=False)["version"]
    (live / f"missrec_ranker_v{staged}" / "1" / "model.py").write_text("raise RuntimeError('broken on purpose')\n")
    with pytest.raises(ServingError, match="broken on purpose"):
        deploy(live, version=staged)
    assert asked(running) == before
    assert current_version(live) == version
    assert "missrec" in running.control.ready()
    shutil.rmtree(live / f"missrec_v{staged}")


BUSY = """
import os, pathlib, signal
_initialize = TritonPythonModel.initialize
def initialize(self, args):
    with pathlib.Path({marker!r}).open("a") as file:
        print(os.getpid(), file=file)
    if len(pathlib.Path({marker!r}).read_text().split()) == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    _initialize(self, args)
TritonPythonModel.initialize = initialize
"""


@pytest.mark.triton
def test_a_load_that_triton_gave_up_on_a_busy_machine_is_repeated(
    running: LocalTriton,
    live: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its process gets no time on the processor: the load never returned, or the server crashed."""
    before, version = asked(running), current_version(live)
    with monkeypatch.context() as alone:
        alone.setattr(Control, "find", lambda folder: None)  # files only: the server loads nothing yet
        staged = deploy(live, bundle=bundle, switch=False)["version"]
    marker = tmp_path / "processes"
    with (live / f"missrec_ranker_v{staged}" / "1" / "model.py").open("a") as file:
        file.write(BUSY.format(marker=str(marker)))
    monkeypatch.setattr(stubs, "_IDLE_SECONDS", 2.0)
    monkeypatch.setattr(model_control, "_LOAD_SECONDS", 120.0)

    def go_on() -> None:
        while not (marker.exists() and marker.read_text().endswith("\n")):
            time.sleep(0.05)
        process, until = int(marker.read_text().split()[0]), time.monotonic() + 60
        while Path(f"/proc/{process}").exists():  # it is to be ended before it goes on
            time.sleep(0.05)
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGCONT)
                return

    other = threading.Thread(target=go_on)
    other.start()
    deploy(live, version=staged, switch=False)
    other.join()
    first, *later = map(int, marker.read_text().split())  # a busy machine may repeat the second load as well
    assert set(stubs.stubs_of(running.pid)) & {first, *later} == {later[-1]}
    assert f"Triton waits in vain for the end of missrec_ranker_v{staged}_0_0 (process {first})" in caplog.text
    assert f"loading missrec_v{staged} again" in caplog.text
    assert asked(running, f"missrec_v{staged}")
    assert asked(running) == before
    assert current_version(live) == version


@pytest.mark.triton
def test_a_version_that_answers_wrongly_is_refused(
    running: LocalTriton, live: Path, bundle: Path, other_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its models load and answer, but with another bundle than the version's own."""
    before, version = asked(running), current_version(live)
    with monkeypatch.context() as alone:
        alone.setattr(Control, "find", lambda folder: None)  # files only: the server loads nothing yet
        staged = deploy(live, bundle=other_bundle, switch=False)["version"]
    ranker = live / f"missrec_ranker_v{staged}"
    shutil.copytree(bundle, ranker / "1" / "wrong")
    config = ranker / "config.pbtxt"
    config.write_text(config.read_text().replace('"1/bundle"', '"1/wrong"'))
    with pytest.raises(ParityError, match=f"missrec_v{staged} recommends other items than its bundle"):
        deploy(live, version=staged)
    assert asked(running) == before
    assert current_version(live) == version
    assert f"missrec_v{staged}" not in running.control.ready()  # a refused version holds no memory
    shutil.rmtree(live / f"missrec_v{staged}")


@pytest.mark.triton
def test_the_version_that_serves_stays_loaded_when_its_repeated_smoke_test_fails(
    running: LocalTriton, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy server may answer too late; that must not end the traffic."""
    before, version = asked(running), current_version(live)

    def too_slow(*arguments: object) -> None:
        raise ServingError("no answer in time")

    monkeypatch.setattr(blue_green, "smoke_test", too_slow)
    with pytest.raises(ServingError, match="no answer in time"):
        deploy(live, version=version)
    assert asked(running) == before


@pytest.mark.triton
def test_the_key_of_a_served_folder_is_the_owners(running: LocalTriton, live: Path) -> None:
    assert (live / SERVER_FILE).stat().st_mode & 0o777 == 0o600
    found = Control.find(live)
    assert found == running.control


@pytest.mark.triton
def test_killed_deploys_leave_a_complete_version_that_a_restarted_server_serves(
    bundle: Path, other_bundle: Path, tmp_path: Path, answers: tuple[list[float], list[float]]
) -> None:
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)
    known = {tuple(one) for one in answers}
    for server in serving(folder):
        for killed in ("deploy", "server"):
            job = processes.start(["-c", DEPLOY, folder, other_bundle])
            time.sleep(0.5 + 2 * random.random())
            if killed == "deploy":
                job.send_signal(signal.SIGKILL)
                job.wait()
                assert tuple(asked(server)) in known
            else:
                os.killpg(server.pid, signal.SIGKILL)
                job.communicate()
            version = current_version(folder)
            assert version is not None
            verify_bundle(bundle_of(folder, version))
    assert Control.find(folder) is None
    for server in serving(folder):
        assert tuple(asked(server)) in known
        assert Control.find(folder) == server.control
    deploy(folder, bundle=other_bundle)
    assert not list(folder.parent.glob(f".{folder.name}-*"))
    assert not (folder / SERVER_FILE).exists()


def killed_at(moment: int, folder: Path, chosen: Path) -> None:
    """Deploy, and be killed (-9) in place of rename number ``moment``."""
    done = [0]

    def dying(original: Callable[..., None]) -> Callable[..., None]:
        def rename(*paths: object, **more: object) -> None:
            done[0] += 1
            if done[0] > moment:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*paths, **more)

        return rename

    os.rename, os.replace = dying(os.rename), dying(os.replace)
    deploy(folder, bundle=chosen)
    os._exit(0)


def test_kill_at_every_moment_of_writing_leaves_the_old_or_the_new_version(
    bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    """Without a server a deploy is files alone: killed at every one of its renames, in one process, by a fork."""
    folder = tmp_path / "models"
    deploy(folder, bundle=bundle)
    for moment in range(12):
        child = os.fork()
        if child == 0:
            try:
                killed_at(moment, folder, other_bundle)
            finally:  # after an error: it is no second process of the tests
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, -signal.SIGKILL)
        version = current_version(folder)
        assert version in versions_of(folder)
        verify_bundle(bundle_of(folder, version))
        config = (folder / "missrec" / "config.pbtxt").read_text()
        assert (folder / "missrec" / str(version)).is_dir()
        assert all(
            (folder / f"missrec_{part}_v{version}" / "1" / "model.py").is_file() for part in ("sessions", "ranker")
        )
        assert config.count(f"_v{version}") == 2
    assert current_version(folder) > 1
    deploy(folder, bundle=bundle)
    assert not list(folder.parent.glob(f".{folder.name}-*"))


def test_what_is_no_deployment_is_left_alone(exported: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a deployment folder"):
        deploy(exported / "repository", bundle=bundle)
    with pytest.raises(ConfigError, match="neither --bundle nor --version"):
        deploy(tmp_path / "models")
    with pytest.raises(ConfigError, match="--keep 1"):
        deploy(tmp_path / "models", bundle=bundle, keep=1)
    deploy(tmp_path / "models", bundle=bundle)
    with pytest.raises(ServingError, match="has no version before 1"):
        rollback(tmp_path / "models")
    with pytest.raises(ServingError, match="has no version 9; expected: one of 1"):
        deploy(tmp_path / "models", version=9)
    damaged = Path(shutil.copytree(bundle, tmp_path / "damaged"))
    (damaged / "weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(BundleError, match=r"weights\.safetensors has 10 bytes"):
        deploy(tmp_path / "models", bundle=damaged)
    assert versions_of(tmp_path / "models") == [1]


def test_a_deploy_keeps_the_sizes_of_the_version_that_answers(bundle: Path, other_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sized"
    deploy(folder, bundle=bundle, instances=2, threads=3, max_batch_size=32)
    deploy(folder, bundle=other_bundle)
    deploy(folder, bundle=bundle, instances=1)
    configs = [read_config(folder / f"missrec_ranker_v{version}") for version in (1, 2, 3)]
    assert [config.instance_group[0].count for config in configs] == [2, 2, 1]
    assert {config.parameters["threads"].string_value for config in configs} == {"3"}
    assert {config.max_batch_size for config in configs} == {32}
