"""The README is the first thing a stranger reads: what it names must exist. Its numbers: test_measured.py."""

import json
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


def test_the_printed_end_of_the_demo_is_that_of_the_file_beside_it(repository: Path, readme: str) -> None:
    found = re.search(r"It ends with\n\n```\n(.+?)\n```\n\n\(\[all of it\]\((.+?)\)\)", readme, re.DOTALL)
    assert found
    query, heads, *rows, figures = found[1].splitlines()
    summary = json.loads((repository / found[2]).read_text(encoding="utf-8"))["summary"]
    first = summary["recommendations"][0]
    assert query == f"query 1: {first['session'][0]['item_id']}, …"
    names = [head.strip().replace("recommended", "item_id") for head in heads.strip("│").split("│")]
    shown = [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]
    assert shown == [[str(item[name]) for name in names] for item in first["recommended"][: len(rows)]]
    summary |= {name: values["ndcg@10"] for name, values in summary["baselines"].items()}
    summary["max_abs_diff"] = float(f"{summary['max_abs_diff']:.0e}")
    printed = dict(part.split() for part in figures.removeprefix("… ").split(", "))
    assert printed == {name: json.dumps(summary[name]).strip('"') for name in printed}


def test_the_readme_stays_short(readme: str) -> None:
    assert len(readme.encode()) <= 9_000
