"""Every measured number of the documents is a named cell of a result file, and a figure that is moved is noticed."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMPLETE = ["README.md", "docs/benchmarks.md"]
"""Pages in which every number has a cell or is listed as no measurement."""
TABLE = re.compile(r"<!-- measured: [\w-]+ -->.*?<!-- /measured -->", re.DOTALL)


@pytest.fixture(scope="module")
def module(documents_script: Callable[[str], Any]) -> Any:
    return documents_script("measured")


@pytest.fixture(scope="module")
def measured(module: Any) -> Any:
    return module.Measured()


@pytest.fixture(scope="module")
def pages(module: Any, measured: Any) -> dict[str, str]:
    return dict(module.pages(measured))


def test_every_figure_is_that_of_its_cell(measured: Any, pages: dict[str, str]) -> None:
    for page, text in pages.items():
        assert measured.wrong(page, text) == [], "run `python docs/measured.py` and commit"


def test_two_exchanged_figures_of_a_table_are_noticed_and_mended(measured: Any, pages: dict[str, str]) -> None:
    """In each round, one figure of every table changes places with the next one that differs from it."""
    exchanged = 0
    for page, text in pages.items():
        for round_ in range(6):
            other, tables = text, list(TABLE.finditer(text))
            for table in reversed(tables):
                figures = list(re.finditer(r"(?<=[ /])[+-]?\.\d{3,4}(?=[ /])", table[0]))
                pairs = [pair for pair in itertools.pairwise(figures) if pair[0][0] != pair[1][0]]
                if round_ < len(pairs):
                    one, two = pairs[round_]
                    middle = table[0][one.end() : two.start()]
                    swapped = f"{table[0][: one.start()]}{two[0]}{middle}{one[0]}{table[0][two.end() :]}"
                    other = other[: table.start()] + swapped + other[table.end() :]
                    exchanged += 1
            if other != text:
                assert measured.written(page, other) == text
    assert exchanged > 60


def test_a_changed_figure_of_a_sentence_is_noticed_and_mended(measured: Any, pages: dict[str, str]) -> None:
    changed = 0
    for page, text in pages.items():
        sentences = measured.pages[page].get("sentences", [])
        matches = sorted((measured.found(page, sentence, text) for sentence in sentences), key=lambda at: -at.start())
        other = text
        for match in matches:
            for group in range(match.re.groups, 0, -1):
                figure = re.sub(r"\d(?=\D*$)", lambda digit: str((int(digit[0]) + 1) % 10), match[group])
                other = other[: match.start(group)] + figure + other[match.end(group) :]
                changed += 1
        assert measured.written(page, other) == text
    assert changed > 100


@pytest.mark.parametrize("page", COMPLETE)
def test_no_number_is_without_a_cell(measured: Any, pages: dict[str, str], page: str) -> None:
    assert measured.unnamed(page, pages[page]) == [], "give it a cell in docs/measured.yaml, or list it as not measured"
    assert len(measured.unnamed(page, pages[page] + "\n\nThis is 3.2 times faster.\n")) == 2


def test_every_text_that_is_no_measurement_is_still_there(measured: Any, pages: dict[str, str]) -> None:
    for page, text in pages.items():
        words = [" ".join(words.split()) for words in measured.pages[page].get("not_measured", [])]
        assert [text_ for text_ in words if text_ not in " ".join(text.split())] == []


def test_every_result_file_is_used_by_a_document(repository: Path, measured: Any, pages: dict[str, str]) -> None:
    """What only the log of experiments needs is in archive/, and what no document needs is deleted."""
    for page, text in pages.items():
        measured.written(page, text)
    used = set().union(*measured.used.values())
    assert [name for name, file in measured.files.items() if file not in used] == []
    results = repository / "benchmarks/results"
    documents = [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]
    texts = {file: file.read_text(encoding="utf-8") for file in documents}
    linked = {name for text in texts.values() for name in re.findall(r"results/((?:archive/)?[\w.-]+\.json)", text)}
    kept = {file.relative_to(results).as_posix() for file in results.rglob("*.json")}
    assert sorted(linked - kept) == []
    log = texts[repository / "docs/experiments.md"]
    assert sorted(name for name in kept - used - linked if not (name.startswith("archive/") and name in log)) == []


def test_a_table_of_the_earlier_temperature_says_so(repository: Path, measured: Any) -> None:
    earlier = {measured.files[name] for name in measured.earlier_temperature}
    for file in (repository / "benchmarks/results").glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.get("resolved", {}).get("model", {}).get("temperature") == 0.12:
            assert file.name in earlier, f"name {file.name} in earlier_temperature of docs/measured.yaml"
    marked = 0
    for page, parts in measured.pages.items():
        for name, table in parts.get("tables", {}).items():
            head, *rows = [line for line in measured.table(page, name).splitlines() if "---" not in line]
            for line, row in zip(rows, table["rows"], strict=True):
                if row.get("file") in measured.earlier_temperature:
                    assert "temperature .12" in line or "temperature .12" in head, f"{page}: {line}"
                    marked += 1
    assert marked > 50


def test_a_wrong_key_says_which_file_and_page(module: Any, measured: Any) -> None:
    with pytest.raises(module.MeasuredError, match=r"no cell 'recall@10/median' .*README.md.*expected.*Correct"):
        measured.value("README.md", "subset#recall@10/median")
    with pytest.raises(module.MeasuredError, match=r"0 sentences .*expected: one"):
        measured.found("README.md", "it is {subset#seeds} times better", "it is worse")


def test_a_table_is_written_from_rows_and_cells(module: Any, tmp_path: Path) -> None:
    """Variables may name others; a protocol without a cell stays empty; figures are formatted as asked."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    found = {"strict": {"all text/images": {"mean": 0.12345, "std": 0.00161}}, "seconds": {"train": 90.0, "serve": 30}}
    (tmp_path / "benchmarks/results/day-run.json").write_text(json.dumps(found), encoding="utf-8")
    spec = """
        files: {run: day-run.json}
        earlier_temperature: []
        not_measured: []
        pages:
          page.md:
            tables:
              times:
                variables: {cell: strict/<of>}
                empty: not measured
                columns: [system: <of>, score: "{<cell>|.4}", other: "{<other>|.4}", minutes: "{sum seconds / 60|0.1}"]
                rows: [{of: all text/images, file: run}, {of: no text, cell: null, file: run}]
            sentences: ["takes {run#seconds/train|0.0} s"]
    """
    (tmp_path / "docs/measured.yaml").write_text(spec, encoding="utf-8")
    text = "It takes\n70 s.\n<!-- measured: times -->\nold\n<!-- /measured -->\n"
    assert module.Measured(tmp_path).written("page.md", text).splitlines() == [
        "It takes",
        "90 s.",
        "<!-- measured: times -->",
        "",
        "| system | score | other | minutes |",
        "|---|---|---|---|",
        "| all text/images | .1235 ± .0016 | not measured | 2.0 |",
        "| no text | not measured | not measured | 2.0 |",
        "",
        "<!-- /measured -->",
    ]
