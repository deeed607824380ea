"""Cold-start benchmark: a share of the items is held out of training and is only the target of test sessions.

    python -m benchmarks.quality.cold_items --data path/to/ml1m_posters --recipe long --share 0.1 --draws 1 2 3 \
        --set model.item_ids=false --exposure 1 2

All events of the held-out items are removed, except a user's last one: those are the targets. The model is compared
with popularity, item-kNN and content-kNN on the same vectors, and with itself without its cold-start term; the whole
catalogue is ranked. The effect on all other targets is reported too.

The difficulty depends on the held-out items, so several disjoint shares are drawn, each with its own ETL and training.
The exposure of cold items (``model.cold_start_exposure``) is set after training, so that several levels cost one
training. A user's last item is held out in at most one share: targets are pooled, and intervals resample users.
Finished trainings are kept in ``--out``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.measure import report, run_as_command
from benchmarks.quality.bench import FIRST_SEED, arguments, pairs
from benchmarks.quality.paired import paired
from missrec_t4r import commands
from missrec_t4r.cli.demo import find_inputs
from missrec_t4r.config.yaml_text import parse_yaml
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_WITH_HISTORY_TERM, rank_catalogue
from missrec_t4r.evaluation.metrics import metric_names, metric_values
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.cold_start import ColdStartSettings
from missrec_t4r.ranking.tune_cold_start import fit_cold_start
from missrec_t4r.runs.evaluate import System, fitted_baselines
from missrec_t4r.runs.run_folder import RUN_FILE, load_run
from missrec_t4r.schema import FIRST_ITEM_ROW

WITHOUT, RIVAL = "without_cold_start_term", "content_knn"
_KS = (10,)
_PROTOCOLS = (KEPT_WITH_HISTORY_TERM, EXCLUDED)
"""Those of the model as it is exported, with its terms."""
_METRICS = ("recall@10", "ndcg@10")


class Draw(NamedTuple):
    """A held-out share of the items and the rank of its targets in every system."""

    facts: dict[str, Any]
    cold: npt.NDArray[np.bool_]
    """[session]: True where the target is held out."""
    ranks: dict[str, dict[str, npt.NDArray[np.int64]]]
    """System to protocol to ranks [session]."""


def hold_out(interactions: Path, out: Path, share: float, number: int, min_count: int) -> dict[str, int]:
    """Write the interactions without the events of held-out items, other than a user's last one.

    Parameters
    ----------
    number : int
        Index of the share of the items, from 0; two numbers have no item in common.

    Returns
    -------
    dict
        Numbers of held-out items, removed events and targets among them.
    """
    table = pq.read_table(interactions)
    users, items = (pc.dictionary_encode(table[name]).combine_chunks() for name in ("user_id", "item_id"))
    user, item = users.indices.to_numpy(), items.indices.to_numpy()
    counts = np.bincount(item)
    drawn = np.random.default_rng(FIRST_SEED).random(len(counts)) // share
    held = (drawn == number) & (counts >= min_count)
    order = np.lexsort((np.arange(len(user)), table["timestamp"].to_numpy(), user))
    last = np.zeros(len(user), bool)
    last[order[np.append(np.diff(user[order]) != 0, True)]] = True
    keep = ~held[item] | last
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.filter(pa.array(keep)), out)
    return {"held_out": int(held.sum()), "removed": int((~keep).sum()), "targets": int((held[item] & last).sum())}


def measure(
    data: Path,
    out: Path,
    recipe: str,
    settings: dict[str, Any],
    share: float,
    number: int,
    exposures: Sequence[float],
) -> Draw:
    """Hold out, train and rank, unless it is done."""
    inputs = find_inputs(data)
    facts: dict[str, Any] = dict(
        hold_out(inputs.interactions, out / "interactions.parquet", share, number, max(inputs.min_item_count, 1))
    )
    folder, run = out / "data", out / "run"
    if not (run / RUN_FILE).is_file():
        commands.etl([out / "interactions.parquet"], inputs.items, folder, modality=inputs.modality)
        commands.train(folder, run, recipe=recipe, settings={**settings, "train.seed": FIRST_SEED})
    return ranked(run, exposures, facts)


def ranked(run: Path, exposures: Sequence[float], facts: dict[str, Any]) -> Draw:
    """Rank the test split with a run, at each exposure and without cold-start term, and with the tuned baselines."""
    loaded = load_run(run)
    models = {name_of(exposure): exposed(run, exposure) for exposure in exposures}
    terms_of(loaded.model).cold_start.choose(ColdStartSettings(0.0, 0.0, 0.0, 0.0))
    models[WITHOUT] = loaded.model, {}
    event_features = loaded.model.event_columns
    histories, targets = load_sessions(loaded.data, "test", event_features).split_last()
    cold = (targets >= FIRST_ITEM_ROW) & (loaded.catalogue.train_count[targets] == 0)
    rivals, tuned = fitted_baselines(loaded.data, loaded.catalogue)
    systems: dict[str, System] = {
        **{name: ModelScorer.with_popularity(model, loaded.catalogue) for name, (model, _) in models.items()},
        **rivals,
    }
    ranks = {
        name: {
            protocol: rank_catalogue(
                system if callable(system) else system[protocol],
                histories,
                targets,
                loaded.catalogue.n_rows,
                protocols=(protocol,),
                description=f"ranking {name}",
            ).ranks[protocol]
            for protocol in _PROTOCOLS
        }
        for name, system in systems.items()
    }
    chosen = {name: found for name, (_, found) in models.items() if found}
    return Draw({**facts, "n": int(cold.sum()), "cold_start": chosen, "baseline_settings": tuned}, cold, ranks)


def exposed(run: Path, exposure: float) -> tuple[MISSRec, dict[str, Any]]:
    """Return a run's model tuned for an exposure of cold items, and the tuned numbers."""
    loaded = load_run(run)
    model = loaded.model
    model.config = dataclasses.replace(model.config, cold_start_exposure=exposure)
    columns = model.event_columns
    valid = load_sessions(loaded.data, "valid", columns).known()
    return model, fit_cold_start(model, loaded.catalogue, valid)


def name_of(exposure: float) -> str:
    """Return the name of the model at an exposure.

    Examples
    --------
    >>> name_of(1.0)
    'exposure_1'
    """
    return f"exposure_{exposure:g}"


def pooled(draws: list[Draw]) -> dict[str, Any]:
    """Return every system's metrics on the held-out and on the other targets, and the difference to the model."""
    found: dict[str, Any] = {"n": sum(int(draw.cold.sum()) for draw in draws)}
    ours = [name for name in draws[0].ranks if name.startswith("exposure_")]
    for part in ("cold", "others", "all"):
        names = draws[0].ranks if part == "cold" else (*ours, WITHOUT)
        found[part] = {
            protocol: {name: _means(_values(draws, name, protocol, part)) for name in names} for protocol in _PROTOCOLS
        }
    at = metric_names(_KS).index("recall@10")
    found["ahead_of_content_knn"] = {
        protocol: {
            name: paired(*(_values(draws, one, protocol, "cold")[None, :, at] for one in (name, RIVAL)))
            for name in ours
        }
        for protocol in _PROTOCOLS
    }
    return found


def _values(draws: list[Draw], name: str, protocol: str, part: str) -> npt.NDArray[np.float64]:
    """Return the metrics [target, metric] of the chosen part of all draws."""
    chosen = [{"cold": draw.cold, "others": ~draw.cold}.get(part, np.ones_like(draw.cold)) for draw in draws]
    return np.concatenate(
        [metric_values(draw.ranks[name][protocol][flags], _KS) for draw, flags in zip(draws, chosen, strict=True)]
    )


def _means(values: npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(values[:, metric_names(_KS).index(name)].mean()), 4) for name in _METRICS}


def main() -> None:
    """Run from the command line."""
    parser = arguments(__doc__, prepared=False)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="such as model.item_ids=false")
    parser.add_argument("--share", type=float, default=0.1, help="of the items to hold out")
    parser.add_argument("--draws", type=int, nargs="+", default=[0], help="which tenths, from 0; of other items each")
    parser.add_argument("--exposure", type=float, nargs="+", default=[1.0], help="see model.cold_start_exposure")
    parser.add_argument("--label", default="cold")
    options = parser.parse_args()
    settings = {"model.cold_start_exposure": options.exposure[0]}
    settings |= {key: parse_yaml(value) for key, value in pairs(options.settings).items()}
    name = options.name or options.data.resolve().name
    draws = [
        measure(
            options.data,
            options.out / name / f"{options.label}-{number}",
            options.recipe,
            settings,
            options.share,
            number,
            options.exposure,
        )
        for number in options.draws
    ]
    report(
        f"{options.label}-{name}",
        {
            "data": name,
            "recipe": options.recipe,
            "settings": settings,
            **pooled(draws),
            "draws": [
                {"draw": number, **draw.facts, **pooled([draw])}
                for number, draw in zip(options.draws, draws, strict=True)
            ],
        },
    )


if __name__ == "__main__":
    run_as_command(main)
