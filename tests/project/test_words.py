"""Documents and sources use the terms of docs/glossary.md, and none of those that they replaced."""

import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

REPLACED = {
    "door": "transport, entry model, or integration",
    "newcomer": "cold item, or new user",
    "look-alike": "similar item; content-kNN",
    "neighbour prior": "item-kNN term",
    "side feature": "event feature",
    "ranking term": "score term",
    "search table": "retrieval index",
    "lend": "impute",
    "borrow": "impute",
    "in words": "a message, or an error",
}
"""Former term -> what to write; files of the past (changelog, migration) may name them."""
FORMER = {"docs/migration.md", "CHANGELOG.md"}
FORMER_NAMES = {"config/renamed.py", "io/key_names.py", "io/weight_names.py"}
"""Modules that read what earlier versions wrote."""


def _documents(repository: Path) -> list[Path]:
    files = [
        *repository.glob("*.md"),
        *(repository / "docs").rglob("*.md"),
        *(repository / "triton_models").rglob("*.md"),
    ]
    return [file for file in files if file.relative_to(repository).as_posix() not in FORMER]


@pytest.mark.parametrize("word", REPLACED)
def test_no_document_uses_a_replaced_term(repository: Path, word: str) -> None:
    pattern = re.compile(rf"\b{word}s?\b(?![\w.-]*`)", re.IGNORECASE)
    found = [
        f"{file.relative_to(repository)}:{number}: {line.strip()[:80]}"
        for file in _documents(repository)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(re.sub(r"`[^`]*`|\]\([^)]*\)", "", line))
    ]
    assert found == [], f"write {REPLACED[word]}"


def _words(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of every name, string and comment of a module."""
    with tokenize.open(file) as source:
        for token in tokenize.generate_tokens(source.readline):
            kind = tokenize.tok_name[token.type]
            if kind in {"NAME", "COMMENT"} or "STRING" in kind:
                yield token.start[0], token.string


@pytest.mark.parametrize("word", REPLACED)
def test_no_source_uses_a_replaced_term(repository: Path, word: str) -> None:
    pattern = re.compile(rf"(?<![a-z]){re.sub('[- ]', '[-_ ]?', word)}s?(?![a-z])", re.IGNORECASE)
    package = repository / "missrec_t4r"
    found = [
        f"{file.relative_to(repository)}:{line}: {text[:80]}"
        for file in package.rglob("*.py")
        if file.relative_to(package).as_posix() not in FORMER_NAMES
        for line, text in _words(file)
        if pattern.search(text)
    ]
    assert found == [], f"write {REPLACED[word]}"


def test_the_glossary_has_one_line_per_term(repository: Path) -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \|$", (repository / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    terms = [row for row in rows if row not in {"term", "---"}]
    assert terms
    assert len(terms) == len(set(terms))
