"""Refuse a safetensors file that does not hold exactly the expected tensors, or a number that may not be in one.

Shapes are compared before anything is allocated for them, numbers before anything is computed with them: an index of
item rows beyond the catalogue would answer with other items, or make torch allocate gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from missrec_t4r.errors import BundleError
from missrec_t4r.io.tensor_header import StoredTensor, find_wrong_number, read_header

Header = Mapping[str, StoredTensor]
NO_LIMIT = (-math.inf, math.inf)
NOT_NEGATIVE = (0.0, math.inf)


def check_ranges(file: Path, header: Header, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raise `BundleError` for the first number that is NaN, infinite or outside its tensor's limits."""
    for name, tensor in header.items():
        low, high = (0.0, 1.0) if tensor.dtype == "BOOL" else limits.get(name, NO_LIMIT)
        if (wrong := find_wrong_number(file, tensor, low, high)) is None:
            continue
        if not math.isfinite(wrong.value):
            raise refused(file, f"holds NaN or infinity in {name}, row {wrong.row}", "finite numbers")
        expected = f"{low:.0f} to {high:.0f}" if math.isfinite(high) else "no negative number"
        raise refused(file, f"holds {wrong.value:.10g} in {name}, row {wrong.row}", expected)


def header_of(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file by name, without the padding between them."""
    try:
        return {name: tensor for name, tensor in read_header(file).items() if not name.startswith("filling.")}
    except (OSError, ValueError) as error:
        raise refused(file, str(error), "a safetensors file") from error


def compare(file: Path, header: Header, expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `BundleError` unless a file holds exactly the expected tensors, of the expected types and shapes."""
    problems = [f"no {name}" for name in expected if name not in header]
    problems += [f"{name}, which is not expected" for name in header if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name in header and (header[name].dtype, header[name].shape) != (dtype, shape):
            found = header[name]
            problems.append(f"{name} of {found.dtype} {list(found.shape)} instead of {dtype} {list(shape)}")
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise refused(
            file, "holds " + "; ".join(problems[:4]) + more, "the tensors of the model that the bundle describes"
        )


def refused(file: Path, found: str, expected: str) -> BundleError:
    """Return the error about a file of a bundle."""
    return BundleError(
        f"{file} {found}", expected, "export the bundle again, or copy it again from where it was written"
    )
