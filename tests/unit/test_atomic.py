"""Atomic writes: a replaced folder always exists in one version, also when its writers are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.errors import DataError
from missrec_t4r.io import atomic
from missrec_t4r.io.json_files import read_json, write_json

WRITER = """
import sys
from pathlib import Path
from tests.unit.test_atomic import made

print("ready", flush=True)
number = 0
while True:
    number += 1
    made(number).save(sys.argv[1])
"""


def made(number: int) -> Catalogue:
    """Return a catalogue whose files all hold the same number."""
    vectors = np.full((5, 2), number, np.float32)
    vectors[:3] = 0
    items = pa.table({"item_id": [f"{number}", f"{number} too"], "train_count": [number, number]})
    return Catalogue(items, {"text": Modality(vectors, np.array([False] * 3 + [True] * 2), {"number": number})})


def number_of(catalogue: Catalogue) -> int:
    """Return the number after checking that it is the same in every file."""
    modality = catalogue.modalities["text"]
    numbers = {int(catalogue.train_count[3]), int(modality.vectors[3, 0]), int(modality.encoder["number"])}
    assert catalogue.ids_of([3]) == [str(min(numbers))]
    assert len(numbers) == 1
    return numbers.pop()


def test_readers_always_find_one_whole_version_while_writers_are_killed(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "catalogue"
    made(0).save(folder)
    for versions in (2, 8):  # a writer each, killed wherever it is
        seen: set[int] = set()
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder)], cwd=repository, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while len(seen) < versions and time.monotonic() < deadline:
            for _ in range(50):
                (folder / "catalogue.json").stat()  # raises in the moment in which there is no folder
            seen.add(number_of(Catalogue.load(folder)))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        number_of(Catalogue.load(folder))
        assert len(seen) >= versions, "the writer did not replace what was read"
    made(9).save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]
    assert number_of(Catalogue.load(folder)) == 9


def test_a_folder_that_is_always_replaced_is_an_error_and_never_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, number = tmp_path / "catalogue", iter(range(10**6))
    made(0).save(folder)
    monkeypatch.setattr(atomic, "_RETRY_SECONDS", 0.2)
    with pytest.raises(DataError, match="was replaced whenever it was read"):
        atomic.read_consistently(folder, lambda _: made(next(number)).save(folder))


def test_two_renames_replace_a_folder_where_names_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldSystem:
        """A C library that has no renameat2."""

    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: OldSystem())
    folder = tmp_path / "catalogue"
    for number in (1, 2):
        made(number).save(folder)
    assert number_of(Catalogue.load(folder)) == 2
    with pytest.raises(FileNotFoundError):
        atomic.exchange(tmp_path / "none", folder)
    assert number_of(Catalogue.load(folder)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


def test_a_write_that_fails_half_way_changes_nothing(tmp_path: Path) -> None:
    made(1).save(tmp_path / "catalogue")
    with pytest.raises(IsADirectoryError), atomic.replace_dir(tmp_path / "catalogue") as folder:
        folder.write_text("a folder is no file")
    assert number_of(Catalogue.load(tmp_path / "catalogue")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


def test_the_only_copy_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    made(1).save(tmp_path / "catalogue")
    between = tmp_path / f".catalogue-{atomic._HOST}-{gone.pid}-between-old"
    (tmp_path / "catalogue").rename(between)
    atomic.recover(tmp_path / "catalogue")
    assert number_of(Catalogue.load(tmp_path / "catalogue")) == 1
    made(2).save(between)  # a new one was written since: what was moved away is rubbish
    atomic.recover(tmp_path / "catalogue")
    assert number_of(Catalogue.load(tmp_path / "catalogue")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["catalogue"]


def test_what_running_processes_and_other_machines_write_is_left_alone(tmp_path: Path) -> None:
    running = tmp_path / f".catalogue-{atomic._HOST}-{os.getpid()}-abc"
    elsewhere = tmp_path / ".catalogue-elsewhere-1-abc"
    for folder in (running, elsewhere):
        folder.mkdir()
    made(1).save(tmp_path / "catalogue")
    assert {path.name for path in tmp_path.iterdir()} == {running.name, elsewhere.name, "catalogue"}


def test_a_reader_whose_folder_is_replaced_reads_again(tmp_path: Path) -> None:
    made(1).save(tmp_path / "catalogue")
    numbers = iter([2, 3])

    def read(folder: Path) -> int:
        found = number_of(Catalogue.load(folder))
        if (number := next(numbers, None)) is not None:
            made(number).save(folder)
            if number == 2:
                raise FileNotFoundError("a file of the old version")
        return found

    assert atomic.read_consistently(tmp_path / "catalogue", read) == 3
    with pytest.raises(ValueError, match="of its own"):
        atomic.read_consistently(tmp_path / "catalogue", lambda _: int("of its own"))


def test_written_files_are_readable_for_all_users(tmp_path: Path) -> None:
    with atomic.atomic_write_dir(tmp_path / "bundle", "manifest.json") as folder:
        (folder / "inner").mkdir()
        save_file({"weight": torch.ones(1)}, folder / "inner" / "model.safetensors")
        (folder / "run.sh").touch(0o700)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "bundle").rglob("*")}
    assert modes == {"inner": 0o755, "model.safetensors": 0o644, "run.sh": 0o744}


def write_half(file: Path) -> None:
    file.write_text('{"number": ')
    raise ZeroDivisionError


def test_a_file_is_replaced_whole_and_partial_ones_of_killed_processes_are_removed(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    write_json(file, {"number": np.int64(1)})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".report.json-{atomic._HOST}-{gone.pid}-abc"
    left.mkdir()
    with pytest.raises(ZeroDivisionError), atomic.atomic_write_file(file) as temporary:
        write_half(temporary)
    assert read_json(file) == {"number": 1}
    write_json(file, {"number": 2})
    assert read_json(file) == {"number": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_a_link_names_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link = tmp_path / "elsewhere" / "metrics.json", tmp_path / "metrics.json"
    link.symlink_to(file)
    for text in ("1", "2"):  # a link that names no file yet, and one that does
        atomic.write_text(link, text)
        assert link.is_symlink()
        assert file.read_text() == text
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["metrics.json"]
