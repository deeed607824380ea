"""What `missrec train --dry-run` predicts beside what the training then takes: an epoch, the score terms, peak memory.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.predicted work/scientific/data work/ml1m/data

Seconds are processor seconds of one thread, so that other work on the machine does not count; prediction and training
are processes of their own. The training is a short one: the mean of its epochs counts, the first one included.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import peak_mib, report, require_files, run_as_command
from missrec_t4r.schema import CATALOGUE_FOLDER


def main() -> None:
    """Predict and train on every data folder, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+", type=Path, help="data folders of `missrec etl`")
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for data in options.data:
        require_files(data / CATALOGUE_FOLDER, ["catalogue.json"], "a data folder", "write one with `missrec etl`")
    fresh = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {}
    for data in options.data:
        with tempfile.TemporaryDirectory() as folder, fresh.Pool(1, maxtasksperchild=1) as pool:
            call = (data, Path(folder) / "run", options.recipe, options.epochs)
            predicted, measured = pool.apply(_predicted, call), pool.apply(_measured, call)
        ratios = {name: round(predicted[name] / measured[name], 2) for name in measured}
        found[data.resolve().parent.name] = {"predicted": predicted, "measured": measured, "ratio": ratios}
        print(json.dumps(found), flush=True)
    payload = {"recipe": options.recipe, "epochs": options.epochs, "data": found}
    report("predicted", payload, *([options.out] if options.out else []))


def _predicted(data: Path, out: Path, recipe: str, epochs: int) -> dict[str, float]:
    from missrec_t4r import commands

    time.perf_counter = time.process_time
    plan = commands.train(data, out, recipe=recipe, settings={"train.epochs": epochs}, dry_run=True)["predicted"]
    total = 60 * plan["minutes_at_most"]
    return {"epoch_s": plan["seconds_per_epoch"], "total_s": round(total, 1), "peak_gib": plan["peak_memory_gib"]}


def _measured(data: Path, out: Path, recipe: str, epochs: int) -> dict[str, float]:
    from missrec_t4r import commands
    from missrec_t4r.training import trainer

    time.perf_counter = time.process_time
    fit, spent = trainer.fit_terms, [0.0]

    def timed(*given: Any, **named: Any) -> dict[str, Any]:
        started = time.process_time()
        result = fit(*given, **named)
        spent[0] = time.process_time() - started
        return result

    trainer.fit_terms = timed
    result = commands.train(data, out, recipe=recipe, settings={"train.epochs": epochs})
    total = round(result["seconds"] + spent[0], 1)
    return {
        "epoch_s": round(result["seconds"] / result["epochs"], 2),
        "total_s": total,
        "peak_gib": round(peak_mib() / 1024, 2),
    }


if __name__ == "__main__":
    run_as_command(main)
