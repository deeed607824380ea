"""docs/tutorial.md from the first command to the last, on a smaller shop; then the README's script on its data."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from missrec_t4r.data.catalogue import Catalogue
from tests import processes

pytestmark = pytest.mark.triton
SIZE, SMALLER = "--users 800 --items 300", "--users 300 --items 120"
READY = re.compile(r"Triton is ready .* gRPC (127\.0\.0\.1:\d+),")
BLOCK = re.compile(r"^```(bash|bash background|python file=(\S+))\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Reader:
    """Runs the commands of a page and keeps the output of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.outputs: list[tuple[str, str]] = []
        self.server: subprocess.Popen[bytes] | None = None

    def follow(self, page: str) -> None:
        for kind, file, text in BLOCK.findall(page):
            if file:
                (self.folder / file).write_text(text.replace("localhost:8001", self.url), encoding="utf-8")
            for line in [] if file else text.splitlines():
                if "background" in kind:
                    self.serve(line)
                else:
                    self.run(line)

    def run(self, line: str) -> None:
        words = self.words(line)
        if "recommend" in words:
            words += ["--url", self.url]
        done = processes.run(words, cwd=self.folder)
        assert done.returncode == 0, (line, done.stderr)
        self.outputs.append((line, done.stdout))

    def serve(self, line: str) -> None:
        ports = [f"--{transport}-port=0" for transport in ("http", "grpc", "metrics")]
        log = self.folder / "serve.log"
        with log.open("wb") as output:
            self.server = subprocess.Popen(
                [sys.executable, *self.words(line), *ports], cwd=self.folder, stdout=output, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 300
        while (ready := READY.search(log.read_text())) is None:
            assert time.monotonic() < until, log.read_text()
            assert self.server.poll() is None, log.read_text()
            time.sleep(0.1)
        self.url = ready[1]

    def words(self, line: str) -> list[str]:
        first, *rest = shlex.split(line)
        return [*{"missrec": ["-m", "missrec_t4r"], "python": []}[first], *rest]

    def results(self, beginning: str) -> list[dict[str, Any]]:
        found = [out for line, out in self.outputs if line.startswith(beginning)]
        return [json.loads(out.splitlines()[-1]) for out in found]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Reader]:
    follower = Reader(tmp_path_factory.mktemp("tutorial"))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        page = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
        assert SIZE in page
        follower.follow(page.replace(SIZE, SMALLER))
        yield follower
    finally:
        if follower.server is not None:
            follower.server.send_signal(signal.SIGTERM)
            try:
                assert follower.server.wait(60) == 0
            finally:
                follower.server.kill()  # of no effect on one that has ended


def test_every_block_of_commands_was_run(reader: Reader, repository: Path) -> None:
    page = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:missrec|python) .*", page, re.MULTILINE)
    assert len(reader.outputs) + 1 == len(commands) > 20  # the server's is the one


def test_the_model_is_worth_its_training(reader: Reader) -> None:
    (found,) = reader.results("missrec evaluate")
    kept = found["protocols"]["kept_with_history_term"]
    assert kept["model"]["ndcg@10"] > max(kept[name]["ndcg@10"] for name in ("popularity", "content_knn"))


def test_the_server_recommends_filters_and_explains(reader: Reader) -> None:
    reasoned, ruled, allowed = (found["recommendations"] for found in reader.results("missrec recommend"))
    assert len(reasoned) == 3
    items = Catalogue.load(reader.folder / "data" / "catalogue").items.to_pandas().set_index("item_id")
    assert all(item["because_of"] in {"P00042", "P00007"} for item in reasoned)
    assert [item.get("title") for item in reasoned] == [items.title[item["item_id"]] for item in reasoned]
    chosen = items.loc[[item["item_id"] for item in ruled]]
    assert chosen.price.max() <= 30
    assert chosen.brand.is_unique
    assert {item["item_id"] for item in allowed} == {"NEW-1", "P00042"}
    assert all(item["title"] for item in allowed)  # of the catalogue that answers, which has the new item


def test_a_session_of_unknown_items_says_that_it_falls_back(reader: Reader) -> None:
    (output,) = (out for line, out in reader.outputs if line == "python recommend.py")
    known, unknown = output.splitlines()
    assert known.endswith("] 0 False")
    assert unknown.endswith("] 1 True")


def test_the_next_day_is_in_the_data_and_the_new_model_responds(reader: Reader) -> None:
    _, update = reader.results("missrec etl")
    assert update["added"]["events_added"] > 0
    assert update["added"]["items_added"] == 1
    first, second, again = ((found["version"], found["live"]) for found in reader.results("missrec deploy"))
    assert (first, second, again) == ((1, False), (3, True), (3, True))
    assert [found["version"] for found in reader.results("missrec rollback")] == [2]


def test_the_readmes_transformers4rec_script_runs_in_a_plain_shell(reader: Reader, repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8").partition("## In a Transformers4Rec script")[2]
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    for is_, becomes in (("work/", ""), ("d_model=300", "d_model=16"), ("num_train_epochs=3", "max_steps=2")):
        assert is_ in script
        script = script.replace(is_, becomes)
    (reader.folder / "script.py").write_text(script, encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("DASK", "TORCH", "TOKENIZERS"))}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=reader.folder, env=plain, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "ndcg_at_10" in done.stdout
