"""``missrec compare``: `missrec_t4r.comparison.compare`, with a verdict as exit code."""

from __future__ import annotations

from functools import wraps
from typing import Any

from missrec_t4r.comparison.compare import compare as compared
from missrec_t4r.comparison.verdict import REFUSED
from missrec_t4r.errors import GateError


@wraps(compared)
def compare(*systems: Any, **options: Any) -> dict[str, Any]:
    """Compare systems on the same users, and say whether to ship the candidate: exit code 3 for "do not ship".

    Raises
    ------
    GateError
        The verdict is "do not ship". The files are written.
    """
    result = compared(*systems, **options)
    if not options.get("dry_run") and result["verdict"]["decision"] == REFUSED:
        violated = [check for check in result["verdict"]["gate"] if not check["passed"]]
        bounds = "; ".join(f"{check['measure']} is {check['value']}, bounds {check['bounds']}" for check in violated)
        raise GateError(
            result["verdict"]["summary"] + (f" ({bounds})" if bounds else ""),
            "every measure within its bounds" if bounds else "a difference that is not below zero",
            f"look at {result['page']}" if "page" in result else "",
            result=result,
        )
    return result
