"""docs/architecture.md has one line for every folder of the package, in the order of the layers, and for no other."""

import re
from pathlib import Path

from tests.project.packages import ROOT, shipped_files
from tests.project.test_layers import LAYERS


def _listed() -> list[str]:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(missrec_t4r/[\w/]+)` \| \S", page.partition("<!-- folders -->")[2], re.MULTILINE)


def test_every_folder_of_the_package_has_a_line() -> None:
    folders = {file.parent for file in shipped_files().values()}
    expected = {
        folder.relative_to(ROOT).as_posix() for folder in folders if folder.is_relative_to(ROOT / "missrec_t4r")
    }
    assert set(_listed()) == expected - {"missrec_t4r"}
    assert len(_listed()) == len(set(_listed()))


def test_folders_stand_in_the_order_of_the_layers() -> None:
    places = [LAYERS.index(folder.split("/")[1]) for folder in _listed() if folder.split("/")[1] in LAYERS]
    assert places == sorted(places)


def test_files_that_the_guide_for_contributors_names_exist(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:missrec_t4r|tests|docs)/[\w/.]+)`", text)
    assert len(named) > 8
    assert [name for name in named if not (repository / name).exists()] == []
