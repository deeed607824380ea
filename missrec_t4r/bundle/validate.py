"""Validate the content of a bundle's files: data in the format of its file name, never code.

Checksums detect damage, not manipulation: anybody who can write a bundle can write matching checksums. Therefore every
file is inspected before a library reads it. Nothing is unpickled, nothing is imported by name, no file may be a link or
lie outside the bundle, and no header may claim more bytes than the file has.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import BundleError

MOST_TEXT = 16 << 20
"""Most bytes of a JSON or schema file; exported ones have a few kilobytes."""
MOST_HEADER = 16 << 20
"""Most bytes of a safetensors header."""
MOST_TABLE = 16 << 30
"""Most bytes of the decompressed item table."""
_MOST_PACKED = 1000
"""Largest compression ratio of the item table: a larger one is a decompression bomb."""
_CODE = {b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle"}
_CODE |= {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x7fELF": "a program", b"#!": "a script"}
_CODE |= {b"\x93NUMPY": "a numpy file"}


def check_contents(file: Path) -> None:
    """Refuse a file whose content is not in the format of its name.

    Parameters
    ----------
    file : Path
        A file of a bundle.

    Raises
    ------
    BundleError
        Names the file and the reason.
    """
    if file.is_symlink():
        raise BundleError(f"{file} is a link to {file.readlink()}", "a file within the bundle", "copy the bundle again")
    with file.open("rb") as stream:
        start = stream.read(8)
    for magic, kind in _CODE.items():
        if start.startswith(magic):
            raise BundleError(f"{file} is {kind}", "data that cannot run", "do not load it; export the bundle again")
    check: dict[str, Callable[[Path], None]] = {
        ".json": _json,
        ".pbtxt": _text,
        ".safetensors": _tensors,
        ".parquet": _table,
    }
    check[file.suffix](file)


def _text(file: Path) -> None:
    if file.stat().st_size > MOST_TEXT:
        raise _refused(file, f"has {file.stat().st_size} bytes", f"at most {MOST_TEXT}")


def _json(file: Path) -> None:
    _text(file)
    try:
        json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _refused(file, f"is no JSON ({error})", "JSON") from error


def _tensors(file: Path) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MOST_HEADER, size - 8):
            raise _refused(file, f"claims a header of {length} bytes", f"at most {min(MOST_HEADER, max(size - 8, 0))}")
        try:
            header = json.loads(stream.read(length))
            spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
            ends = [_span(*span) for span in spans]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refused(file, f"has no safetensors header ({error})", "a safetensors file") from error
    if max(ends, default=0) != size - 8 - length:
        raise _refused(file, f"claims {max(ends, default=0)} bytes of tensors", f"the {size - 8 - length} that it has")


def _span(start: Any, end: Any) -> int:
    if type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError(f"offsets {start!r} to {end!r}")
    return end


def _table(file: Path) -> None:
    try:
        table = pq.ParquetFile(file)
        schema, metadata = table.schema_arrow, table.metadata
        unpacked = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise _refused(file, f"is no parquet ({error})", "a parquet file") from error
    if unpacked > min(MOST_TABLE, _MOST_PACKED * file.stat().st_size):
        raise _refused(file, f"unpacks to {unpacked} bytes", f"at most {_MOST_PACKED} times its size and {MOST_TABLE}")
    for field in schema:
        names = [name for name in field.metadata or {} if name.startswith(b"ARROW:extension")]
        if names or isinstance(field.type, pa.BaseExtensionType):
            raise _refused(file, f"has a column {field.name!r} of an extension type", "plain columns")


def _refused(file: Path, found: str, expected: str) -> BundleError:
    return BundleError(
        f"{file} {found}", expected, "export the bundle again, or copy it again from where it was written"
    )
