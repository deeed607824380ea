"""The pins, the loose bounds they must lie within, and the interpreter's check before anything is installed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from requirements import check_platform
from tests.project.packages import ROOT, imports, modules

DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETS = {"b": ("set-b.txt", "merlin-b.txt"), "a": ("set-a.txt",)}


def _lines(name: str) -> list[Requirement]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


def _pins(names: tuple[str, ...]) -> dict[str, str]:
    pins: dict[str, str] = {}
    for requirement in (requirement for name in names for requirement in _lines(name)):
        if (exact := re.fullmatch(r"==([\w.]+)", str(requirement.specifier))) is not None:
            pins[canonicalize_name(requirement.name)] = exact[1]
    return pins


@pytest.mark.parametrize("name", ["set-b.txt", "merlin-b.txt", "set-a.txt", "floor.txt"])
def test_every_requirement_is_an_exact_pin_and_stands_once(name: str) -> None:
    lines = _lines(name)
    assert len(_pins((name,))) == len(lines)
    assert len(lines) >= 6


@pytest.mark.parametrize("which", SETS)
def test_declared_bounds_admit_the_pins(which: str) -> None:
    pins = _pins(SETS[which])
    extras = DECLARED["optional-dependencies"]
    declared = [Requirement(text) for lines in (DECLARED["dependencies"], *extras.values()) for text in lines]
    lint = {"pre-commit", "mypy", "ruff", "types-pyyaml", "check-jsonschema"}
    tools = lint | {"mkdocs-material", "mkdocstrings"} if which == "a" else set()
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        if name not in tools:  # linting and the documents' site run on the default set only
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not admit {pins.get(name)}"


def test_lower_bounds_of_the_core_are_the_versions_that_make_test_floor_installs() -> None:
    pins = _pins(("floor.txt",))
    for requirement in map(Requirement, DECLARED["dependencies"]):
        (bound,) = requirement.specifier
        found = pins[canonicalize_name(requirement.name)]
        assert (bound.operator, Version(bound.version)) == (">=", Version(found)), f"{requirement}; floor.txt: {found}"


def test_newest_names_what_floor_pins_and_no_version() -> None:
    newest = {canonicalize_name(requirement.name): requirement for requirement in _lines("newest.txt")}
    assert all(not requirement.specifier for requirement in newest.values())
    assert set(newest) <= set(_pins(("floor.txt",)))
    assert {canonicalize_name(Requirement(text).name) for text in DECLARED["dependencies"]} <= set(newest)


def test_the_two_sets_differ_where_they_should() -> None:
    modern, period = _pins(SETS["b"]), _pins(SETS["a"])
    assert modern["pandas"].startswith("2.")
    assert period["pandas"].startswith("1.5.")
    same = ["torch", "numpy", "nvtabular", "transformers4rec", "merlin-core", "merlin-models", "nvidia-pytriton"]
    assert {name: modern[name] for name in same} == {name: period[name] for name in same}


def test_merlin_models_is_there_for_t4rs_helpers_alone() -> None:
    """What docs/t4r_contract.md says of it; `merlin.models.torch` needs a package that no set installs."""
    t4r = Path(str(importlib.util.find_spec("transformers4rec").origin)).parent  # type: ignore[union-attr]  # it is installed
    theirs = {name for file in t4r.rglob("*.py") for name in imports(file) if name.startswith("merlin.models")}
    assert theirs
    assert {name.rpartition(".")[0] or name for name in theirs} <= {"merlin.models.utils"} | {
        f"merlin.models.utils.{module}" for module in ("doc_utils", "misc_utils", "registry")
    }
    assert {name for file in modules().values() for name in imports(file) if name.startswith("merlin.models")} == set()
    assert not [name for pins in SETS.values() for name in _pins(pins) if name in ("lightning", "pytorch-lightning")]


def test_declared_pythons_are_those_of_the_recorded_runs() -> None:
    """Python 3.11 by ``make test``; others by a result of ``make test-floor`` or ``make test-newest``."""
    listed = {found[1] for text in DECLARED["classifiers"] if (found := re.search(r"Python :: (3\.\d+)$", text))}
    ran = {"3.11"}
    for file in (ROOT / "benchmarks" / "results").glob("*-*.json"):
        if re.search(r"-(floor|newest[\w.-]*)\.json$", file.name):
            result = json.loads(file.read_text(encoding="utf-8"))
            assert result["failed"] == 0, f"{file.name}: {result['failing']}"
            ran.add(result["versions"]["python"].rpartition(".")[0])
    assert listed == ran


def test_the_base_does_not_cap_python() -> None:
    assert DECLARED["requires-python"] == ">=3.10"
    assert all("3.12" in line for line in DECLARED["optional-dependencies"]["merlin"])


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("sys.version_info", (3, 12, 1), "Python 3.11"),
        ("platform.system", lambda: "Darwin", "Linux on x86_64"),
        ("platform.machine", lambda: "aarch64", "Linux on x86_64"),
        ("platform.libc_ver", lambda: ("glibc", "2.31"), "glibc 2.35"),
        ("platform.libc_ver", lambda: ("", ""), "glibc 2.35"),
        ("has_shared_library", lambda: False, "shared library"),
    ],
)
def test_an_unsuitable_machine_is_named(
    attribute: str, value: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"requirements.check_platform.{attribute}", value)
    complaint = check_platform.complaint()
    assert complaint is not None
    found, expected, cure = complaint
    assert words in expected
    assert found
    assert cure


def test_this_machine_is_suitable() -> None:
    assert check_platform.complaint() is None


def test_make_without_the_right_python_says_what_to_do_and_leaves_nothing(tmp_path: Path) -> None:
    command = ["make", "demo", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-such-python was not found" in done.stderr
    assert "expected: Python 3.11" in done.stderr
    assert "PYTHON=/path/to/python3.11" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_make_leaves_an_environment_alone_that_it_did_not_make(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("somebody's own")
    command = ["make", "install", f"PYTHON={sys.executable}", f"VENV={tmp_path}"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "exists, but not by this Makefile" in done.stderr
    assert (tmp_path / "pyvenv.cfg").read_text() == "somebody's own"
