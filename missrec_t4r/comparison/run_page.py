"""`missrec page`: one run on one HTML page, made from what training and evaluation left in the run folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from missrec_t4r.comparison.examples import described, shown_ids
from missrec_t4r.comparison.page import (
    COMPARISON_STYLE,
    SLICE_WORDS,
    Pictures,
    accuracy_chart,
    by_slice,
    example_card,
    form,
    headline,
    place,
    wide_section,
    with_interval,
)
from missrec_t4r.config.checks import require_choices
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.features.thumbnails import thumbnails
from missrec_t4r.evaluation.full_ranking import EXCLUDED, PROTOCOL_TITLES, rank_systems
from missrec_t4r.evaluation.metrics import CRITERION
from missrec_t4r.evaluation.report import with_current_names
from missrec_t4r.io.atomic import write_text
from missrec_t4r.io.json_files import read_json
from missrec_t4r.model.score_terms import ScoreTerms
from missrec_t4r.pages.charts import bars, line, number
from missrec_t4r.pages.document import document, numbers, section, table
from missrec_t4r.ranking.protocols import EXPORTED, MODEL, NETWORK, TERMS, Blend, BlendScorer
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.tune import NDCG, NDCG_WITHOUT
from missrec_t4r.ranking.tune_baselines import sample_sessions
from missrec_t4r.runs.evaluate import ALL_BASELINES, EVALUATED_SPLITS, evaluate
from missrec_t4r.runs.run_folder import LOG_FILE, RECIPE_FILE, WEIGHTS_FILE, LoadedRun, load_run, read_info

log = logging.getLogger(__name__)

PAGE_FILE = "page.html"
_SAMPLE: Final = 400
"""Sessions that are ranked again for examples and for the shares of the terms."""
_QUANTILES: Final = (0.0, 0.08, 0.16, 0.3, 0.5, 0.9)
"""Examples, from the best session to the worst, as shares of the sample."""
_TITLES: Final = {
    MODEL: "model, tuned per protocol",
    EXPORTED: "model, as exported",
    NETWORK: "network alone",
    TERMS: "score terms alone",
}
_TERM_TITLES: Final = {
    "history_bias": "history bias",
    "item_knn": "item-kNN term",
    "content_knn": "content-kNN term",
    "cold_start": "cold-start term",
    "rare_items": "rare-item term",
}


def run_page(
    run: str | Path,
    out: str | Path | None = None,
    *,
    split: Literal["test", "valid"] = "test",
    data: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Write one HTML page about a run: learning curves, slices with intervals, score terms, examples.

    Parameters
    ----------
    run : path
        Run folder written by `missrec train`. A run that was not evaluated is evaluated first.
    out : path, optional
        HTML file to write; by default page.html in the run folder.
    split : {"test", "valid"}
        Sessions of figures and examples.
    data : path, optional
        Data folder, if it was moved since training.
    dry_run : bool
        Print what would be read and written; write nothing.

    Returns
    -------
    dict
        ``page``, ``headline`` (a sentence), ``ndcg@10`` and ``terms_added``.

    Raises
    ------
    ConfigError
        An unknown split.
    MISSRecError
        The run or the data folder is missing, incomplete, or does not fit.
    """
    run, file = Path(run), Path(out or Path(run) / PAGE_FILE)
    require_choices(split=(split, EVALUATED_SPLITS))
    if file.is_dir():
        raise ConfigError(f"--out {file} is a folder", "the HTML file to write", f"give --out {file / PAGE_FILE}")
    info, measured = read_info(run), _evaluation(run, split)
    if dry_run:
        return {"dry_run": True, "evaluates": measured is None, "would_write": [str(file)]}
    report = with_current_names(measured or evaluate(run, split=split, data=data))
    curve, loaded = _curve(run / LOG_FILE), load_run(run, data)
    shares, cards, pictures = _examples(loaded, split)
    result, words = _headline(report)
    sections = [
        _accuracy(report, EXCLUDED),
        _curves(curve, info),
        _by_slice(report),
        _terms(info, shares),
        *(_accuracy(report, name) for name in report["protocols"] if name != EXCLUDED),
        _slices(report),
        wide_section(
            "Examples",
            "Sessions from the best to the worst: the item that came next is green. Seen items are excluded.",
            cards,
            pictures,
        ),
        _settings(run),
    ]
    name = "/".join(run.resolve().parts[-2:])
    about = f"{run}, data {report['data']}, {split} sessions"
    above = headline(result, words) + _numbers(report, info)
    page = document(f"Run {name}", f"Run {name}", about, sections, above=above, style=COMPARISON_STYLE)
    write_text(file, page)
    systems = report["protocols"][EXCLUDED]
    value, network = systems[_main(systems)][CRITERION], systems.get(NETWORK, {}).get(CRITERION)
    added = None if network is None else value - network
    return {"page": str(file), "headline": f"{result}. {words}", CRITERION: value, "terms_added": added}


def _evaluation(run: Path, split: str) -> dict[str, Any] | None:
    """Return the stored evaluation; None where there is none, an older one than the weights, or an unreadable one."""
    file = run / f"metrics_{split}.json"
    if not file.is_file() or file.stat().st_mtime < (run / WEIGHTS_FILE).stat().st_mtime:
        return None
    try:
        return dict(read_json(file))
    except ValueError:
        log.warning(f"{file} cannot be read: evaluating again")
        return None


def _main(systems: Mapping[str, Any]) -> str:
    """Return the name of the system that is exported and served."""
    return EXPORTED if EXPORTED in systems else MODEL


def _headline(report: Mapping[str, Any]) -> tuple[str, str]:
    systems = report["protocols"][EXCLUDED]
    served = systems[_main(systems)]
    low, high = served["interval"]["recall@10"]
    words = [
        f"{served['recall@10']:.1%} of the next items are among the first ten (95 % interval {low:.1%} to {high:.1%})."
    ]
    if NETWORK in systems and systems[NETWORK] is not served:
        added = served[CRITERION] - systems[NETWORK][CRITERION]
        words.append(f"The score terms added {added:+.4f} to the network.")
    baselines = {name: systems[name][CRITERION] for name in ALL_BASELINES if name in systems}
    if baselines:
        best = max(baselines, key=lambda name: baselines[name])
        change = f" ({served[CRITERION] / baselines[best] - 1:+.1%})" if baselines[best] else ""
        words.append(f"The best baseline, {best}, has {baselines[best]:.4f}{change}.")
    return f"NDCG@10 {served[CRITERION]:.4f}, seen items excluded", " ".join(words)


def _numbers(report: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    facts = {
        "users": number(report["n_users"]),
        "items": number(report["n_items"]),
        "epochs": info.get("epochs"),
        "best epoch": info.get("best_epoch"),
        "ended by": info["stopped_by"].replace("_", " ") if "stopped_by" in info else None,
        "minutes of training": f"{info['seconds'] / 60:.1f}" if "seconds" in info else None,
        "precision": info.get("precision"),
    }
    return numbers({name: value for name, value in facts.items() if value is not None})  # a script's trainer notes few


def _curve(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(text) for text in lines if text.endswith("\n")]  # a killed training leaves half a line


def _curves(curve: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> str:
    if len(curve) < 2:
        found = "One epoch is" if curve else "No epoch is"
        why = "" if curve else ": a script of Transformers4Rec logs into the output folder of its Trainer"
        return section("Learning curves", f"<p>{found} recorded in {LOG_FILE}{why}.</p>")
    epochs = [record["epoch"] for record in curve]
    best = epochs.index(info["best_epoch"]) if info.get("best_epoch") in epochs else None
    charts = [
        line(epochs, [record[name] for record in curve], x_title="epoch", y_title=title, mark=best)
        for name, title in (("valid_ndcg@10", "validation NDCG@10"), ("loss", "training loss"))
    ]
    words = "The large point is the epoch that was kept. Validation is of the network, before score terms are tuned."
    return section("Learning curves", f"<p>{words}</p>{''.join(charts)}")


def _accuracy(report: Mapping[str, Any], protocol: str) -> str:
    systems, rows = report["protocols"][protocol], []
    titled = {_TITLES.get(name, name): measured for name, measured in systems.items()}
    for name, measured in systems.items():
        cells = [with_interval(measured, metric) for metric in (CRITERION, "recall@10")]
        covered = form(report["coverage"][protocol][name].get("coverage@10"), "{:.1%}")
        rows.append((_TITLES.get(name, name), *cells, form(measured["recall@50"]), covered))
    head = ("system", "NDCG@10", "Recall@10", "Recall@50", "coverage@10")
    return section(f"Accuracy, seen items {PROTOCOL_TITLES[protocol]}", table(head, rows) + accuracy_chart(titled))


def _by_slice(report: Mapping[str, Any]) -> str:
    measured = {name: part[EXCLUDED][_main(part[EXCLUDED])] for name, part in by_slice(report).items()}
    chart = accuracy_chart(measured, "NDCG@10, seen items excluded, with 95 % interval")
    return section("By kind of session", f"<p>{SLICE_WORDS} Sessions in brackets.</p>{chart}")


def _slices(report: Mapping[str, Any]) -> str:
    names = list(report["protocols"][EXCLUDED])
    rows = [
        (part, *(with_interval(measured[EXCLUDED][name], CRITERION) for name in names))
        for part, measured in by_slice(report).items()
    ]
    head = ("sessions (number)", *(_TITLES.get(name, name) for name in names))
    return section("NDCG@10 by kind of session, seen items excluded", table(head, rows), wide=True)


def _terms(info: Mapping[str, Any], shares: Mapping[str, float]) -> str:
    terms = info.get("score_terms") or {}  # a term that could not be tuned on so few sessions is off: without entries
    rows = []
    if knn := terms.get("item_knn"):
        counted = f"events that follow, within {knn['window']}" if knn["directed"] else "whole sessions"
        about = f"counts {counted}; recency {knn['decay']:.2g}; popularity discount {knn['power']:.2g}"
        rows.append((_TERM_TITLES["item_knn"], f"{knn['weight']:.4g}", about))
    if content := terms.get("content_knn"):
        rows.append((_TERM_TITLES["content_knn"], f"{content['weight']:.4g}", f"recency {content['decay']:.2g}"))
    if cold := terms.get("cold_start"):
        about = ", ".join(f"{name} {value:.3g}" for name, value in cold.items() if isinstance(value, float))
        rows.append((_TERM_TITLES["cold_start"], "", about))
    if rare := terms.get("rare_items"):
        groups = zip(("0 events", "1 or 2", "3 or 4"), rare["content"], rare["offset"], strict=True)
        about = "; ".join(f"{events}: content {weight:.3g}, offset {offset:+.3g}" for events, weight, offset in groups)
        rows.append((_TERM_TITLES["rare_items"], "", about))
    if not rows and not shares:
        return section("What the score terms weigh", "<p>This run has none: its score is that of the network.</p>")
    words = "Chosen on validation after training; 0 switches a term off."
    if NDCG_WITHOUT in terms:
        words += f" Validation NDCG@10 {terms[NDCG_WITHOUT]:.4f} without the kNN terms, {terms[NDCG]:.4f} with."
    chart = bars(
        list(shares), list(shares.values()), x_title="part of the score", y_title="mean over recommended items"
    )
    about = "<p>What each part adds to the score of the items that are recommended (first ten), on average in size:</p>"
    return section(
        "What the score terms weigh",
        f"<p>{words}</p>" + table(("term", "weight", "settings"), rows) + (about + chart if shares else ""),
    )


@torch.no_grad()
def _examples(loaded: LoadedRun, split: str) -> tuple[dict[str, float], list[str], Pictures]:
    """Return the mean size of every part of the score, some sessions as HTML, and their pictures."""
    sessions = sample_sessions(load_sessions(loaded.data, split, loaded.model.event_columns), _SAMPLE, seed=0)
    histories, targets = sessions.split_last()
    model, scorer = loaded.model, ModelScorer.with_popularity(loaded.model, loaded.catalogue)
    systems = {EXPORTED: Blend(model.terms), NETWORK: Blend(ScoreTerms())}
    blends = {name: {EXCLUDED: blend} for name, blend in systems.items()}
    found = rank_systems(
        BlendScorer(scorer, blends), histories, targets, loaded.catalogue.n_rows, top_k=50, description="examples"
    )
    known, lists = histories.known(), found[EXPORTED].recommended[EXCLUDED][:, :10]
    order = np.argsort(found[EXPORTED].ranks[EXCLUDED], kind="stable")
    chosen = list(dict.fromkeys(int(order[int(part * (len(order) - 1))]) for part in _QUANTILES))
    shown = {
        title: (found[name].ranks[EXCLUDED], found[name].recommended[EXCLUDED])
        for name, title in ((EXPORTED, "recommended"), (NETWORK, "by the network alone"))
    }
    examples = described(loaded.catalogue, known, targets, shown, chosen, users=sessions)
    pictures = Pictures(thumbnails(loaded.catalogue, shown_ids(examples)))
    cards = [
        example_card(example, place(example["systems"]["recommended"]["rank"]).capitalize(), pictures)
        for example in examples
    ]
    parts, rows = scorer.parts(known), torch.from_numpy(np.maximum(lists, 0)).to(scorer.device)
    real = (torch.from_numpy(lists) >= 0).to(scorer.device) & ~parts.empty[:, None]
    before = parts.network
    shares = {"network": float(before.gather(1, rows)[real].abs().mean())} if real.any() else {}
    used: dict[str, Any] = {}
    for name, term in model.terms.items():
        used[name] = term
        after = scorer.combined(parts, ScoreTerms(used))
        added = (after - before).gather(1, rows)[real]
        if bool((added != 0).any()):
            shares[_TERM_TITLES.get(name, name)] = float(added.abs().mean())
        before = after
    return shares, cards, pictures


def _settings(run: Path) -> str:
    recipe = read_json(run / RECIPE_FILE)
    rows = [
        (f"{part}.{name}", str(value)) for part in ("model", "train") for name, value in recipe.get(part, {}).items()
    ]
    inside = f"<details><summary>{len(rows)} settings</summary>{table(('setting', 'value'), rows)}</details>"
    return section("Recipe", inside)
