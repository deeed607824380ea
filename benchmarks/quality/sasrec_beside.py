"""SASRec: our baseline and, if an environment has it, that of RecTools; same sessions, same users, same metrics.

    python -m venv work/rectools && work/rectools/bin/pip install 'rectools[torch]' 'pyarrow<21'  # numpy 1
    python -m benchmarks.quality.sasrec_beside --data path/to/amazon_scientific --rectools work/rectools/bin/python

RecTools trains in its own environment (`rectools_lists.py`) and returns lists; its ranks are taken from them by the
code of `missrec compare`. Both know item ids alone and choose epochs and dropout on validation for each protocol.
Finished seeds are kept in ``--out``.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, METRICS, arguments, data_set, spread
from benchmarks.quality.datasets import prepare_named
from missrec_t4r.comparison.lists import rank_lists
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM
from missrec_t4r.evaluation.metrics import metrics
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.runs.evaluate import evaluate_sessions
from missrec_t4r.runs.sasrec_file import kept_sasrec

OF_LISTS = {EXCLUDED: EXCLUDED, KEPT_STRICT: KEPT_WITH_HISTORY_TERM}
"""A list cannot tell what its maker knew of the session; RecTools' model knows nothing of it, so *kept* is strict."""


def ours(data: Path, seed: int, out: Path) -> dict[str, Any]:
    """Train the baseline `sasrec` and rank the test split."""
    catalogue = Catalogue.load(data / "catalogue")
    train, valid, test = (Sessions.load(data / split, ()) for split in ("train", "valid", "test"))
    tuned = kept_sasrec(train, valid, catalogue, out, seed=seed)
    found = evaluate_sessions({"sasrec": {p: of.scorer for p, of in tuned.items()}}, test, catalogue)
    return {
        "settings": {p: {**of.settings, "valid_ndcg@10": of.criterion} for p, of in tuned.items()},
        "test": {p: {m: found["protocols"][p]["sasrec"][m] for m in METRICS} for p in OF_LISTS},
    }


def rectools(data: Path, seed: int, out: Path, python: Path) -> dict[str, Any]:
    """Let RecTools train and recommend, and rank the test split by its lists."""
    script = Path(__file__).with_name("rectools_lists.py")
    subprocess.run([python, script, "--data", data, "--out", out, "--seed", str(seed)], check=True)
    catalogue, sessions = Catalogue.load(data / "catalogue"), Sessions.load(data / "test", ())
    histories, targets = sessions.split_last()
    found = {}
    for protocol, of in OF_LISTS.items():
        table = pq.read_table(out / f"{protocol}.parquet")
        if sessions.users is None or table["user_id"].to_pylist() != sessions.users.to_pylist():
            raise ValueError(f"{out} has lists for other users than {data / 'test'}")
        given = table["items"].to_pylist()
        rows = np.full((len(given), max(map(len, given))), -1)
        for place, items in enumerate(given):
            rows[place, : len(items)] = items
        ranks = rank_lists(rows, histories.known(), targets, catalogue.n_rows, max(10, rows.shape[1]))[0][of]
        found[protocol] = {metric: metrics(ranks)[metric] for metric in METRICS}
    return {**read_json(out / "settings.json"), "test": found}


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rectools", type=Path, help="python of an environment that has RecTools")
    options = parser.parse_args()
    name, data = prepare_named(options.data, options.out, **data_set(options))
    runs: dict[str, list[dict[str, Any]]] = {"sasrec": []} | ({"rectools_sasrec": []} if options.rectools else {})
    for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
        for system in runs:
            out = options.out / name / system / f"seed-{seed}"
            if not (out / "result.json").is_file():
                found = ours(data, seed, out) if system == "sasrec" else rectools(data, seed, out, options.rectools)
                write_json(out / "result.json", {"seed": seed, **found})
            runs[system].append(read_json(out / "result.json"))
            print(json.dumps(runs[system][-1]), flush=True)
    protocols = {
        protocol: {
            system: {metric: spread([one["test"][protocol][metric] for one in of]) for metric in METRICS}
            for system, of in runs.items()
        }
        for protocol in OF_LISTS
    }
    report(f"sasrec-{name}", {"data": name, "seeds": options.seeds, "protocols": protocols, "runs": runs})


if __name__ == "__main__":
    run_as_command(main)
