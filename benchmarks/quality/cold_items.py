"""Items that training never saw: a share of them is held out entirely and only asked for at the end.

    python -m benchmarks.quality.cold_items --data path/to/ml1m_posters --recipe long --share 0.1

All events of the held-out items are removed, except where they are a customer's last one: those are the targets. The
model is compared with popularity, item-kNN and content-kNN on the same vectors, and with itself without what it lends
to items without events (`model/newcomers.py`); the whole catalogue is ranked. What the others pay stands beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.measure import report
from benchmarks.quality.bench import FIRST_SEED, arguments, pairs
from missrec_t4r import commands
from missrec_t4r.data.side import load_sessions
from missrec_t4r.demo import find_inputs
from missrec_t4r.evaluation.evaluate import System, evaluate_sessions, fitted_baselines
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.evaluation.model_scorer import ModelScorer
from missrec_t4r.model.newcomers import NewcomerSettings
from missrec_t4r.progress import Progress, TerminalProgress
from missrec_t4r.schema import FIRST_ITEM_ROW
from missrec_t4r.training.checkpoint import RUN_FILE, load_run

BOOTSTRAPS = 3
"""Seeds of the intervals; the ranking is the same."""
_METRICS = ("recall@10", "ndcg@10")


def hold_out(interactions: Path, out: Path, share: float, seed: int, min_count: int) -> dict[str, int]:
    """Write the interactions without the events of held-out items, other than a customer's last one.

    Returns
    -------
    dict
        Numbers of held-out items, removed events and targets among them.
    """
    table = pq.read_table(interactions)
    users, items = (pc.dictionary_encode(table[name]).combine_chunks() for name in ("user_id", "item_id"))
    user, item = users.indices.to_numpy(), items.indices.to_numpy()
    counts = np.bincount(item)
    rng = np.random.default_rng(seed)
    held = (rng.random(len(counts)) < share) & (counts >= min_count)
    order = np.lexsort((np.arange(len(user)), table["timestamp"].to_numpy(), user))
    last = np.zeros(len(user), bool)
    last[order[np.append(np.diff(user[order]) != 0, True)]] = True
    keep = ~held[item] | last
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.filter(pa.array(keep)), out)
    return {"held_out": int(held.sum()), "removed": int((~keep).sum()), "targets": int((held[item] & last).sum())}


def measure(
    data: Path, out: Path, recipe: str, settings: dict[str, Any], share: float, seed: int, progress: Progress
) -> dict[str, Any]:
    """Hold out, train, and rank for the customers whose last event is a held-out item."""
    inputs = find_inputs(data)
    facts = hold_out(inputs.interactions, out / "interactions.parquet", share, seed, max(inputs.min_item_count, 1))
    folder, run = out / "data", out / "run"
    if not (run / "run.json").is_file():
        commands.etl([out / "interactions.parquet"], inputs.items, folder, modality=inputs.modality, progress=progress)
        commands.train(folder, run, recipe=recipe, settings={**settings, "train.seed": seed}, progress=progress)
    return {**facts, **compare(run, progress)}


def compare(run: Path, progress: Progress) -> dict[str, Any]:
    """Rank the test split with a run, with and without its newcomers, and with the tuned baselines."""
    loaded, without = load_run(run), load_run(run).model
    assert without.prior is not None
    assert without.prior.newcomers is not None
    without.prior.newcomers.choose(NewcomerSettings(0.0, 0.0, 0.0, 0.0))
    side = () if loaded.model.side is None else loaded.model.side.columns
    sessions = load_sessions(loaded.data, "test", side)
    targets = sessions.split_last()[1]
    cold = (targets >= FIRST_ITEM_ROW) & (loaded.catalogue.train_count[targets] == 0)
    ours: dict[str, System] = {
        "model": ModelScorer.with_popularity(loaded.model, loaded.catalogue),
        "without_newcomers": ModelScorer.with_popularity(without, loaded.catalogue),
    }
    rivals, tuned = fitted_baselines(loaded.data, loaded.catalogue, progress=progress)
    parts = {"cold": cold, "others": ~cold, "all": np.ones_like(cold)}
    found: dict[str, Any] = {
        "n": int(cold.sum()),
        "newcomers": json.loads((run / RUN_FILE).read_text())["prior"].get("newcomers"),
    }
    for name, flags in parts.items():
        systems = ours | rivals if name == "cold" else ours
        reports = [
            evaluate_sessions(systems, sessions.take(np.flatnonzero(flags)), loaded.catalogue, seed=seed, ks=(10,))
            for seed in range(BOOTSTRAPS if name == "cold" else 1)
        ]
        found[name] = {protocol: _lines(reports[0]["protocols"][protocol]) for protocol in PROTOCOLS}
        if name == "cold":
            found["ahead_of_content_knn"] = {
                protocol: [report["differences"][protocol]["content_knn"]["recall@10"] for report in reports]
                for protocol in PROTOCOLS
            }
    return found | {"baseline_settings": tuned}


def _lines(systems: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: round(values[key] or 0.0, 4) for key in _METRICS} | {"interval": values["interval"]["recall@10"]}
        for name, values in systems.items()
    }


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="such as model.item_ids=false")
    parser.add_argument("--share", type=float, default=0.1, help="of the items to hold out")
    parser.add_argument("--label", default="cold")
    options = parser.parse_args()
    settings = {"model.newcomer_exposure": 1.0}
    settings |= {key: yaml.safe_load(value) for key, value in pairs(options.settings).items()}
    name = options.name or options.data.resolve().name
    where = options.out / name / options.label
    found = measure(options.data, where, options.recipe, settings, options.share, FIRST_SEED, TerminalProgress())
    report(f"{options.label}-{name}", {"data": name, "recipe": options.recipe, "settings": settings, **found})


if __name__ == "__main__":
    main()
