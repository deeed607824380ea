"""Mutants: small patches that each break one behaviour, with the test files that should notice.

``tests/mutants/<package>/<name>.patch`` is a unified diff after two header lines:

    Behaviour: what the patch breaks, in one sentence
    Tests: tests/unit/test_training.py tests/equations/test_item_knn.py
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
_HEADER = re.compile(r"\ABehaviour: (?P<behaviour>\S.*)\nTests: (?P<tests>\S.*)\n(?:diff|---) ")


class Mutant(NamedTuple):
    """One patch."""

    name: str
    """``<package>/<name>``."""
    file: Path
    behaviour: str
    tests: tuple[str, ...]
    """Test files from the checkout's root, or single tests as ``file::test``, in the order in which they run."""
    changes: tuple[str, ...]
    """Files that the patch changes, from the checkout's root."""


def read(file: Path) -> Mutant:
    """Read a patch; raise ValueError where its header is not as above."""
    text = file.read_text(encoding="utf-8")
    name = f"{file.parent.name}/{file.stem}"
    header = _HEADER.match(text)
    if header is None:
        raise ValueError(f"{name}.patch does not begin with the lines 'Behaviour: …' and 'Tests: …' and a diff")
    changes = tuple(re.findall(r"^\+\+\+ b/(\S+)$", text, re.MULTILINE))
    return Mutant(name, file, header["behaviour"], tuple(header["tests"].split()), changes)


def mutants() -> Iterator[Mutant]:
    """Yield all mutants by name."""
    for file in sorted(FOLDER.rglob("*.patch")):
        yield read(file)


def apply(mutant: Mutant, tree: Path) -> str:
    """Apply a patch to a source tree; return git's complaint, empty if there is none."""
    command = ["git", "apply", str(mutant.file)]
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True).stderr.strip()
