"""Can this interpreter run the demo? Called by the Makefile before anything is installed; standard library only.

The embedded Triton decides: its binary needs Linux with glibc 2.35, and its Python backend loads the shared library of
this very interpreter. Merlin's last releases need Python 3.10 or 3.11; the pins of requirements/ were taken on 3.11.
"""

import ctypes
import os
import platform
import sys
import sysconfig

GLIBC = (2, 35)


def has_shared_library():
    """Return True where the interpreter's libpython can be loaded, which Triton's Python backend does."""
    name = "libpython{}.{}.so.1.0".format(*sys.version_info[:2])
    folders = [sysconfig.get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib")]
    for candidate in [os.path.join(folder, name) for folder in folders if folder] + [name]:
        try:
            ctypes.CDLL(candidate)
        except OSError:
            continue
        return True
    return False


def complaint():
    """Return what is wrong as (found, expected, what to do), or None."""
    version = platform.python_version()
    if sys.version_info[:2] != (3, 11):
        return (
            f"{sys.executable} is Python {version}",
            "Python 3.11",
            "name the right one: make PYTHON=/path/to/python3.11",
        )
    machine = f"{platform.system()} on {platform.machine()}"
    if machine != "Linux on x86_64":
        return (
            machine,
            "Linux on x86_64, for which the embedded Triton is built",
            "use a container or another machine",
        )
    libc, libc_version = platform.libc_ver()
    numbers = tuple(int(part) for part in libc_version.split(".")[:2]) if libc == "glibc" else ()
    if numbers < GLIBC:
        return (
            f"C library {libc or 'unknown'} {libc_version}".strip(),
            "glibc 2.35 or newer, which the embedded Triton needs",
            "use Debian 12, Ubuntu 22.04 or newer, or a container of one of them",
        )
    if not has_shared_library():
        return (
            f"no libpython3.11.so beside {sys.executable}",
            "a Python with its shared library, which Triton's Python backend loads",
            "install the package libpython3.11, or build Python with --enable-shared",
        )
    return None


if __name__ == "__main__":
    wrong = complaint()
    if wrong:
        sys.exit("{}; expected: {}. {}.".format(*wrong))
