"""Read parquet, csv and JSON-lines files as Arrow tables, with errors that name the file, the column and the option.

Accepts one file, several, glob patterns (``**`` too), or a folder; csv and JSON lines may be compressed. Ids in csv and
JSON are read as text, so that "00123" keeps its zeros and ids of mixed types get one type; if files disagree about an
id's type, it becomes text. Texts that are not UTF-8 are repaired in the item table and refused in ids. Of a folder or
pattern, files and folders whose names begin with ``_`` or ``.`` are left out, as Spark, Arrow and Dask leave them out.
"""

from __future__ import annotations

import difflib
import logging
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.etl.arrow_columns import TEXT_TYPES, is_utf8, repaired, require_utf8
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.etl.sources.json_lines import JSON_LINES, read_all
from missrec_t4r.io.arrow_files import with_column
from missrec_t4r.io.input_files import files_in, files_of, is_hidden

log = logging.getLogger(__name__)

Paths = Path | str | Sequence[Path | str]

PARQUET_SUFFIXES = (".parquet", ".pq")
_CSV = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_KNOWN = PARQUET_SUFFIXES + _CSV + JSON_LINES


def read_table(
    paths: Paths,
    what: str,
    *,
    text_columns: Sequence[str] = (),
    needed: Iterable[str] | None = (),
    findings: Findings | None = None,
) -> pa.Table:
    """Read one table from one or many files.

    Parameters
    ----------
    paths : path, pattern, folder, or a sequence of them
        Files are read in the given order, those of a pattern or folder in name order.
    what : str
        Name of the table in messages ("interactions").
    text_columns : sequence of str
        Columns that are read as text from csv and JSON.
    needed : iterable of str, optional
        Columns to keep even if they look like a row index of pandas, as ``text_columns`` are; None keeps all, and all
        are kept where no text column is there: the index may hold the ids, which `require_column` says.
    findings : Findings, optional
        Receives repaired texts and dropped row indexes.

    Raises
    ------
    DataError
        A file is missing, unreadable or of an unknown kind, or there is no row.
    SchemaError
        The files do not have the same columns, or one has a name twice.
    """
    files, findings = expand(paths, what), findings or Findings()
    tables = [_read_file(file, what, text_columns) for file in files]
    if needed is not None:
        names = sorted({name for table in tables for name in table.column_names})
        has_ids = not text_columns or not {*text_columns}.isdisjoint(names)
        unwanted = checks.row_indexes(names, [*text_columns, *needed], findings) if has_ids else []
        tables = [table.drop_columns([name for name in unwanted if name in table.column_names]) for table in tables]
    with same_columns(files, [table.column_names for table in tables], what):
        table = pa.concat_tables(_one_type(tables, text_columns), promote_options="permissive")
    if not table.num_rows:
        raise DataError(
            f"the {what} table {files[0]} has no rows", "at least one row", "check the export it comes from"
        )
    return _plain_strings(table, text_columns, findings)


@contextmanager
def same_columns(files: Sequence[Path], columns: Sequence[Sequence[str]], what: str) -> Iterator[None]:
    """Join files of one table that have these columns.

    Raises
    ------
    SchemaError
        A file has other columns than the first, a column twice, or a column of another type.
    """
    for file, names in zip(files, columns, strict=True):
        require_distinct(file, names)
        if different := sorted(set(names) ^ set(columns[0])):
            raise SchemaError(
                f"{file} and {files[0]} differ in columns {different}", f"{what} files with the same columns"
            )
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SchemaError(f"the {what} files disagree on a type ({error})", "one type per column") from error


def expand(paths: Paths, what: str) -> list[Path]:
    """Return the files behind paths, patterns and folders, each once: a file named twice has no event twice.

    Raises
    ------
    DataError
        No file, or a pattern or folder of a Delta Lake table.
    """
    sources = [paths] if isinstance(paths, str | Path) else list(paths)
    files: list[Path] = []
    for path in map(Path, sources):
        if path.is_file():
            files.append(path)
            continue
        matches = files_in(path, _KNOWN) if path.is_dir() else files_of(str(path), _KNOWN)
        if not matches:
            tables = (file for file in path.rglob("*") if file.name.endswith(_KNOWN))
            deeper = next((file for file in tables if not is_hidden(file.relative_to(path))), None)
            cure = f"pass the pattern '{path}/**/*{deeper.suffix}'" if deeper else "check the path or the pattern"
            place = f"in {path} itself, whose subfolders hold some" if deeper else f"at {path}"
            raise DataError(f"no {what} file {place}", "a parquet, csv or json-lines file", cure)
        files += matches
    if not files:
        raise DataError(f"no {what} file was named", "at least one path")
    once: dict[Path, Path] = {}
    for file in files:
        once.setdefault(file.resolve(), file)
    if repeated := len(files) - len(once):
        log.warning(f"{repeated} of the {what} files are named twice; each is read once")
    return list(once.values())


@contextmanager
def translate_parquet_errors(file: str | Path) -> Iterator[None]:
    """Explain why a parquet file of events cannot be read.

    Raises
    ------
    DataError
        It is damaged, or no parquet.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        found = f"{file} cannot be read ({error})"
        raise DataError(found, "interactions as complete parquet", "write or copy the file again") from error


def parquet_rows(files: Sequence[Path]) -> int:
    """Return the number of rows in parquet files; 0 for others, or if one cannot be read: reading it raises."""
    if not all(file.name.endswith(PARQUET_SUFFIXES) for file in files):
        return 0
    try:
        return sum(int(pq.read_metadata(file).num_rows) for file in files)
    except (pa.ArrowException, OSError):
        return 0


def require_column(table: pa.Table, name: str, what: str, option: str) -> pa.ChunkedArray:
    """Return a column; the error lists the columns of the table and the option that selects another one.

    Raises
    ------
    SchemaError
        The table lacks the column.
    """
    _require(table.column_names, name, f"the {what} table", option)
    return table[name]


def require_event_columns(
    columns: Sequence[str], names: Iterable[str], what: str = "the interactions table", *, added: bool = False
) -> None:
    """Refuse events that lack one of the columns ``names`` of user, item and time, in this order.

    Parameters
    ----------
    columns, names : str
    what : str
        The table, for the error.
    added : bool
        To a data folder, which keeps the names of its first run.

    Raises
    ------
    SchemaError
        One is missing.
    """
    for name, option in zip(names, ("--user-column", "--item-column", "--time-column"), strict=True):
        _require(columns, name, what, "" if added else option)


def require_distinct(file: Path, columns: Sequence[str]) -> None:
    """Refuse a table that has a column twice.

    Raises
    ------
    SchemaError
        It has.
    """
    if len(set(columns)) < len(columns):
        raise SchemaError(f"{file} has columns {list(columns)}", "every name once", "rename one, or drop it")


def _require(columns: Sequence[str], name: str, what: str, option: str) -> None:
    if name not in columns and not option:
        raise SchemaError(
            f"{what} has columns {list(columns)}", f"a column {name!r}, as in the first run", "rename yours"
        )
    if name not in columns:
        near = difflib.get_close_matches(name, columns, 1)
        index = checks.row_indexes(columns, (), Findings())
        hint = f", for example {option} {shlex.quote((near or index)[0])}" if near or index else ""
        hint += ", the index that pandas wrote" if index and not near else ""
        raise SchemaError(
            f"{what} has columns {list(columns)}", f"a column {name!r}", f"name yours with {option}{hint}"
        )


def _read_file(file: Path, what: str, text_columns: Sequence[str]) -> pa.Table:
    if file.name.endswith(_KNOWN) and not file.stat().st_size:
        raise DataError(f"{file} has no bytes", f"{what} with at least one row", "write or copy the file again")
    if file.name.endswith(JSON_LINES):
        return read_all(file, text_columns)
    try:
        if file.name.endswith(PARQUET_SUFFIXES):
            return pq.ParquetFile(file).read()
        if file.name.endswith(_CSV):
            parse = pacsv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True)
            convert = pacsv.ConvertOptions(
                column_types=dict.fromkeys(text_columns, pa.string()), strings_can_be_null=True, null_values=[""]
            )
            table = pacsv.read_csv(file, parse_options=parse, convert_options=convert)
            return table.rename_columns(table.column_names)  # decodes the names
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        utf8 = "invalid UTF8" in str(error) or isinstance(error, UnicodeDecodeError)
        cure = "convert it to UTF-8, for example with iconv" if utf8 else "write or copy the file again"
        raise DataError(f"{file} cannot be read ({error})", f"{what} as whole parquet or csv", cure) from error
    raise DataError(f"{file} is of an unknown kind", f"a file ending in one of {_KNOWN}", "convert it")


def _delimiter(file: Path) -> str:
    """Return the delimiter of a csv file: a comma, or ; tab | where the first line has no comma."""
    if ".tsv" in file.name:
        return "\t"
    with pa.input_stream(str(file), compression="detect") as stream:
        first = stream.read(1 << 16).partition(b"\n")[0]
    return next((sign for sign in ",;\t|" if sign.encode() in first), ",")


def _one_type(tables: list[pa.Table], id_columns: Sequence[str]) -> list[pa.Table]:
    """Cast an id column to text where one file has integers and another one texts, which have to be UTF-8."""
    tables = list(tables)
    for name in id_columns:
        kinds = {table[name].type for table in tables if name in table.column_names}
        has_text = any(kind in TEXT_TYPES for kind in kinds)
        if len(kinds) < 2 or not has_text or any(pa.types.is_floating(kind) for kind in kinds):
            continue
        for index, table in enumerate(tables):
            if name in table.column_names:
                if table[name].type in TEXT_TYPES:
                    require_utf8(table[name], name)
                tables[index] = with_column(table, name, table[name].cast(pa.string()))
    return tables


def _plain_strings(table: pa.Table, ids: Sequence[str], findings: Findings) -> pa.Table:
    """Decode dictionaries, cast all texts to one Arrow type and repair those that are not UTF-8."""
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.type in TEXT_TYPES:  # pyarrow reads csv text that is not UTF-8 as binary
            if is_utf8(column):
                column = column.cast(pa.string())
            elif name not in ids:
                texts, broken = repaired(column)
                checks.note_repaired(findings, name, len(broken))
                column = pa.chunked_array([pa.array(texts, pa.string())])
        columns.append(column)
    return pa.table(columns, names=table.column_names).combine_chunks()
