"""Shared fixtures: a run, its bundle, its model repository and a real Triton server."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from missrec_t4r.errors import ServingError
from missrec_t4r.export.export import export
from missrec_t4r.runs.run_folder import LoadedRun, load_run, save_run
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests.serving import shop


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(*, integers: bool = False, **settings: object) -> Path:
        folder = tmp_path_factory.mktemp("shop")
        (folder / "data").mkdir()
        catalogue = shop.catalogue(integers=integers)
        data = shop.data_folder(folder / "data", catalogue)
        model = shop.model_for(catalogue, **settings)
        save_run(folder / "run", model, shop.recipe_of(model), data, {"best_epoch": 0})
        return folder / "run"

    return make


@pytest.fixture(scope="session")
def run(make_run: Callable[..., Path]) -> Path:
    return make_run()


@pytest.fixture(scope="session")
def loaded(run: Path) -> LoadedRun:
    return load_run(run)


@pytest.fixture(scope="session")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``bundle`` and ``repository``."""
    folder = tmp_path_factory.mktemp("exported")
    export(run, folder / "bundle", triton=folder / "repository")
    return folder


@pytest.fixture(scope="session")
def bundle(exported: Path) -> Path:
    return exported / "bundle"


@pytest.fixture
def refusing() -> Iterator[socket.socket]:
    """A port of the loopback interface that refuses connections: nobody listens, and no other process can take it."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound


def url_of(bound: socket.socket) -> str:
    return f"127.0.0.1:{bound.getsockname()[1]}"


def serving(repository: Path) -> Iterator[LocalTriton]:
    """Start the server, or skip where this machine cannot."""
    try:
        server = LocalTriton(repository).__enter__()
    except ServingError as error:
        if "not installed" in str(error) or "glibc" in str(error) or "numpy" in str(error):
            pytest.skip(str(error))
        raise
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def server(exported: Path) -> Iterator[LocalTriton]:
    yield from serving(exported / "repository")
