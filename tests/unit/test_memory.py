"""Memory that a training no longer uses."""

import platform
import subprocess
import sys

import pytest

BETWEEN = """
import resource

from missrec_t4r.training.memory import release_freed_memory

def resident():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

blocks = [bytearray(100_000) for _ in range(2000)]
last = blocks.pop()  # what lies below it stays with the process
blocks.clear()
before = resident()
release_freed_memory()
print(before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is of glibc")
def test_memory_between_what_is_used_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", BETWEEN], capture_output=True, text=True, check=True)
    assert float(done.stdout) > 100, "MiB of some 190"
