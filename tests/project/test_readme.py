"""The README is the first thing a stranger reads: what it names must exist, and what exists it must name."""

import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_every_link_of_the_readme_leads_somewhere(repository: Path, readme: str) -> None:
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", readme) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (repository / target).exists()] == []


def test_the_two_commands_exist(repository: Path, readme: str) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"make {target}" in readme
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_every_number_of_the_results_table_has_a_file(repository: Path, readme: str) -> None:
    results = readme.partition("<!-- results -->")[2].partition("<!-- /results -->")[0]
    files = re.findall(r"benchmarks/results/[\w.-]+\.json", results)
    assert files
    text = " ".join((repository / file).read_text(encoding="utf-8") for file in files)
    measured = {f"{float(number):.4f}"[1:] for number in re.findall(r"\b0\.\d+", text)}
    quoted = set(re.findall(r"(?<= )\.\d{4}\b", results))
    assert len(quoted) >= 12
    assert quoted <= measured
