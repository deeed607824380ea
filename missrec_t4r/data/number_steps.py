"""Numeric operators of an NVTabular workflow as data: serving applies them to the numbers of a request.

A step is a list of its name and its constants, as `session_transform.json` holds it:

``["fill", v]``             v where the number is missing
``["clip", low, high]``     the nearest number in [low, high]; None is no bound
``["log1p"]``               log(1 + x)
``["standardise", m, d]``   (x - m) / d
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from missrec_t4r.errors import DataError

Step = tuple[Any, ...]
"""Name and constants."""
Numbers = npt.NDArray[np.floating[Any]]


def as_steps(content: Sequence[Sequence[Any]]) -> tuple[Step, ...]:
    """Return steps as they are read from JSON, checked.

    Raises
    ------
    DataError
        A step of another name or with other constants.
    """
    steps = tuple(tuple(step) for step in content)
    for step in steps:
        if not step or step[0] not in _CONSTANTS or len(step) != _CONSTANTS[step[0]] + 1 or not _are_numbers(step):
            raise DataError(
                f"the step {list(step)} on a number", f"one of {', '.join(_CONSTANTS)}", "re-run missrec etl"
            )
    return steps


def apply_steps(steps: Sequence[Step], numbers: Numbers) -> Numbers:
    """Return the numbers after all steps; NaN is a missing one.

    Examples
    --------
    >>> apply_steps([("fill", 0.0), ("clip", None, 7.0), ("log1p",)], np.array([np.nan, 9.0])).round(2).tolist()
    [0.0, 2.08]
    """
    for name, *constants in steps:
        if name == "fill":
            numbers = np.where(np.isnan(numbers), constants[0], numbers)
        elif name == "clip":
            numbers = np.clip(numbers, *constants) if constants != [None, None] else numbers
        elif name == "log1p":
            numbers = np.log1p(numbers)
        else:
            numbers = (numbers - constants[0]) / constants[1]
    return numbers


def invert_steps(steps: Sequence[Step], numbers: Numbers) -> Numbers:
    """Return numbers that the steps turn into these; what was filled in or clipped cannot be recovered.

    Examples
    --------
    >>> invert_steps([("log1p",), ("standardise", 1.0, 2.0)], np.array([0.0])).round(3).tolist()
    [1.718]
    """
    for name, *constants in reversed(steps):
        if name == "log1p":
            numbers = np.expm1(numbers)
        elif name == "standardise":
            numbers = numbers * constants[1] + constants[0]
    return numbers


def _are_numbers(step: Step) -> bool:
    """Whether a step's constants are finite numbers; a bound of ``clip`` may be missing."""
    name, *constants = step
    if name == "clip":
        constants = [bound for bound in constants if bound is not None]
    finite = all(isinstance(constant, (int, float)) and math.isfinite(constant) for constant in constants)
    return finite and (name != "standardise" or constants[1] != 0)


_CONSTANTS = {"fill": 1, "clip": 2, "log1p": 0, "standardise": 2}
