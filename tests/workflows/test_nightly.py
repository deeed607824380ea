"""docs/howto/nightly.md: its commands are run in order, its gate judges, the Compose service says the same."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

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


def test_a_night(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _answer(["generate", "--out", "events", "--users", "120", "--items", "100"])
    Path("events/items.parquet").rename("items.parquet")
    gate = re.search(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert gate is not None
    Path("gate.yaml").write_text(gate[1])
    job = _job()
    assert [command[0] for command in job] == ORDER
    small = {
        "train": ["--recipe", "tiny", "--set", "train.epochs=1", "--device", "cpu"],
        "evaluate": ["--no-baselines"],
    }
    answers = {}
    for command in job:
        code, answers[command[0]] = _answer(command + small.get(command[0], []))
        if command[0] == "report":  # the generated shop is small and of the past, which the document's gate notices
            broken = {line["measure"] for line in answers["report"]["gate"] if not line["passed"]}
            assert (code, broken) == (3, {"newest_age_days", "days_without_events"})
            kept = [line for line in gate[1].splitlines() if line.partition(":")[0] not in broken]
            Path("gate.yaml").write_text("\n".join(kept))
            code, answers["report"] = _answer(command)
        assert code == 0
    assert answers["report"]["previous"] is None
    assert answers["export"]["parity"]["equal"] is True
    _, again = _answer(job[2])
    assert again["measures"]["drift.popularity"] == again["measures"]["drift.events"] == 0
    _, plan = _answer([*job[1], "--dry-run"])
    assert plan["modalities"]["text"]["items"] == 100


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
