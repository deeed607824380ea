"""Steps on numbers: what serving computes of a request is what the workflow computed of an event, and back."""

from __future__ import annotations

import numpy as np
import pytest

from missrec_t4r.data.number_steps import apply_steps, as_steps, invert_steps
from missrec_t4r.errors import DataError

STEPS = as_steps([["fill", 3.0], ["clip", 0.0, 100.0], ["log1p"], ["standardise", 1.5, 0.5]])


def test_steps_are_applied_in_their_order() -> None:
    numbers = apply_steps(STEPS, np.array([np.nan, -4.0, 7.0, 1e6]))
    np.testing.assert_allclose(numbers, (np.log1p([3.0, 0.0, 7.0, 100.0]) - 1.5) / 0.5)


def test_undone_from_the_last_to_the_first_they_give_the_number_back() -> None:
    numbers = np.array([0.0, 0.25, 7.0, 100.0])
    np.testing.assert_allclose(invert_steps(STEPS, apply_steps(STEPS, numbers)), numbers, atol=1e-12)


@pytest.mark.parametrize("step", [[], ["sqrt"], ["fill"], ["clip", 1.0]])
def test_unknown_steps_are_refused(step: list[object]) -> None:
    with pytest.raises(DataError, match="on a number"):
        as_steps([step])
