"""What it brings to count co-occurrences in more events than the training split has: `missrec export --recount`.

    python -m benchmarks.quality.recount --run subset=work/bench/scientific_mm/default/seed-2020 --run beauty=…

The exported model of trained runs with other counts and the same weights, which were tuned with the training split's.
*test*: counts of training, and of training and validation. *valid*: counts of training without the last event of every
session, and of training. Either way the second counts lack no event before the one that is asked for, and the first
lack one per session. One result file for all runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from benchmarks.measure import report, run_as_command
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.user_sessions import whole_sessions
from missrec_t4r.evaluation.full_ranking import rank_systems
from missrec_t4r.evaluation.metrics import metrics, named_differences, paired_differences
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_terms, terms_of, with_terms
from missrec_t4r.ranking.protocols import Blend, BlendScorer
from missrec_t4r.ranking.recount import recount
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import TUNED_FOR
from missrec_t4r.runs.run_folder import load_run, read_info

_KS: Final = (10,)


def measure(run: Path) -> dict[str, Any]:
    """Rank the test and the validation split with either counts."""
    loaded = load_run(run)
    model, tuned = loaded.model, read_info(run)["score_terms"]
    train, valid, test = (load_sessions(loaded.data, name, model.event_columns) for name in ("train", "valid", "test"))
    train = train.known()
    shorter, _ = train.take((train.lengths > 0).nonzero()[0]).split_last()
    longer = whole_sessions(loaded.data, ("valid", "train"))
    counts = {
        "test": {"fewer": train, "more": longer},
        "valid": {"fewer": shorter, "more": train},
    }
    scorer = ModelScorer.with_popularity(model, loaded.catalogue)
    found: dict[str, Any] = {"events": {"train": len(train.values), "train and valid": len(longer.values)}}
    for split, sessions in (("test", test), ("valid", valid.with_known_target())):
        systems = {name: _counted(model, counted, tuned) for name, counted in counts[split].items()}
        blends = {name: dict.fromkeys(TUNED_FOR, Blend(other.terms)) for name, other in systems.items()}
        histories, targets = sessions.split_last()
        rankings = rank_systems(BlendScorer(scorer, blends), histories, targets, loaded.catalogue.n_rows)
        found[split] = {protocol: _compared(rankings["more"], rankings["fewer"], protocol) for protocol in TUNED_FOR}
    return found


def _counted(model: MISSRec, sessions: Sessions, tuned: dict[str, Any]) -> MISSRec:
    """Return the model with the counts of these sessions; its network is not copied."""
    other = with_terms(model, build_terms(model.config, model.item_encoder))
    other.terms.load_state_dict(model.terms.state_dict())
    terms_of(other).item_knn.frequency.zero_()  # type: ignore[union-attr]  # `recount` refuses fewer events than before
    recount(other, sessions, tuned)
    return other


def _compared(more: Any, fewer: Any, protocol: str) -> dict[str, Any]:
    one, other = more.ranks[protocol], fewer.ranks[protocol]
    before, after = (metrics(ranks, _KS) for ranks in (other, one))
    gain = {name: after[name] / value - 1 for name, value in before.items()}  # type: ignore[operator]  # sessions exist
    return {
        "fewer": before,
        "more": after,
        "gain": gain,
        "difference": named_differences(paired_differences(one, other, _KS)),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, help="label=run folder")
    parser.add_argument("--name", default="recount", help="of the result file")
    options = parser.parse_args()
    runs = dict(one.split("=", 1) for one in options.run)
    report(options.name, {"runs": {label: measure(Path(run)) for label, run in runs.items()}})


if __name__ == "__main__":
    run_as_command(main)
