"""Run test files in trees that standard input names, each in a fork of this process, which has imported the libraries.

A line in: ``{"tree": folder, "tests": [...], "output": file, "seconds": limit or null}``; a line out: pytest's exit
code, or null where the limit passed. Importing torch and pytest takes longer than most tests of a mutant. This process
never imports the package, so that each fork imports that of its tree.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pyarrow.parquet  # noqa: F401
import pytest
import rich.progress  # noqa: F401
import safetensors.torch  # noqa: F401
import torch  # noqa: F401
import typer  # noqa: F401

ARGUMENTS = ["-x", "-q", "--tb=no", "-pno:cacheprovider"]


def run(tree: str, tests: list[str], output: str, seconds: float | None) -> int | None:
    """Return pytest's exit code, None where it took longer than ``seconds``."""
    child = os.fork()
    if not child:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = tree
        sys.path[0] = tree  # instead of this file's folder
        code = 3
        try:
            code = int(pytest.main([*ARGUMENTS, *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if seconds is not None and time.monotonic() - started > seconds:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.05)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
