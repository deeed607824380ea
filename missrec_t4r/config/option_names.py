"""How options of the command line are spelled: like the parameters of its functions, but for a few."""

from __future__ import annotations

from typing import Final

FLAGS: Final = {
    "settings": ("--set",),
    "start_from": ("--from",),
    "warm_start": ("--warm-start", "--continue"),
    "drop_columns": ("--drop-column",),
    "categorical_columns": ("--categorical-column",),
    "alone": ("--no-baselines",),
    "resume": ("--restart",),
    "switch": ("--no-switch",),
    "keep_repeats": ("--keep-repeats/--first-only",),
    "keep_untitled": ("--keep-untitled/--titled-only",),
}
"""Parameter -> options that are not spelled like it, older ones last; the one after a slash stands for False.

Where the parameter is True by default, an option without a slash stands for False too.
"""


def option(parameter: str) -> str:
    """Return the option of a parameter, as errors name it.

    Examples
    --------
    >>> option("k_core"), option("drop_columns")
    ('--k-core', '--drop-column')
    """
    return FLAGS.get(parameter, (f"--{parameter.replace('_', '-')}",))[0]
