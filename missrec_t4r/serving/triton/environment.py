"""Requirements of the embedded Triton server on this machine, checked before anything is started.

`nvidia-pytriton` contains a real ``tritonserver`` with the Python backend and one *stub* per Python version, the
process that runs a Python model. Its pitfalls: the stub must lie in the backend's folder, it ignores ``PYTHONPATH``
(this package must be installed), it needs a shared libpython, and numpy 2 silently corrupts tensors.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from missrec_t4r.errors import ServingError

_OLDEST_GLIBC = (2, 35)
_STUB = "triton_python_backend_stub"
_CONTAINER = "or serve with Triton's container image: docker compose up"


@dataclass(frozen=True)
class EmbeddedTriton:
    """Location of the server in the installed `nvidia-pytriton`."""

    server: Path
    """Folder ``pytriton/tritonserver``."""
    stub: Path
    """Stub executable for the running Python version."""

    @classmethod
    def find(cls) -> EmbeddedTriton:
        """Locate the server and check the requirements.

        Raises
        ------
        ServingError
            `nvidia-pytriton` is missing, or Python, numpy, libpython or the C library are unsuitable.
        """
        check_libc(*platform.libc_ver())
        spec = importlib.util.find_spec("pytriton")
        if spec is None or not spec.submodule_search_locations:
            raise ServingError(
                "the embedded Triton server is not installed",
                "the package nvidia-pytriton",
                f"pip install 'missrec-t4r[triton]', {_CONTAINER}",
            )
        check_numpy(np.__version__)
        server = Path(next(iter(spec.submodule_search_locations))) / "tritonserver"
        return cls(server, find_stub(server, sys.version_info[:2]))

    @property
    def binary(self) -> Path:
        """Executable of the server."""
        return self.server / "bin" / "tritonserver"

    def backends(self, folder: Path) -> Path:
        """Assemble a backend folder, the Python backend with the stub beside it, and return its path."""
        target = folder / "backends" / "python"
        shutil.copytree(self.server / "backends" / "python", target, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(self.stub, target / _STUB)
        (target / _STUB).chmod(0o755)
        return target.parent

    def environment(self) -> dict[str, str]:
        """Return the server's environment variables: this Python first on PATH, the library path with both libraries.

        ``OMP_WAIT_POLICY=passive``: threads of a ranker sleep while they wait for each other; spinning threads would
        take the core from clients and server.
        """
        libraries = [
            str(sysconfig.get_config_var("LIBDIR") or ""),
            str(self.server.parent.parent / "nvidia_pytriton.libs"),
        ]
        inherited = os.environ.get("LD_LIBRARY_PATH", "")
        return (
            {"OMP_WAIT_POLICY": "passive"}
            | os.environ
            | {
                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
                "LD_LIBRARY_PATH": os.pathsep.join(part for part in [*libraries, inherited] if part),
            }
        )


def check_libc(name: str, version: str) -> None:
    """Refuse a C library that is older than the one the server was built for, or another one.

    Raises
    ------
    ServingError
        It is not glibc 2.35 or newer.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name != "glibc" or numbers < _OLDEST_GLIBC:
        found = f"C library {name} {version}".strip() if name else "no GNU C library"
        raise ServingError(
            f"{found} on {platform.system()}",
            "Linux with glibc 2.35 or newer (Debian 12, Ubuntu 22.04)",
            f"use a newer distribution, {_CONTAINER}",
        )


def check_numpy(version: str) -> None:
    """Refuse numpy 2: with it the Python backend reads zeros and writes empty tensors without any error.

    Raises
    ------
    ServingError
        The version is 2 or newer.
    """
    if int(version.split(".")[0]) >= 2:
        raise ServingError(f"numpy {version}", "numpy below 2 for the embedded server", "pip install 'numpy<2'")


def find_stub(server: Path, python: tuple[int, int]) -> Path:
    """Return the stub for a Python version.

    Raises
    ------
    ServingError
        The package has no stub for it, or this Python was built without a shared library.
    """
    version = "{}.{}".format(*python)
    stubs = server / "python_backend_stubs"
    stub = stubs / version / _STUB
    if not stub.is_file():
        supported = sorted((entry.name for entry in stubs.glob("3.*")), key=lambda name: int(name[2:]))
        raise ServingError(
            f"Python {version} has no stub in the installed nvidia-pytriton",
            f"one of Python {', '.join(supported) or 'none found'}",
            f"make the environment with another Python, {_CONTAINER}",
        )
    library = str(sysconfig.get_config_var("INSTSONAME") or "")
    if ".so" not in library or not _loadable(library):
        raise ServingError(
            f"Python {version} comes without a shared libpython ({library or 'none named'})",
            f"libpython{version}.so",
            f"install your distribution's libpython{version}, or build Python with --enable-shared",
        )
    return stub


def _loadable(library: str) -> bool:
    for path in (Path(str(sysconfig.get_config_var("LIBDIR"))) / library, Path(library)):
        try:
            ctypes.CDLL(str(path))
        except OSError:
            continue
        return True
    return False


def reason_in(log: str) -> str:
    r"""Extract the reason of a failure from a Triton log: the last exception of a model, else its last error lines.

    Examples
    --------
    >>> reason_in("I0101 pinned\nUNAVAILABLE: Internal: BundleError: items.parquet is missing\n\nAt:\n  model.py(9)")
    'BundleError: items.parquet is missing'
    """
    exceptions = re.findall(r"Internal: ((?:\w+\.)*\w*(?:Error|Exception): .+)", log)
    if exceptions:
        return str(exceptions[-1]).strip()
    errors = re.findall(r"^E\d{4} \S+ \d+ \S+\] \"?(.+?)\"?$", log, flags=re.MULTILINE)
    lines = errors or [line for line in log.splitlines() if line.strip()]
    return " | ".join(line.strip() for line in lines[-3:]) or "the log is empty"
