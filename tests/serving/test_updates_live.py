"""Catalogue updates on a running server: no failed request, no response that mixes two versions."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from missrec_t4r.bundle.manifest import catalogue_version, verify_bundle
from missrec_t4r.cli import app
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.transports import TritonTransport
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.triton.backend import RankerBackend, SessionsBackend
from missrec_t4r.serving.triton.deployment import bundle_of
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests.serving.conftest import serving
from tests.serving.test_updates import ITEMS, NO_IMAGE, RETIRED, vectors

pytestmark = pytest.mark.triton

OUTPUTS = ("item_id", "score", "n_items", "n_unknown", "catalogue_version")
REQUEST = {
    "item_ids": np.array([[b"ware-3-\xc3\xbc", RETIRED.encode(), b"neu-1"], [b"neu-1", b"", b""]], object),
    "length": np.array([[3], [1]], np.int32),
    "top_k": np.array([[40], [40]], np.int32),
}
"""Its answer tells the versions apart in every part: a changed item, a retired one, and a new one, known or unknown."""


@pytest.fixture(scope="module")
def live(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live") / "models"
    deploy(folder, bundle=bundle)
    return folder


@pytest.fixture(scope="module")
def running(live: Path) -> Iterator[LocalTriton]:
    yield from serving(live)


def expected(bundle: Path) -> dict[str, np.ndarray]:
    """Recommendations of a bundle for REQUEST, without a server."""
    (rows,) = SessionsBackend(bundle).infer([REQUEST])
    (answer,) = RankerBackend(bundle).infer([{**REQUEST, **rows}])
    return {name: answer[name] for name in OUTPUTS}


def missrec(*words: object) -> dict[str, str]:
    run = CliRunner().invoke(app, ["catalogue", *map(str, words)])
    assert run.exit_code == 0, run.output
    answer: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    return answer


def test_the_catalogue_changes_under_load(running: LocalTriton, live: Path, tmp_path: Path) -> None:
    pq.write_table(ITEMS, tmp_path / "items.parquet")
    options = ["--repository", live, "--items", tmp_path / "items.parquet"]
    for name, own in vectors().items():
        np.save(tmp_path / f"{name}.npy", own)
        options += ["--modality", f"{name}={tmp_path / f'{name}.npy'}"]
    seen: dict[str, list[dict[str, np.ndarray]]] = {}
    failures: list[Exception] = []
    stop = threading.Event()

    def ask() -> None:
        transport = TritonTransport(running.grpc_url, "grpc", 30.0)
        while not stop.is_set():
            time.sleep(0.01)
            try:
                answer = transport.infer("missrec", REQUEST, OUTPUTS)
            except Exception as error:  # every one counts
                failures.append(error)
            else:
                seen.setdefault(answer["catalogue_version"][0, 0].decode(), []).append(answer)
        transport.close()

    def more(version: str) -> None:
        """Wait for ten further answers of a version."""
        wanted, until = len(seen.get(version, [])) + 10, time.monotonic() + 60
        while not failures and len(seen.get(version, [])) < wanted and time.monotonic() < until:
            time.sleep(0.01)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        more(catalogue_version(verify_bundle(bundle_of(live, 1))))
        done = missrec("update", *options)
        more(done["catalogue_version"])
        missrec("rollback", "--repository", live)
        more(done["previous"])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(seen) == {done["previous"], done["catalogue_version"]}
    for version in (1, 2):
        bundle = bundle_of(live, version)
        offline = expected(bundle)
        answers = seen[catalogue_version(verify_bundle(bundle))]
        assert len(answers) >= 10
        for answer in answers:
            for name in OUTPUTS:
                if name == "score":
                    np.testing.assert_allclose(answer[name], offline[name], atol=1e-5)
                else:
                    np.testing.assert_array_equal(answer[name], offline[name])


def test_new_items_are_recommended_and_retired_ones_are_not(running: LocalTriton, live: Path) -> None:
    deploy(live, version=2)
    with MISSRecClient(running.grpc_url) as client:
        answer = client.recommend([[RETIRED, "neu-1"]], 100)[0]
    assert answer.unknown_items == 0
    assert {"neu-1", NO_IMAGE} <= set(answer.item_ids)
    assert RETIRED not in answer.item_ids
