"""YAML as people write it: `1e-3` is a number, as in YAML 1.2, JSON and Python.

PyYAML reads YAML 1.1, in which a number with an exponent needs a point and a sign (`1.0e-3`); else it is a text.
"""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers as in YAML 1.2."""


_Loader.add_implicit_resolver(  # after PyYAML's own, so that what these know stays as it is
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str | bytes) -> Any:
    """Return the content of a YAML text.

    Raises
    ------
    yaml.YAMLError
        The text is not YAML.

    Examples
    --------
    >>> parse_yaml("{learning_rate: 1e-3, epochs: 10}")
    {'learning_rate': 0.001, 'epochs': 10}
    """
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except (ValueError, RecursionError) as error:  # a date that does not exist, such as 2026-13-45; deep nesting
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()
