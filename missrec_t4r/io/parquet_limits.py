"""What a parquet file really holds, read from its pages before Arrow decodes any: rows, values, decoded bytes.

The sizes in the footer are claims. 68 kilobytes can hold forty million rows (one run-length for all), a page a thousand
times its size, a dictionary one long text that every row repeats. A page's own header cannot lie: Arrow decodes as many
values and bytes as it states. So the headers of all pages are read, and their numbers bound what decoding takes.
"""

from __future__ import annotations

import os
import struct
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r.io.thrift import CompactReader, Struct

_MOST_FOOTER = 16 << 20
"""Most bytes of a footer: schema, and position of every column chunk."""
_MOST_COLUMNS = 10_000
_DEEPEST = 8
"""Groups within groups; a list of texts has two."""
_MOST_VALUES = 2_000_000
"""Values that are read of a footer."""
_MOST_HEADER = 64 << 10
"""Most bytes of a page's header; statistics in it are short."""
_VALUE = 16
"""Bytes of a value in Arrow's memory, beside its text: a number, or offset, validity and levels of a list."""
_CODECS = {"UNCOMPRESSED": 1, "SNAPPY": 32}
"""Compressions that are accepted, and by how much at most they shrink: nothing of ours writes another."""
_MOST_DICTIONARY = 16 << 20
"""Most bytes of a dictionary; Arrow begins a new page at one megabyte."""
_EXTENSION = b"ARROW:extension"
_DICTIONARY_ENCODINGS, _PLAIN_ENCODINGS = (2, 8), (0, 3)


class Contents(NamedTuple):
    """What decoding a file takes."""

    rows: int
    plain_bytes: int
    """Upper bound of the decoded bytes without the texts that dictionaries repeat."""
    repeated_bytes: dict[str, int]
    """Path of a column in the schema, such as ``market.list.element`` -> upper bound of its texts that dictionaries
    repeat: as if every one were the longest."""


def inspect(file: Path) -> Contents:
    """Read what a file holds without decoding a value.

    Raises
    ------
    ValueError
        The file is not parquet, contradicts itself, is compressed in another way than ours, or exceeds a limit.
    """
    _check_schema(file)
    try:
        metadata = pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"is not parquet ({error})") from error
    if sum(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)) != metadata.num_rows:
        raise ValueError("has row groups of other lengths than it states")
    plain_bytes, repeated_bytes = 0, Counter[str]()
    with file.open("rb") as stream:
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                plain, repeated = _chunk_bytes(stream, column, metadata.schema.column(index).length)
                plain_bytes += plain
                repeated_bytes[column.path_in_schema] += repeated
    return Contents(metadata.num_rows, plain_bytes, repeated_bytes)


def decoded_bytes(file: Path, contents: Contents, most: int) -> int:
    """Return an upper bound of the bytes that reading a file takes; more than ``most`` if it may take more.

    Where the longest text of every dictionary is too coarse a bound, columns are read as numbers of their dictionary.
    """
    total, repeated = contents.plain_bytes, contents.repeated_bytes
    if total > most:
        return total
    if total + sum(repeated.values()) > most:
        repeated = {column: _repeated_bytes(file, column, bound) for column, bound in repeated.items() if bound}
    return total + sum(repeated.values())


def _repeated_bytes(file: Path, column: str, bound: int) -> int:
    """Return the bytes of a column's texts, none of which is decoded; ``bound`` where Arrow cannot do that."""
    try:
        chunks = pq.ParquetFile(file, read_dictionary=[column]).read(columns=[column]).column(0).chunks
    except pa.ArrowNotImplementedError:  # lists with more than one dictionary
        return bound
    total = 0
    for values in chunks:
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = values.flatten()
        if not pa.types.is_dictionary(values.type):
            return bound
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        total += pc.sum(lengths.take(values.indices)).as_py() or 0
    return total


def _check_schema(file: Path) -> None:
    """Refuse a footer or a schema beyond the limits; Arrow would follow its nesting by recursion."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size < 12 or stream.read(4) != b"PAR1":
            raise ValueError("is not parquet (its first bytes are others)")
        stream.seek(size - 8)
        length, magic = struct.unpack("<I4s", stream.read(8))
        if magic != b"PAR1" or not 0 < length <= min(_MOST_FOOTER, size - 12):
            raise ValueError(f"is not parquet (a footer of {length} bytes)")
        stream.seek(size - 8 - length)
        footer = CompactReader(stream.read(length), _MOST_VALUES).struct()
    for entry in footer.get(5, []):  # an extension type may run code of its own when Arrow reads the schema
        if isinstance(entry, dict) and entry.get(1) == b"ARROW:schema" and _EXTENSION in b64decode(entry.get(2, b"")):
            raise ValueError("has a column of an extension type")
    elements = footer.get(2, [])
    if not isinstance(elements, list) or not 0 < len(elements) <= _MOST_COLUMNS:
        raise ValueError(f"has a schema of more than {_MOST_COLUMNS} columns, or none")
    if (depth := _depth(elements)) > _DEEPEST:
        raise ValueError(f"has columns nested {depth} deep, at most {_DEEPEST}")


def _depth(elements: list[Struct]) -> int:
    """Return how deep the groups of a schema stand in each other; its elements are listed depth first."""
    deepest, left = 0, [1]  # elements that are still to come, at every level
    for element in elements:
        while left and left[-1] == 0:
            left.pop()
        if not left:
            raise ValueError("has more columns than its schema states")
        left[-1] -= 1
        children = element.get(5, 0)
        if not isinstance(children, int) or not 0 <= children <= len(elements):
            raise ValueError(f"has a group of {children!r} columns")
        if children:
            left.append(children)
            deepest = max(deepest, len(left) - 1)
    return deepest


def _chunk_bytes(stream: BinaryIO, column: pq.ColumnChunkMetaData, fixed_length: int) -> tuple[int, int]:
    """Return the bounds of `Contents` for one column in one row group, as its pages state it."""
    name, is_text = column.path_in_schema, column.physical_type == "BYTE_ARRAY"
    if column.compression not in _CODECS:
        raise ValueError(f"has a column {name!r} compressed by {column.compression}")
    start = column.data_page_offset
    if column.has_dictionary_page and column.dictionary_page_offset:
        start = min(start, column.dictionary_page_offset)
    values = 0  # with missing ones, of lists every element
    stored = 0  # bytes of dictionaries and of texts in plain pages: an upper bound of what they decode to
    repeated = longest = 0  # values that stand for texts of a dictionary; bytes of its longest text
    for header, place in _pages(stream, start, column.total_compressed_size, _CODECS[column.compression]):
        if 7 in header:  # a dictionary page
            stored += header[2]
            if is_text:
                stream.seek(place)
                longest = max(longest, _longest(stream.read(header[3]), header[2], column.compression))
            continue
        page, encoding_field = (header.get(5), 2) if 5 in header else (header.get(8), 4)
        if not isinstance(page, dict) or not isinstance(page.get(1), int) or page[1] < 0:
            raise ValueError(f"has a page of an unknown kind in column {name!r}")
        values += page[1]
        encoding = page.get(encoding_field)
        if is_text and encoding in _DICTIONARY_ENCODINGS:
            repeated += page[1]
        elif is_text and encoding in _PLAIN_ENCODINGS:
            stored += header[2]
        elif is_text:  # such as one that stores what two neighbouring texts share once
            raise ValueError(f"has a column {name!r} of texts in encoding {encoding}")
    if values != column.num_values:
        raise ValueError(f"has {values} values in column {name!r} and states {column.num_values}")
    return values * max(_VALUE, fixed_length) + stored, repeated * longest


def _longest(page: bytes, unpacked: int, codec: str) -> int:
    """Return the length of the longest text in a dictionary page, which holds length and text in turn."""
    if unpacked > _MOST_DICTIONARY:
        raise ValueError(f"has a dictionary of {unpacked} bytes, at most {_MOST_DICTIONARY}")
    try:
        content = page if codec == "UNCOMPRESSED" else pa.decompress(page, unpacked, codec.lower(), asbytes=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"has a damaged dictionary ({error})") from error
    longest = position = 0
    while position + 4 <= len(content):
        length = int.from_bytes(content[position : position + 4], "little")
        longest, position = max(longest, length), position + 4 + length
    if position != len(content):
        raise ValueError("has a dictionary that ends in the middle of a text")
    return longest


def _pages(stream: BinaryIO, start: int, length: int, shrinks: int) -> Iterator[tuple[Struct, int]]:
    """Yield the headers of a column chunk's pages, each with the position of what follows it."""
    end = start + length
    if not 0 < start <= end <= os.fstat(stream.fileno()).st_size:
        raise ValueError("has columns outside the file")
    while start < end:
        stream.seek(start)
        reader = CompactReader(stream.read(min(_MOST_HEADER, end - start)), _MOST_HEADER)
        header = reader.struct()
        stored, unpacked = header.get(3), header.get(2)
        start += reader.position
        if not isinstance(stored, int) or not isinstance(unpacked, int) or not 0 <= stored <= end - start:
            raise ValueError("has a page outside its column")
        if not 0 <= unpacked <= max(shrinks * stored, 64):
            raise ValueError(f"unpacks to {unpacked} bytes from {stored}")
        yield header, start
        start += stored
