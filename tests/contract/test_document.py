"""The script of docs/t4r_contract.md runs, for fewer epochs: the three objects, T4R's stock loader and Trainer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest


def test_the_script_of_the_page_runs(
    data: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (repository / "docs/t4r_contract.md").read_text(encoding="utf-8")
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    assert "num_train_epochs=15" in script
    script = script.replace("num_train_epochs=15", "num_train_epochs=2")
    shutil.copytree(data, tmp_path / "work/data")
    for part in tmp_path.glob("work/data/*/part_0.parquet"):
        part.rename(part.with_name("part_00000.parquet"))  # as --engine disk names it, the tutorial's
    monkeypatch.chdir(tmp_path)
    exec(compile(script, "t4r_contract.md", "exec"), {})
    assert "eval_/next-item/ndcg_at_10" in capsys.readouterr().out
