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
    files = set(_files(results))
    assert len(files) >= 5
    quoted = set(re.findall(r"(?<= )\.\d{4}\b", results))
    assert len(quoted) >= 12
    assert _unmeasured(repository, files, quoted) == []


def test_every_number_of_a_benchmark_table_has_a_file(repository: Path) -> None:
    """A row's own file, or the last one above it in the same table where a row says "the same"."""
    page = (repository / "docs/benchmarks.md").read_text(encoding="utf-8")
    tables = [part for part in re.split(r"\n(?!\|)", page) if "\n|---" in part]
    checked = 0
    for table in tables:
        files: set[str] = set()
        for row in [line for line in table.splitlines() if line.startswith("|")][2:]:
            files = set(_files(row)) or files
            cells = [cell for cell in row.split("|")[2:-2] if re.fullmatch(r"[\s\d.,+±/to-]+", cell)]
            quoted = {number for cell in cells for number in re.findall(r"\d*\.\d+|\d{2,}", cell.replace(",", ""))}
            checked += len(quoted)
            assert not quoted or files, row
            assert _unmeasured(repository, files, quoted) == [], row
    assert checked > 400


def test_the_readme_stays_short(readme: str) -> None:
    assert len(readme.encode()) <= 9_000


def _files(text: str) -> list[str]:
    return re.findall(r"benchmarks/results/[\w.-]+\.json", text)


def _unmeasured(repository: Path, files: set[str], quoted: set[str]) -> list[str]:
    """Return the quoted numbers that are no rounding of a number in the files."""
    text = " ".join((repository / file).read_text(encoding="utf-8") for file in files)
    measured = {abs(float(number)) for number in re.findall(r"-?\b\d+\.?\d*(?:e-?\d+)?", text)}
    shown = {len(number.partition(".")[2]) for number in quoted}
    rounded = {(digits, f"{value:.{digits}f}") for digits in shown for value in measured}
    return sorted(
        number
        for number in quoted
        if (len(number.partition(".")[2]), number if number[0] != "." else f"0{number}") not in rounded
    )
