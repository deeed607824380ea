"""docs/howto/nightly.md: its commands are run in order, its gate judges, the Compose service says the same."""

import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from missrec_t4r.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "howto" / "nightly.md").read_text(encoding="utf-8")
ORDER = ["etl", "features", "report", "train", "evaluate", "export"]


def _job() -> list[list[str]]:
    """Return the commands of the document's script, without the word missrec."""
    script = re.search(r"```bash\n(.*?)```", DOCUMENT, re.DOTALL)
    assert script is not None
    lines = [shlex.split(line) for line in script[1].splitlines() if line.startswith("missrec ")]
    return [line[1:] for line in lines]


def _answer(command: list[str]) -> tuple[int, dict[str, Any]]:
    ran = CliRunner().invoke(app, [word.replace("$NIGHT", "work/night") for word in command])
    assert ran.exit_code in (0, 3), ran.output
    answer: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return ran.exit_code, answer


def _content(folder: Path) -> dict[str, str]:
    """Return what every file holds, times of making apart; hidden files and logs are nobody's result."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name in ("log.jsonl", "report.html", ".lock") or "tensorboard" in file.parts:
            continue
        content = file.read_bytes()
        if file.suffix == ".json":
            content = re.sub(rb'"(seconds|made)": ("[^"]*"|[\d.]+|\{[^}]*\})', b"", content)
        found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def _times(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_every_step_of_a_night_can_be_tried_run_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--dry-run`` changes nothing; a command that is run twice leaves the files of one run."""
    monkeypatch.chdir(tmp_path)
    shop = ["generate", "--out", "events", "--users", "120", "--items", "100"]
    first = _answer(shop)
    made = _content(tmp_path)
    assert (_answer(shop), _content(tmp_path)) == (first, made)
    Path("events/items.parquet").rename("items.parquet")
    gate = re.search(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert gate is not None
    Path("gate.yaml").write_text(gate[1])
    pq.write_table(pa.table({"item_id": ["new"], "title": ["a new tent"]}), "new.parquet")
    job = _job()
    assert [command[0] for command in job] == ORDER
    small = {
        "train": ["--recipe", "tiny", "--set", "train.epochs=1", "--device", "cpu"],
        "evaluate": ["--no-baselines"],
    }
    job = [command + small.get(command[0], []) for command in job]
    job.append(["deploy", "--repository", "DEPLOYMENT", "--bundle", "$NIGHT/bundle"])
    job.append(["catalogue", "update", "--repository", "DEPLOYMENT", "--items", "new.parquet"])
    answers = {}
    for command in job:
        before = _times(tmp_path)
        code, plan = _answer([*command, "--dry-run"])
        assert plan["dry_run"] is True
        assert _times(tmp_path) == before, command
        assert code == _answer(command)[0]
        if command[0] == "report":  # the generated shop is small and of the past, which the document's gate notices
            broken = {line["measure"] for line in plan["gate"] if not line["passed"]}
            assert (code, broken) == (3, {"newest_age_days", "days_without_events", "events"})
            kept = [line for line in gate[1].splitlines() if line.partition(":")[0] not in broken]
            Path("gate.yaml").write_text("\n".join(kept))
            code = _answer(command)[0]
            assert not list(Path("work/report").glob("refused.*"))
        assert code == 0
        made = _content(tmp_path)
        code, answers[command[0]] = _answer(command)
        assert (code, _content(tmp_path)) == (0, made), command
    assert answers["features"]["replaced"] == ["text"]
    assert (answers["train"]["found"], answers["report"]["previous"]) == (True, None)
    assert answers["export"]["parity"]["equal"] is True
    assert answers["deploy"]["version"] == 1
    assert answers["catalogue"]["deployed"]["version"] == 2


def test_every_measure_of_the_documents_gate_exists_in_some_report() -> None:
    gate = re.search(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert gate is not None
    assert all(set(bound) <= {"min", "max", "required"} for bound in yaml.safe_load(gate[1]).values())


def test_the_compose_service_runs_the_same_commands() -> None:
    content = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    service = yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", content))["services"]["nightly"]
    shell, option, script = shlex.split(service["command"])
    assert (shell, option) == ("sh", "-ec")
    commands = [shlex.split(part)[1:] for part in script.split(";") if part.strip()]
    assert [command[0] for command in commands] == ORDER
    for ours, documented in zip(commands, _job(), strict=True):
        named = {word for word in documented if word.startswith("--")} - {"--gate", "--text-columns"}
        assert named <= set(ours)
    assert service["profiles"] == ["nightly"]
