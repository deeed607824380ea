"""What the script of docs/t4r_contract.md gives when it is copied: T4R's metrics that it prints, and ours on test.

    python -m benchmarks.quality.copied_script --data work/tutorial/data --name tutorial_shop [--runs 2]

The block runs as it stands, in a folder whose ``work/data`` is the data folder. It sets no seed before the model is
built, so that runs differ; this seeds torch by the number of the run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import missrec_t4r.t4r  # noqa: F401  # before anything of Merlin that imports dask
from benchmarks.measure import report, run_as_command
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.t4r import to_core
from missrec_t4r.t4r.scorer import T4RScorer

PAGE = Path(__file__).resolve().parents[2] / "docs/t4r_contract.md"
METRICS = ("recall@10", "ndcg@10")


def script() -> str:
    """Return the first block of the page that trains."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "trainer.train()" in block)


def run(data: Path, seed: int) -> dict[str, Any]:
    """Run the block once and return what it printed and what the test split says."""
    torch.manual_seed(seed)
    names: dict[str, Any] = {}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("work").mkdir()
        os.symlink(data, "work/data")
        exec(compile(script(), str(PAGE), "exec"), names)  # the repository's own page
        printed = names["trainer"].state.log_history[-1]
    seconds, catalogue = time.perf_counter() - started, Catalogue.load(data / "catalogue")
    scorer = T4RScorer(names["model"], catalogue, names["inputs"].max_sequence_length)
    sessions = load_sessions(data, "test", to_core(names["model"]).event_columns)
    found = evaluate_sessions({"model": scorer}, sessions, catalogue)
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "printed": {name: value for name, value in printed.items() if name.startswith("eval_")},
        "test": {p: {m: of["model"][m] for m in METRICS} for p, of in found["protocols"].items() if of},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="data folder")
    parser.add_argument("--name", required=True, help="of the data set in results")
    parser.add_argument("--runs", type=int, default=2)
    options = parser.parse_args()
    runs = [run(options.data.resolve(), seed) for seed in range(options.runs)]
    report(f"copied-script-{options.name}", {"data": options.name, "runs": runs})


if __name__ == "__main__":
    run_as_command(main)
