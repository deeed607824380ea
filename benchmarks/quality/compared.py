"""The figures of `missrec compare` as a result file: systems, differences, slices, cost; without titles and ids.

    python -m benchmarks.quality.compared --data work/data --name scientific_mm --max-sequence-length 20 \
        XLNet=work/swap/xlnet swap=work/swap/swap full=work/run

The first system is the current one, the second the candidate, as in `missrec compare`; ``beside_the_candidate`` are the
differences of the others to the second. Saved T4R models are pickles: only one's own. The page is kept in ``--out``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import missrec_t4r as mr
from benchmarks.measure import report, run_as_command

METRICS = ("recall@10", "ndcg@10")
ENDS = ("difference", "low", "high", "relative")


def compact(found: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of a comparison that tables and sentences state."""
    return {
        **{key: found[key] for key in ("split", "current", "candidate", "n_users", "n_items")},
        "verdict": {key: found["verdict"][key] for key in ("decision", "summary", "protocol")},
        "systems": {
            name: {key: of[key] for key in ("kind", "bytes", "cost", "notes")} for name, of in found["systems"].items()
        },
        "protocols": {
            protocol: {
                name: {**{metric: of[metric] for metric in METRICS}, "interval": of["interval"]["ndcg@10"]}
                for name, of in systems.items()
            }
            for protocol, systems in found["protocols"].items()
        },
        "differences": {
            protocol: {name: _ends(of) for name, of in systems.items()}
            for protocol, systems in found["differences"].items()
        },
        "slices": {
            part: {
                "n": of["n"],
                **{
                    protocol: {name: {"ndcg@10": one["ndcg@10"]} for name, one in of[protocol].items()}
                    for protocol in found["protocols"]
                },
            }
            for part, of in found["slices"].items()
            if of["n"]
        },
        "beyond_accuracy": found["beyond_accuracy"],
    }


def _ends(of: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {metric: {end: of[metric][end] for end in ENDS} for metric in METRICS}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("systems", nargs="+", help="NAME=PATH, the current one first")
    parser.add_argument("--data", type=Path, required=True, help="data folder on which all are ranked")
    parser.add_argument("--name", required=True, help="of the data set in results")
    parser.add_argument("--max-sequence-length", type=int, help="last items of a session that T4R models read")
    parser.add_argument("--out", type=Path, default=Path("work/compared"), help="where the page is kept")
    options = parser.parse_args()
    settings = {"data": options.data, "max_sequence_length": options.max_sequence_length, "trust_pickle": True}
    found = compact(mr.compare(options.systems, options.out / options.name, **settings))
    if len(options.systems) > 2:
        protocol = found["verdict"]["protocol"]
        beside = mr.compare(options.systems[1:], protocols=[protocol], **settings)
        found["beside_the_candidate"] = {name: _ends(of) for name, of in beside["differences"][protocol].items()}
    report(f"compared-{options.name}", {"data": options.name, "t4r_length": options.max_sequence_length, **found})


if __name__ == "__main__":
    run_as_command(main)
