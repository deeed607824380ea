"""The README is the first thing a stranger reads: what it names must exist. Its numbers: test_measured.py."""

import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_every_link_of_the_readme_leads_somewhere(repository: Path, readme: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", readme) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (repository / target.partition("#")[0]).exists()] == []


def test_the_two_commands_exist(repository: Path, readme: str) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_readme_stays_short(readme: str) -> None:
    assert len(readme.encode()) <= 9_000
