"""An interpreter that finds the base dependencies alone, as after a plain ``pip install missrec-t4r``."""

import json

from tests.project.packages import ROOT

BARE = """
import importlib, importlib.metadata as metadata, json, re, sys
from importlib.machinery import PathFinder
from packaging.requirements import Requirement

def closure(names):
    seen, todo = set(), list(names)
    while todo:
        requirement = Requirement(todo.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            extras = requirement.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(text)
    return {name for name, *_ in seen}

base = json.loads(sys.argv[1])
kept = closure(base)
absent = {
    top for top, owners in metadata.packages_distributions().items()
    if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & kept
} - {"missrec_t4r"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)

for name in [name for name in sys.modules if name.partition(".")[0] in absent]:
    del sys.modules[name]
sys.meta_path[:] = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
for name in ("nvtabular", "merlin", "transformers4rec", "dask", "distributed", "pytriton"):
    assert importlib.util.find_spec(name) is None, name
"""
"""Hides from the running interpreter every package that the base dependencies, its first argument, do not pull in."""


def base_dependencies() -> str:
    """Return the base dependencies of this checkout, as the argument of `BARE`."""
    import tomllib  # from Python 3.11 on

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return json.dumps(declared["dependencies"])
