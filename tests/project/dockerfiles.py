"""Dockerfiles, read and carried out without a Docker daemon: their steps make a virtual environment, not an image."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests import processes
from tests.project.packages import ROOT


def steps(dockerfile: Path) -> list[tuple[str, str]]:
    """Return instruction and argument of every step, comments left out and continued lines joined."""
    kept = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(kept))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def base_python(dockerfile: Path) -> str:
    """Return the Python of the base image; Triton's images carry Ubuntu's, 3.12 from 24.11 on."""
    text = dockerfile.read_text(encoding="utf-8")
    if (found := re.search(r"=python:(3\.\d+)", text)) is not None:
        return found[1]
    tag = re.search(r"tritonserver:(\d+)\.(\d+)-py3", text)
    assert tag is not None, f"{dockerfile.name}: neither a Python image nor Triton's"
    return "3.12" if (int(tag[1]), int(tag[2])) >= (24, 11) else "3.10"


def build_context(path: str) -> list[Path]:
    """Return the files of the checkout that a ``COPY`` of ``path`` takes: those that git and .dockerignore keep."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = tuple(line[1:] for line in lines if line.startswith("!"))
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    within = [name for name in listed.stdout.splitlines() if any(_lies_in(name, folder) for folder in allowed)]
    found = [Path(name) for name in within if path == "." or _lies_in(name, path.rstrip("/"))]
    return [file for file in found if (ROOT / file).is_file() and not fnmatch.fnmatch(str(file), "*/__pycache__/*")]


def _lies_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


@dataclass
class Environment:
    """Programs that take the place of an image: those of this interpreter, or (`build`) a virtual environment.

    Parameters
    ----------
    folder : Path
        Stands for the root of the image; its absolute paths become paths in it.
    bin : Path
        Folder of the programs.
    variables : dict
        Environment variables of the image.
    names : dict
        More replacements in commands, such as host names.
    is_built : bool
        Nothing of this interpreter's environment variables is passed on.
    """

    folder: Path
    bin: Path
    variables: dict[str, str] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    is_built: bool = False

    @classmethod
    def built(
        cls, folder: Path, python: str, dockerfile: Path, arguments: Mapping[str, str] | None = None
    ) -> Environment:
        """Make a virtual environment of ``python``, the base image's version, by the Dockerfile's own steps."""
        venv = folder / f"venv-{dockerfile.stem}"
        subprocess.run([python, "-m", "venv", str(venv)], check=True)
        made = cls(folder, venv / "bin", is_built=True)
        made._build(dockerfile, arguments or {})
        return made

    def _build(self, dockerfile: Path, arguments: Mapping[str, str]) -> None:
        for word, rest in steps(dockerfile):
            if word == "ARG":
                name, _, default = rest.partition("=")
                self.variables[name] = arguments.get(name, default)
            elif word == "ENV":
                self.variables |= dict(part.split("=", 1) for part in rest.split())
            elif word == "COPY":
                source, target = [part for part in rest.split() if not part.startswith("--")]
                self._copy(source, Path(self.mapped(target)), mode=0o755 if "--chmod=755" in rest else None)
            elif word == "RUN":
                done = self.run(["sh", "-ec", self.mapped(rest)])
                assert done.returncode == 0, f"RUN {rest}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
            else:
                assert word in {"FROM", "WORKDIR", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}, f"unknown step: {word}"

    def mapped(self, text: str) -> str:
        """Replace the image's absolute paths, and `names`, by what stands for them here."""
        for name, local in self.names.items():
            text = text.replace(name, local)
        text = text.replace("/usr/local/bin/", f"{self.bin}/")
        return re.sub(r"(?<![\w.])(/opt/|/input\b|/output\b)", rf"{self.folder}\1", text)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a command with the programs and variables of the environment."""
        foreign = ("PYTHON", "VIRTUAL_ENV", "PYENV") if self.is_built else ()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = {"PATH": f"{self.bin}{os.pathsep}{kept['PATH']}", "OMP_NUM_THREADS": "1"}
        env = kept | self.variables | path
        if command[0] == "missrec" and not self.is_built:
            return processes.run(["-m", "missrec_t4r", *command[1:]], env=env, cwd=self.folder)
        return subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, check=False)

    def _copy(self, source: str, target: Path, mode: int | None) -> None:
        files = build_context(source)
        assert files, f"COPY {source}: .dockerignore leaves nothing of it"
        for file in files:
            inner = file.name if str(file) == source else str(file if source == "." else file.relative_to(source))
            place = target if str(file) == source else target / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, place)
            if mode is not None:
                place.chmod(mode)
