"""Validate the content of a bundle's files: data in the format of its file name, never code.

Checksums detect damage, not manipulation: anybody who can write a bundle can write matching checksums. Therefore every
file is inspected before a library reads it. Nothing is unpickled, nothing is imported by name, no file may be a link or
lie outside the bundle, and no header may claim more bytes than the file has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.errors import BundleError
from missrec_t4r.io.parquet_limits import inspect
from missrec_t4r.io.tensor_checks import header_of, refused

MOST_TEXT = 16 << 20
"""Most bytes of a JSON or schema file; exported ones have a few kilobytes."""
_MOST_BRACKETS = 200_000
"""Most lists and objects of a JSON file: each takes many times the bytes that it has in the file."""
_CODE = {bytes([0x80, protocol]): "a pickle" for protocol in range(2, 6)}
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
    check: dict[str, Callable[[Path], object]] = {
        ".json": _json,
        ".pbtxt": _text,
        ".safetensors": header_of,
        ".parquet": _table,
    }
    check[file.suffix](file)


def _text(file: Path) -> None:
    if file.stat().st_size > MOST_TEXT:
        raise refused(file, f"has {file.stat().st_size} bytes", f"at most {MOST_TEXT}")


def _json(file: Path) -> None:
    _text(file)
    content = file.read_bytes()
    if (brackets := content.count(b"[") + content.count(b"{")) > _MOST_BRACKETS:
        raise refused(file, f"holds {brackets} lists and objects", f"at most {_MOST_BRACKETS}")
    try:
        json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise refused(file, f"is not JSON ({error})", "JSON") from error


def _table(file: Path) -> None:
    try:
        inspect(file)
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise refused(file, str(error), "a parquet file") from error
    for field in schema:
        names = [name for name in field.metadata or {} if name.startswith(b"ARROW:extension")]
        if names or isinstance(field.type, pa.BaseExtensionType):
            raise refused(file, f"has a column {field.name!r} of an extension type", "plain columns")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")
