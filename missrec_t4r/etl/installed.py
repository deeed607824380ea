"""Whether NVTabular is installed, and the error of what needs it: sessions are built without it as well."""

from __future__ import annotations

import importlib.util

from missrec_t4r.errors import ConfigError


def has_nvtabular() -> bool:
    """Whether NVTabular can be imported; it is not imported."""
    return importlib.util.find_spec("nvtabular") is not None


def has_cudf() -> bool:
    """Whether cuDF can be imported; it is not imported, and needs a GPU to be of use."""
    return importlib.util.find_spec("cudf") is not None


def require_nvtabular(what: str, otherwise: str) -> None:
    """Refuse what only NVTabular does, where it is not installed.

    Parameters
    ----------
    what : str
        What was asked for, such as ``--engine memory``.
    otherwise : str
        What to do without it.

    Raises
    ------
    ConfigError
        NVTabular is not installed.
    """
    if not has_nvtabular():
        raise ConfigError(
            f"{what}, and NVTabular is not installed",
            "an environment with Merlin (Python 3.10 or 3.11)",
            f"pip install 'missrec-t4r[merlin]', or {otherwise}",
        )
