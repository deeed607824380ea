"""Items that training never saw: a share of them is held out entirely and only asked for at the end.

    python -m benchmarks.quality.cold_items --data path/to/ml1m_posters --recipe long --share 0.1

All events of the held-out items are removed, except where they are a customer's last one: those are the targets. The
model is compared with popularity, item-kNN and content-kNN on the same vectors; the whole catalogue is ranked.
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
from missrec_t4r.demo import find_inputs
from missrec_t4r.progress import Progress, TerminalProgress

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
    report_file = run / "metrics_test.json"
    if not report_file.is_file():
        commands.evaluate(run, progress=progress)
    cold = json.loads(report_file.read_text(encoding="utf-8"))["slices"]["cold"]
    protocols = {name: values for name, values in cold.items() if name != "n"}
    return {
        **facts,
        "n": cold["n"],
        "cold": {
            protocol: {
                system: {key: round(values[key] or 0.0, 4) for key in _METRICS}
                | {"interval": values["interval"]["recall@10"]}
                for system, values in systems.items()
            }
            for protocol, systems in protocols.items()
        },
    }


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="such as model.item_ids=false")
    parser.add_argument("--share", type=float, default=0.1, help="of the items to hold out")
    parser.add_argument("--label", default="cold")
    options = parser.parse_args()
    settings = {key: yaml.safe_load(value) for key, value in pairs(options.settings).items()}
    name = options.name or options.data.resolve().name
    where = options.out / name / options.label
    found = measure(options.data, where, options.recipe, settings, options.share, FIRST_SEED, TerminalProgress())
    report(f"{options.label}-{name}", {"data": name, "recipe": options.recipe, "settings": settings, **found})


if __name__ == "__main__":
    main()
