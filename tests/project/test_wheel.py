"""The wheel, as a stranger gets it: built from a clean copy, unpacked elsewhere, run from outside the checkout."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.schema import FIRST_ITEM_ROW
from tests import processes
from tests.project.bare import BARE
from tests.project.packages import ROOT, modules, shipped_files
from tests.shop import modality, write_circle

MORE = ("missrec_t4r.etl.nvt", "missrec_t4r.etl.gpu", "missrec_t4r.t4r", "missrec_t4r.export.merlin_systems")
"""The packages and modules that may need more than the base dependencies."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from what git knows or would add, so that leftovers of a build cannot hide an omission."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = _run(["git", "ls-files", "-co", "--exclude-standard", "-z"], ROOT).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():  # a file may be deleted and not yet committed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    _run(build, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command[:6])} ...\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done


def _python(code: str, unpacked: Path, cwd: Path, *arguments: str) -> str:
    """Run code against the unpacked wheel, from a folder that holds nothing of ours."""
    done = _run([sys.executable, *_words(code, unpacked), *arguments], cwd, PYTHONPATH=str(unpacked))
    return done.stdout


def _words(code: str, unpacked: Path) -> list[str]:
    check = f"import missrec_t4r; assert missrec_t4r.__file__.startswith({str(unpacked)!r}), missrec_t4r.__file__\n"
    return ["-c", check + code]


def _base_dependencies(unpacked: Path) -> str:
    (metadata,) = unpacked.glob("*.dist-info/METADATA")
    needed = [line.partition(": ")[2] for line in metadata.read_text().splitlines() if line.startswith("Requires-Dist")]
    return json.dumps([text for text in needed if "extra ==" not in text])


def test_the_wheel_lists_what_the_tree_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    data = [name.partition(".data/data/")[2] for name in names if ".data/" in name]
    assert data == ["etc/dask/missrec-dask.yaml"], "for the environment, where dask reads it"
    listed = {name for name in names if ".data/" not in name}
    expected = set(shipped_files())
    assert expected - listed == set(), (
        "in the tree, not in the wheel: add the package or the file kind to pyproject.toml"
    )
    assert listed - expected == set(), "in the wheel, not in the tree"


def test_the_wheel_carries_licence_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert b"missrec = missrec_t4r.__main__:main" in archive.read(entries)


def test_recipes_and_templates_are_read_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = """
import importlib.resources as resources, json
from missrec_t4r.config import Recipe, shipped_recipes
templates = resources.files("missrec_t4r.triton_models")
print(json.dumps({
    "recipes": [name for name in shipped_recipes() if Recipe.load(name)],
    "configs": sorted(entry.name for entry in templates.iterdir() if entry.joinpath("config.pbtxt").is_file()),
    "templates": str(templates),
}))
"""
    found = json.loads(_python(code, unpacked, tmp_path))
    assert found["recipes"] == sorted(file.stem for file in (ROOT / "missrec_t4r" / "recipes").glob("*.yaml"))
    assert found["configs"] == sorted(file.parent.name for file in (ROOT / "triton_models").glob("*/config.pbtxt"))
    assert found["templates"].startswith(str(unpacked))


def test_every_module_of_the_wheel_imports(unpacked: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtabular", reason="the ETL's modules need the extra merlin")
    names = sorted(modules())
    assert len(names) > 60
    code = "import importlib, sys\nprint(all(importlib.import_module(name) for name in sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = processes.run([*_words(code, unpacked), *names], cwd=tmp_path, env=environment)
    assert done.stdout.strip() == "True", done.stderr


def test_core_and_serving_import_in_a_bare_environment(unpacked: Path, tmp_path: Path) -> None:
    """Only the base dependencies and what they pull in may be imported; everything else installed here is refused."""
    names = [name for name in sorted(modules()) if not name.startswith(MORE)]
    assert {"missrec_t4r.model.missrec", "missrec_t4r.serving.client.client", "missrec_t4r.cli"} <= set(names)
    code = BARE + "for name in sys.argv[2:]: importlib.import_module(name)\nprint(len(sys.argv[2:]))"
    assert int(_python(code, unpacked, tmp_path, _base_dependencies(unpacked), *names)) == len(names)


def test_a_bare_environment_names_the_extra_that_a_command_needs(unpacked: Path, tmp_path: Path) -> None:
    """The command line works without Merlin; what needs it says so in one paragraph."""
    code = (
        BARE
        + """
import contextlib, io
from missrec_t4r.cli import app
for words in sys.argv[2:]:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        sys.argv = ["missrec", *words.split()]
        try:
            app()
        except SystemExit as end:
            print(json.dumps([end.code, said.getvalue()]))
"""
    )
    commands = [
        "catalogue adopt --workflow w --items b.parquet --sessions s --out c",
        "etl --interactions a.parquet --items b.parquet --out c --engine memory",
        "etl --interactions a.parquet --items b.parquet --out c --workflow w.py",
        "bundle merlin --bundle b --data d --out c",
    ]
    told = _python(code, unpacked, tmp_path, _base_dependencies(unpacked), *commands).splitlines()
    for command, (exit_code, said) in zip(commands, map(json.loads, told), strict=True):
        assert exit_code == 2, command
        assert "missrec-t4r[merlin]" in said, command


@pytest.mark.slow
def test_the_wheel_installs_in_a_real_bare_environment(wheel: Path, tmp_path: Path) -> None:
    """The same with a virtual environment that really has nothing else: a download of a few hundred megabytes."""
    environment = tmp_path / "bare"
    _run([sys.executable, "-m", "venv", str(environment)], tmp_path)
    _run([str(environment / "bin" / "python"), "-m", "pip", "install", "-q", str(wheel)], tmp_path)
    names = [name for name in sorted(modules()) if not name.startswith(MORE)]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    _run([str(environment / "bin" / "python"), "-c", code, *names], tmp_path)
    missrec = str(environment / "bin" / "missrec")
    assert "recommend" in _run([missrec, "--help"], tmp_path).stdout
    vectors = np.random.default_rng(0).normal(size=(40 + FIRST_ITEM_ROW, 8))
    data = write_circle(tmp_path / "data", [f"item {row}" for row in range(40)], {"text": modality(vectors)})
    train = [missrec, "train", "--data", str(data), "--out", "run", "--recipe", "tiny", "--device", "cpu"]
    _run(train, tmp_path)
    evaluated = _run([missrec, "evaluate", "--run", "run", "--json"], tmp_path).stdout
    assert "ndcg@10" in evaluated.splitlines()[-1]
    code = """
import missrec_t4r as mr
from missrec_t4r import commands

commands.generate("shop", users=100, items=100)
shop = mr.Shop.from_frames("shop/interactions.parquet", "shop/items.parquet", text="title", folder="work")
print(len(mr.Recommender("tiny", train__epochs=1).fit(shop).recommend(users=["U00001"], k=5)))
"""
    assert _run([str(environment / "bin" / "python"), "-c", code], tmp_path).stdout == "5\n"
