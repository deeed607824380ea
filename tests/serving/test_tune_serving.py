"""`missrec tune serving`: what it measures on a real Triton, what it chooses, and where it writes that."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from missrec_t4r.errors import ConfigError, ServingError
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.load import answers_per_second
from missrec_t4r.serving.triton.model_config import settings_of
from missrec_t4r.serving.triton.repository import RANKER, ServingSettings, write_repository
from missrec_t4r.tuning import serving
from missrec_t4r.tuning.serving import Measured, choose, tune_serving
from tests.serving.conftest import url_of

QUICK = {"minutes": 10.0, "seconds": 0.05, "clients": 2}


def _measured(p50_1: float, rate: float, **settings: int) -> Measured:
    return Measured(ServingSettings(**settings), p50_1, 9.0, 9.0, 9.0, rate)


def test_the_highest_throughput_within_the_limit_is_chosen() -> None:
    present, two, slow = _measured(2.0, 500, instances=1), _measured(2.2, 900, instances=2), _measured(3.0, 2000)
    assert choose([present, two, slow])[0] is two
    assert choose([present, two, slow], limit_ms=3.5)[0] is slow
    best, why = choose([present, two, slow], limit_ms=1.0)
    assert best is present
    assert why == "no setting reaches 1.00 ms for one session; this one has the lowest p50"


def test_a_server_that_does_not_answer_ends_the_clients_of_the_measurement(refusing: socket.socket) -> None:
    with pytest.raises(ServingError, match=r"of 3 clients failed \(failed to connect .*the server's log"):
        answers_per_second(url_of(refusing), [b""], 3, 0.1)


def test_what_the_next_measurement_might_take_back_is_no_gain() -> None:
    present = _measured(2.0, 500)
    best, why = choose([present, _measured(2.0, 520, instances=2)])
    assert best is present
    assert why == "no other setting within the limit of 2.50 ms has 1.05 times its sessions/s"


def test_a_search_that_had_no_time_for_a_second_setting_says_so() -> None:
    assert choose([_measured(2.0, 500)])[1] == "no other setting was measured; give more --minutes or --trials"


@pytest.mark.triton
def test_a_model_repository_gets_what_was_chosen_on_a_real_server(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_GAIN", 0.0)  # then the last one measured is chosen
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    models = tmp_path / "models"
    shutil.copytree(exported / "repository", models)
    try:
        result = tune_serving(models, **QUICK, limit_ms=1e6, trials=2)
    except ServingError as error:
        if "not installed" in str(error) or "glibc" in str(error) or "numpy" in str(error):
            pytest.skip(str(error))
        raise
    assert result["stopped_by"] == "trials"
    assert [one["instances"] for one in result["tried"]] == [1, 2]
    assert [one["chosen"] for one in result["tried"]] == [None, "chosen"]
    figures = ("p50_1", "p99_1", "p50_64", "p99_64", "sessions_per_s")
    assert all(one[name] > 0 for one in result["tried"] for name in figures)
    assert settings_of(models / RANKER) == ServingSettings(instances=2)
    before = {file: file.read_bytes() for file in models.rglob("*") if file.is_file()}
    again = tune_serving(models, **QUICK, trials=1, dry_run=True)  # the repository that was written is served
    assert (again["changed"], again["chosen"]["instances"]) == (False, 2)
    assert {file: file.read_bytes() for file in models.rglob("*") if file.is_file()} == before


def test_a_deployment_gets_a_version_and_the_next_one_keeps_its_settings(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "deployment"
    deploy(folder, bundle=bundle, instances=2)
    chosen = ServingSettings(instances=2, queue_delay_us=500, preferred_batch_size=16)
    written = serving._write(folder, ServingSettings(instances=2), chosen)
    assert written["deployed"]["version"] == 2
    assert settings_of(folder / f"{RANKER}_v2") == chosen
    assert serving._served(folder) == (folder / f"{RANKER}_v2" / "1" / "bundle", chosen)
    deploy(folder, bundle=bundle, threads=2)
    assert settings_of(folder / f"{RANKER}_v3") == chosen._replace(threads=2)


def test_a_group_of_instances_without_a_number_has_one_as_for_triton(bundle: Path, tmp_path: Path) -> None:
    write_repository(bundle, tmp_path / "models")
    config = tmp_path / "models" / RANKER / "config.pbtxt"
    config.write_text(config.read_text().replace("count: 1", ""))
    assert settings_of(config.parent) == ServingSettings()


def test_what_cannot_be_tuned_is_refused(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no model that can be served.*missrec export --triton"):
        tune_serving(bundle)
    deploy(tmp_path / "small", bundle=bundle, max_batch_size=8)
    with pytest.raises(ConfigError, match="max_batch_size 8.*at least 64"):
        tune_serving(tmp_path / "small")
