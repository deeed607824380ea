"""The whole pipeline in one command: raw tables, ETL, features, training, evaluation, export, and a real Triton.

`demo` is what ``make demo`` runs: on the generated shop, or on a folder with `interactions.parquet`, `items.parquet`
and modality vectors `<modality>_<encoder>.npy` whose rows follow the item table.
"""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console

from missrec_t4r.bundle.id_encoder import RawId
from missrec_t4r.cli.answer import rows_table
from missrec_t4r.commands import function_of
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.features.pipeline import WORDS, item_texts
from missrec_t4r.evaluation.full_ranking import KEPT_WITH_HISTORY_TERM
from missrec_t4r.export.parity import compare_served, raw_event_features, raw_ids, sample_histories
from missrec_t4r.ranking.tune_baselines import content_gain
from missrec_t4r.runs.run_folder import LoadedRun, load_run
from missrec_t4r.schema import CATALOGUE_FOLDER, ITEM_ID
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.triton.local_server import LocalTriton

log = logging.getLogger(__name__)

_SHOP_EPOCHS = 22
"""Epochs on the generated shop, so that the whole pipeline takes a few minutes."""
_COMPARED_SESSIONS = 256
_SHOWN = 5
_HEADLINE = ("recall@10", "ndcg@10")
_WORD_COLUMNS = ("title", "brand")
_RATING_FLOOR = 5
"""On a folder of real data, items with fewer events are left out, as in the published benchmarks (5-core)."""


@dataclass(frozen=True)
class Inputs:
    """Input of the ETL."""

    name: str
    interactions: Path
    items: Path
    modality: Mapping[str, Path] = field(default_factory=dict)
    """Precomputed vectors."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `missrec features`; without any it does not run."""
    min_item_count: int = 0


def demo(
    data: str | Path | None = None,
    out: str | Path = "work/demo",
    *,
    recipe: str | Path | None = None,
    users: int = 3000,
    items: int = 1200,
) -> dict[str, Any]:
    """Run the whole pipeline: raw tables, ETL, features, training, evaluation, export, and a real Triton server.

    Parameters
    ----------
    data : path, optional
        Folder with interactions.parquet, items.parquet and *.npy vectors; by default a generated shop.
    out : path
        Folder to write: shop/ data/ run/ bundle/ model_repository/.
    recipe : str or path, optional
        As of `missrec train`; auto by default.
    users : int
        Number of users of the generated shop.
    items : int
        Number of items of the generated shop.

    Returns
    -------
    dict
        ``data``, ``recall@10``, ``ndcg@10`` and ``baselines`` of the protocol ``kept_with_history_term``, the same
        under ``excluded`` and ``kept_strict``, ``triton_version``, ``served_equals_offline``, ``max_abs_diff``,
        ``recommendations``, ``seconds`` per step.

    Raises
    ------
    ParityError
        Triton's recommendations differ from the model's.
    """
    data, console = None if data is None else Path(data), Console(stderr=True)
    seconds: dict[str, float] = {}
    out = Path(out) / (data.resolve().name if data else "shop")
    folder, run, raw = out / "data", out / "run", out / "raw"
    if data:
        inputs = find_inputs(data)
    else:
        features = {"text_columns": ["title", "description"], "image_column": "image", "images": raw}
        inputs = Inputs("generated shop", raw / "interactions.parquet", raw / "items.parquet", features=features)
        with _step("generate", "a shop with texts and images", console, seconds):
            function_of("generate")(raw, users=users, items=items)
    with _step("etl", "raw tables to sessions and catalogue", console, seconds):
        report = function_of("etl")(
            inputs.interactions,
            inputs.items,
            folder,
            modality=inputs.modality,
            min_item_count=inputs.min_item_count,
        )
    if inputs.features:
        with _step("features", "texts and pictures to vectors", console, seconds):
            function_of("features")(folder, **inputs.features)
            leave_out_words_without_gain(folder)
    chosen = recipe or AUTO
    with _step("train", f"recipe {chosen}", console, seconds):
        shorter = None if data or recipe else {"train.epochs": _SHOP_EPOCHS}
        try:
            trained = function_of("train")(folder, run, recipe=chosen, settings=shorter)
        except ConfigError as error:
            raise ConfigError(error.found, error.expected, without_restart(error.cure, run)) from error
        if trained["stopped_by"] == "interrupt":
            raise KeyboardInterrupt
    with _step("evaluate", "the whole catalogue ranked for every test session", console, seconds):
        metrics = function_of("evaluate")(run)
    console.print(function_of("metrics_table")(metrics))
    with _step("export", "bundle and Triton model repository", console, seconds):
        function_of("export")(run, out / "bundle", triton=out / "model_repository")
    with _step("serve", f"embedded Triton, {_COMPARED_SESSIONS} sessions compared", console, seconds):
        served = _serve(load_run(run), out / "model_repository", out / "triton.log")
    _show(served["recommendations"], console)
    used = trained["chosen"]["recipe"] if "chosen" in trained else chosen
    summary = {"data": inputs.name, **_headline(metrics), **served, "recipe": used, "etl": report["seconds"]}
    return summary | {"seconds": {name: round(value, 1) for name, value in seconds.items()}}


def find_inputs(folder: Path) -> Inputs:
    """Describe a folder of real data.

    Of a modality's files (``text_clip.npy``, ``text_minilm.npy``) the one that covers most items is taken. The words of
    titles and brands become one more modality where that helps content-kNN, since sentence encoders blur them.

    Raises
    ------
    DataError
        The folder lacks a table, or has no modality file.
    """
    interactions, items = folder / "interactions.parquet", folder / "items.parquet"
    for file in (interactions, items):
        if not file.is_file():
            cure = "for other names use `missrec etl --interactions … --items …`"
            raise DataError(f"{file} does not exist", "interactions.parquet and items.parquet", cure)
    covered: dict[str, tuple[float, Path]] = {}
    for file in sorted(folder.glob("*_*.npy")):
        vectors = np.load(file, mmap_mode="r", allow_pickle=False)
        if vectors.ndim == 2 and np.issubdtype(vectors.dtype, np.floating):
            name, coverage = file.stem.partition("_")[0], float(vectors.any(1).mean())
            covered[name] = max(covered.get(name, (-1.0, file)), (coverage, file))
    if not covered:
        raise DataError(f"{folder} has no modality vectors", "files such as text_minilm.npy, rows as in items.parquet")
    modality = {name: file for name, (_, file) in sorted(covered.items(), reverse=True)}
    words = [name for name in _WORD_COLUMNS if name in pq.read_schema(items).names]
    texts = item_texts(pq.read_table(items, columns=words), words)
    features = {"word_columns": words} if sum(text is not None for text in texts) > 1 else {}
    return Inputs(folder.resolve().name, interactions, items, modality, features, min_item_count=_RATING_FLOOR)


def leave_out_words_without_gain(data: Path) -> None:
    """Take the modality ``words`` out of a data folder, unless content-kNN is better with it on validation.

    The words of products' titles help, those of films' do not; log lines say what was found.
    """
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    if WORDS not in catalogue.modalities or len(catalogue.modalities) == 1:
        return
    valid = Sessions.load(data / "valid", ()).with_known_target()
    without, together = content_gain(valid, catalogue, WORDS)
    gain = f"content-kNN has NDCG@10 {together:.4f} on validation with the words, {without:.4f} without"
    if together > without:
        log.info(f"{gain}: they are kept")
        return
    log.info(f"{gain}: they are left out")
    others = {name: modality for name, modality in catalogue.modalities.items() if name != WORDS}
    replace(catalogue, modalities=others).save(data / CATALOGUE_FOLDER)


@contextmanager
def _step(name: str, what: str, console: Console, seconds: dict[str, float]) -> Iterator[None]:
    console.rule(f"[bold]{name}[/bold]  {what}", align="left")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    console.print(f"{name}: {seconds[name]:.1f} s", style="green", highlight=False)


def _serve(run: LoadedRun, repository: Path, log_file: Path) -> dict[str, Any]:
    """Start Triton, compare its answers with the run's model, and request recommendations for three sessions."""
    histories = sample_histories(load_sessions(run.data, "test", run.model.event_columns), _COMPARED_SESSIONS)
    with LocalTriton(repository, log_file=log_file) as server, MISSRecClient(server.grpc_url) as client:
        log.info(f"requesting recommendations for {len(histories)} sessions, several at a time")
        parity = compare_served(client, run.model, run.catalogue, histories).require("Triton's recommendations")
        examples = _example_sessions(histories)
        sessions = raw_ids(run.catalogue, examples)
        answers = client.recommend(sessions, exclude_seen=True, side=raw_event_features(run.model, examples))
        about = _get_json(server.http_url, "")
        ranker = _get_json(server.http_url, "/models/missrec_ranker/stats")["model_stats"][0]
    titles = read_titles(run.data / CATALOGUE_FOLDER)
    return {
        "triton_version": about["version"],
        "served_equals_offline": parity.equal,
        "max_abs_diff": parity.max_abs_diff,
        "sessions_compared": parity.sessions,
        "requests_per_execution": round(ranker["inference_count"] / max(ranker["execution_count"], 1), 2),
        "recommendations": [
            {
                "session": [_named(item, titles) for item in session[-_SHOWN:]],
                "recommended": _shown(answer.item_ids, answer.scores, titles),
            }
            for session, answer in zip(sessions, answers, strict=True)
        ],
    }


def _example_sessions(histories: Sessions) -> Sessions:
    """Return three sessions, with several items each where possible."""
    several = np.flatnonzero(histories.lengths >= 3)[:3]
    return histories.take(several if len(several) else np.arange(min(3, len(histories))))


def _get_json(http_url: str, path: str) -> Any:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
    with direct.open(f"http://{http_url}/v2{path}", timeout=60) as answer:
        return json.load(answer)


def _shown(items: Sequence[RawId], scores: Sequence[float], titles: Mapping[str | int, str]) -> list[dict[str, Any]]:
    best = zip(items[:_SHOWN], scores[:_SHOWN], strict=True)
    return [_named(item, titles) | {"score": round(score, 4)} for item, score in best]


def _named(item: RawId, titles: Mapping[str | int, str]) -> dict[str, Any]:
    return {ITEM_ID: item, "title": "" if item is None else titles.get(item, "")}


def _headline(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first metrics of the model and of the other systems: of one protocol, and of the others by name."""
    by_protocol: dict[str, dict[str, Any]] = {}
    for protocol, systems in metrics["protocols"].items():
        short = {name: {key: round(values[key], 4) for key in _HEADLINE} for name, values in systems.items()}
        by_protocol[protocol] = {**short.pop("model"), "baselines": short}
    return {**by_protocol.pop(KEPT_WITH_HISTORY_TERM), **by_protocol}


def without_restart(cure: str, run: Path) -> str:
    """Return a cure that names ``--restart``, an option of `missrec train` alone, as what can be done here.

    Examples
    --------
    >>> without_restart("give another --out, or --restart to replace the run", Path("work/demo/shop/run"))
    'give another --out, or remove work/demo/shop/run to train anew'
    >>> without_restart("add --restart if the run folder holds another checkpoint", Path("run"))
    'remove run to train anew if the run folder holds another checkpoint'
    """
    told = f"remove {run} to train anew"
    return re.sub(r"(add )?--restart( to discard it| to replace the run)?", lambda _: told, cure)


def _show(recommendations: Sequence[Mapping[str, Any]], console: Console) -> None:
    columns = {ITEM_ID: "recommended", "title": "title", "score": "score"}
    for number, query in enumerate(recommendations, 1):
        console.print(f"query {number}: " + ", ".join(str(item[ITEM_ID]) for item in query["session"]), highlight=False)
        console.print("because of: " + "; ".join(item["title"][:60] for item in query["session"]), highlight=False)
        console.print(rows_table(query["recommended"], columns))
