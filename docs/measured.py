"""Writes the measured numbers of the documents from result files: one figure, one cell (file, key).

    python docs/measured.py        # also part of `make docs`

`docs/measured.yaml` names the cells. Tables lie between ``<!-- measured: NAME -->`` and ``<!-- /measured -->`` in a
page and are written whole; a sentence stays in the page, is found by its words, and its figures are replaced. A test
compares every figure with its cell, so two exchanged figures are noticed.

A figure is ``{FILE#KEY|FORMAT}``: FILE a name of `files` in the YAML (left out in a table: the row's ``file``), KEY a
path such as ``seen_excluded/ndcg@10``, which may be an expression of cells and numbers, left to right
(``a/b / a/c``, ``sum seconds / 60``; operators stand between spaces). A cell with ``mean`` and ``std`` is written as
"mean ± std". FORMAT is ``.4`` (.1234), ``0.4`` (0.1234), ``+.4`` (+.1234), ``,`` (1,234), ``%`` (12 of .12), ``:`` and
a format of Python, or nothing: as it stands in the file.
"""

from __future__ import annotations

import functools
import itertools
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"
_FIGURE = re.compile(r"\{([^{}|]+)(?:\|([^{}]*))?\}")
_VARIABLE = re.compile(r"<([a-z_0-9]+)>")
_TABLE = re.compile(r"<!-- measured: ([\w-]+) -->\n(.*?)<!-- /measured -->", re.DOTALL)
_WRITTEN = r"([-+]?(?:\d[\d,]*)?\.?\d+(?:e[-+]?\d+)?(?:\s±\s[\d.]+)?)"
_OPERATORS: dict[str, Callable[[float, float], float]] = {
    "/": operator.truediv,
    "*": operator.mul,
    "-": operator.sub,
    "+": operator.add,
}


class MeasuredError(Exception):
    """A cell, a table or a sentence that `docs/measured.yaml` names was not found."""


class Measured:
    """The cells of all documents.

    Attributes
    ----------
    pages : dict
        Page -> its ``tables``, ``sentences`` and texts with numbers that are ``not_measured``.
    used : dict
        Page -> names of the result files that its figures were read from, as far as they have been written.
    table : callable
        Returns one table of a page, with a line break at its end.
    """

    def __init__(self, root: Path = ROOT) -> None:
        spec = yaml.safe_load((root / "docs/measured.yaml").read_text(encoding="utf-8"))
        self.root = root
        self.files: dict[str, str] = spec["files"]
        self.earlier_temperature: list[str] = spec["earlier_temperature"]
        self.not_measured: list[str] = spec["not_measured"]
        self.pages: dict[str, dict[str, Any]] = spec["pages"]
        self.used: dict[str, set[str]] = {page: set() for page in self.pages}
        self.table = functools.cache(self._written_table)

    def written(self, page: str, text: str) -> str:
        """Return the page's text with every table and every figure as in the result files."""
        for name in self.pages[page].get("tables", {}):
            if len(re.findall(rf"<!-- measured: {name} -->", text)) != 1:
                raise MeasuredError(
                    f"{page} has no table '{name}', or more than one; expected: '<!-- measured: {name} -->' and, below "
                    "the table, '<!-- /measured -->'. Add the two lines, or remove the table from docs/measured.yaml."
                )
        text = _TABLE.sub(
            lambda at: f"<!-- measured: {at[1]} -->\n\n{self.table(page, at[1])}\n<!-- /measured -->", text
        )
        for sentence in self.pages[page].get("sentences", []):
            match = self.found(page, sentence, text)
            figures = self._figures(page, sentence)
            for group in range(len(figures), 0, -1):
                breaks = iter(re.findall(r"\s+", match[group]))  # a line may end within a figure
                figure = re.sub(r"\s+", lambda _, breaks=breaks: next(breaks, " "), figures[group - 1])
                text = text[: match.start(group)] + figure + text[match.end(group) :]
        return text

    def wrong(self, page: str, text: str) -> list[str]:
        """Return the lines of a page that are not as in the result files."""
        pairs = itertools.zip_longest(text.splitlines(), self.written(page, text).splitlines(), fillvalue="")
        return [f"{page}: {found}\n  expected: {expected}" for found, expected in pairs if found != expected]

    def unnamed(self, page: str, text: str) -> list[str]:
        """Return the numbers of a page that neither have a cell nor are listed as not measured, with what is around."""
        text = _TABLE.sub("", text)
        for sentence in self.pages[page].get("sentences", []):
            match = self.found(page, sentence, text)
            for group in range(match.re.groups, 0, -1):
                text = text[: match.start(group)] + text[match.end(group) :]
        text = re.sub(r"```.*?```|`[^`]*`|<!--.*?-->|\]\([^)]*\)|https?:\S+", " ", text, flags=re.DOTALL)
        for words in [*self.not_measured, *self.pages[page].get("not_measured", [])]:
            text = re.sub(_spaced(words), " ", text)
        text = re.sub(r"\b[A-Za-z_]+[@-]?\d+[\w+]*", " ", text)  # R@10, bf16, H200
        return [" ".join(text[max(0, at.start() - 30) : at.end() + 20].split()) for at in re.finditer(r"\d+", text)]

    def _written_table(self, page: str, name: str) -> str:
        """Return one table, with a line break at its end."""
        table = self._table(page, name)
        titles = [next(iter(column)) for column in table["columns"]]
        rows = [[self._cell(page, table, column, row) for column in table["columns"]] for row in table["rows"]]
        head, *body = [f"| {' | '.join(line)} |\n".replace("  ", " ") for line in [titles, *rows]]
        return "".join([head, "|" + "---|" * len(titles) + "\n", *body])

    def found(self, page: str, sentence: str, text: str) -> re.Match[str]:
        """Return where a sentence stands in a text, with its figures as groups."""
        matches = list(_pattern(sentence).finditer(text))
        if len(matches) != 1:
            raise MeasuredError(
                f"{page} has {len(matches)} sentences '{sentence}'; expected: one. "
                "Write the same words in the page and in docs/measured.yaml, enough of them to be found once."
            )
        return matches[0]

    def value(self, page: str, cell: str, file: str | None = None) -> Any:
        """Return the value of an expression of cells."""
        first, *rest = re.split(r" ([-/*+]) ", cell.strip())
        value = self._operand(page, first, file)
        for sign, operand in zip(rest[::2], rest[1::2], strict=True):
            value = _OPERATORS[sign](value, self._operand(page, operand, file))
        return value

    def _table(self, page: str, name: str) -> dict[str, Any]:
        tables = self.pages[page].get("tables", {})
        if name not in tables:
            raise MeasuredError(
                f"{page} has a table '{name}' that docs/measured.yaml does not name; expected: one of "
                f"{', '.join(tables) or 'none'}. Add its columns and rows there."
            )
        found: dict[str, Any] = tables[name]
        if "columns_of" in found:
            found = {**self._table(page, found["columns_of"]), **found}
        return found

    def _cell(self, page: str, table: Mapping[str, Any], column: Mapping[str, str], row: Mapping[str, Any]) -> str:
        variables = {**table.get("variables", {}), **row}
        ((_, template),) = column.items()
        if "file" in row:
            path = f"{RESULTS}/{self.files[row['file']]}"
            variables["link"] = f"[file]({os.path.relpath(path, Path(page).parent)})"
        text = template
        while names := set(_VARIABLE.findall(text)):  # a variable may name others
            if any(variables.get(name) is None for name in names):
                return str(row.get("empty", table.get("empty", "")))
            text = _VARIABLE.sub(lambda name: str(variables[name[1]]), text)
        return _FIGURE.sub(lambda figure: self._figure(page, figure, row.get("file")), text)

    def _figures(self, page: str, sentence: str) -> list[str]:
        return [self._figure(page, figure) for figure in _FIGURE.finditer(sentence)]

    def _figure(self, page: str, figure: re.Match[str], file: str | None = None) -> str:
        return _formatted(self.value(page, figure[1], file), figure[2] or "")

    def _operand(self, page: str, cell: str, file: str | None) -> Any:
        if re.fullmatch(r"[\d.]+", cell):
            return float(cell)
        name, _, key = cell.rpartition("#")
        name, summed = name.removeprefix("sum "), cell.startswith("sum ")
        name = name or file or ""
        if name not in self.files:
            raise MeasuredError(
                f"'{cell}' of {page} is in file '{name}'; expected: a name of `files` in docs/measured.yaml. Add it."
            )
        self.used[page].add(self.files[name])
        value = _looked_up(_content(self.root / RESULTS / self.files[name]), key.removeprefix("sum ").strip("/"))
        if value is None:
            raise MeasuredError(
                f"{self.files[name]} has no cell '{key}' (for {page}); expected: a path of its keys. "
                "Correct it in docs/measured.yaml."
            )
        return sum(value.values()) if summed else value


@functools.cache
def _content(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _looked_up(value: Any, key: str) -> Any:
    """Return what lies under a path of keys; None where there is nothing. Keys may hold slashes themselves."""
    if key == "":
        return value
    if isinstance(value, list):
        at, _, rest = key.partition("/")
        return _looked_up(value[int(at)], rest) if at.isdigit() and int(at) < len(value) else None
    if isinstance(value, dict):
        for name in sorted(value, key=len, reverse=True):
            if f"{key}/".startswith(f"{name}/"):
                return _looked_up(value[name], key[len(name) + 1 :])
    return None


def _formatted(value: Any, form: str) -> str:
    if isinstance(value, dict):
        return " ± ".join(_formatted(value[part], form) for part in ("mean", "std"))
    if form == "":
        return str(value)
    if form[0] == ":":
        return format(value, form[1:])
    if form == "%":
        return f"{100 * value:.0f}"
    if form == ",":
        return f"{value:,.0f}"
    sign, digits = ("+" if form[0] == "+" else ""), form.partition(".")[2]
    text = f"{value + 0.0:{sign}.{digits}f}"
    return text if form[0] == "0" else re.sub(r"\b0\.", ".", text, count=1)


@functools.cache
def _pattern(sentence: str) -> re.Pattern[str]:
    """Return a pattern for a sentence, with its figures as groups."""
    return re.compile(_WRITTEN.join(_spaced(part) for part in _FIGURE.sub("\0", sentence).split("\0")))


@functools.cache
def _spaced(words: str) -> str:
    """Return a pattern for words, wherever their lines break."""
    return "".join(r"\s+" if part.isspace() else re.escape(part) for part in re.split(r"(\s+)", words) if part)


def pages(measured: Measured) -> Iterator[tuple[str, str]]:
    """Yield each page with its text."""
    for page in measured.pages:
        yield page, (measured.root / page).read_text(encoding="utf-8")


if __name__ == "__main__":
    measured = Measured()
    for page, text in pages(measured):
        written = measured.written(page, text)
        if written != text:
            (ROOT / page).write_text(written, encoding="utf-8")
            print(f"{page}: written anew")
