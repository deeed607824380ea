"""One GPU, at most eight minutes: ETL, training, ranking and serving, each after a proof that it equals the CPU.

    make gpu-check                                   all parts
    make gpu-check PARTS="train rank"                some
    make gpu-check ETL_PYTHON=path/to/python         the part etl in an environment of its own, with cuDF
    python -m benchmarks.gpu_check --tiny --in-process         seconds on a CPU: what the tests run

Every part is a process of its own under a time limit; what it measured before the limit or an error counts, the rest is
named in ``failed``. The result file is written anew whenever a part has found something: it holds all that was found if
the whole is cut short. Nothing is downloaded: tables, sessions and embeddings are generated. Where torch finds no GPU,
parts that need one say so and measure nothing; with ``--tiny`` ``card`` is then null and all figures are those of the
CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.gpu_etl import FULL, TINY, Record, Sizes, own_line
from benchmarks.measure import RESULTS, report, write_result

LIMITS = {"etl": 180, "train": 120, "rank": 60, "serve": 110}
"""Seconds of each part, 470 together, and what the parts before it have left of theirs; ``--tiny``, which measures
nothing, has `PATIENCE` times as long."""
PATIENCE = 5
_EVERY = 2.0
"""Seconds after which the result file is written anew if a part has found something."""
_RECORDING = 6
"""Epochs after which a training is measured, however many graphs are recorded still."""
_STEPS_PER_GRAPH = 50
"""Steps of an epoch for each graph that is recorded in it: from there on the next epoch is measured."""
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
K, DIM = 50, 300
SCORES, LOSSES = 1e-5, 1e-3
"""How far scores of the same model, and (relatively) losses of the same training, may differ between the devices."""


def median_ms(call: Callable[[], object], rounds: int = 10) -> float:
    """Return the median time of a call in milliseconds, the device's work included."""
    times = []
    for number in range(rounds + 2):
        _wait()
        started = time.perf_counter()
        call()
        _wait()
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return round(float(np.median(times)), 3)


def _wait() -> None:
    if DEVICE != "cpu":
        torch.cuda.synchronize()


# Training


def train(record: Record, sizes: Sizes, work: Path, _: argparse.Namespace) -> None:
    """Epochs of recipes on a shop of Amazon Scientific's size and on sessions of MovieLens' shape; the terms."""
    from benchmarks import parity_data

    catalogue, sessions, test = parity_data.load(None)
    if sizes is TINY:
        sessions, test = (part.take(np.arange(40)) for part in (sessions, test))
    small = {"model.d_model": 16, "model.n_head": 2} if sizes is TINY else {}
    few_interests = {"paper": {"model.interest_ratio": 0.02}} if sizes is TINY else {}
    plain = small | {"train.batch_size": 512, "train.precision": "fp32", "model.dropout": 0.0}
    paper = plain | few_interests.get("paper", {})
    few, losses = sessions.take(np.arange(min(len(sessions), 512))), list[list[float]]()

    def compare(name: str, device: str, *, graphs: bool) -> None:
        """Train three epochs, and compare their losses with those of the training before."""
        trainer = _trainer("paper", paper | {"train.cuda_graphs": graphs}, catalogue, few, test, work / name, device)
        losses.append([trainer._epoch()["loss"] for _ in range(3)])
        if len(losses) > 1:
            record.equal(name, _apart(losses[-1], losses[-2]), LOSSES)
        _note_graphs(record, "equal", trainer)

    with record.step("train/equal"):
        compare("cpu", "cpu", graphs=False)
        compare("train", DEVICE, graphs=False)
    with record.step("train/graphs"):
        compare("train/graphs", DEVICE, graphs=True)
    with record.step("train/group"):  # the messages of several processes, in a group of one
        backend = "gloo" if DEVICE == "cpu" else "nccl"
        torch.distributed.init_process_group(backend, init_method=f"file://{work}/group", rank=0, world_size=1)
        try:
            trainer = _trainer("paper", paper, catalogue, few, test, work / "group", DEVICE)
            grouped = [trainer._epoch()["loss"] for _ in range(3)]
        finally:
            torch.distributed.destroy_process_group()
        record.equal("train/group", _apart(grouped, losses[-1]), LOSSES)
    for recipe, precision in (("paper", "fp32"), ("default", "auto"), ("long", "auto")):
        with record.step(f"train/waits/{recipe}"):
            settings = plain | few_interests.get(recipe, {})
            settings |= {"train.precision": precision, "train.cuda_graphs": False}  # to record them is to wait
            trainer = _trainer(recipe, settings, catalogue, few, test, work / f"waits-{recipe}", DEVICE)
            record.add(at=["waits", recipe], value=(lines := lines_that_wait(trainer)))
            if lines:
                raise RuntimeError(f"a step waits for the device in {', '.join(lines)}")
    for name, recipe, batch in (
        ("paper_512", "paper", 512),
        ("paper_4096", "paper", 4096),
        ("default_512", "default", 512),
        ("default_8192", "default", 8192),
    ):
        for graphs in (True, False):
            with record.step(f"train/{name}" if graphs else f"without_graphs/{name}"):
                settings = small | few_interests.get(recipe, {})
                settings |= {"train.batch_size": batch, "train.cuda_graphs": graphs}
                trainer = _trainer(recipe, settings, catalogue, sessions, test, work / f"{name}-{graphs}", DEVICE)
                record.add(at=["train" if graphs else "without_graphs", name], value=_rate(trainer, 0 if graphs else 1))
                _note_graphs(record, name, trainer)
    from missrec_t4r.ranking.tune import fit_terms

    long: dict[str, Any] = {"model.n_decoder_layers": 2, "model.max_sequence_length": 200, "model.d_model": 256}
    long |= {"model.d_feedforward": 512} | ({"model.max_sequence_length": 10} | small if small else {})
    catalogue, sessions = _movielens(sizes.users, 60 if sizes is TINY else 3_416)
    with record.step("without_graphs/ml1m_200"):
        without = long | {"train.cuda_graphs": False}
        trainer = _trainer("long", without, catalogue, sessions, sessions, work / "long-without", DEVICE)
        record.add(at=["without_graphs", "ml1m_200"], value=_rate(trainer))
    trained: list[Any] = []
    with record.step("train/ml1m_200"):
        trained.append(_trainer("long", long, catalogue, sessions, sessions, work / "long", DEVICE))
        record.add(at=["train", "ml1m_200"], value=_rate(trained[0]))
        _note_graphs(record, "ml1m_200", trained[0])
    with record.step("train/terms_ml1m_s"):
        if not trained:
            raise RuntimeError("there is no trained model, since train/ml1m_200 failed")
        _wait()
        started = time.perf_counter()
        fit_terms(trained[0].model, catalogue, sessions, sessions)
        _wait()
        record.add(at=["train", "terms_ml1m_s"], value=round(time.perf_counter() - started, 2))


def _apart(losses: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of the epochs' losses; infinite where one is not a number."""
    return float(np.nan_to_num(np.abs(np.divide(losses, expected) - 1).max(), nan=np.inf))


def _trainer(
    recipe: str, settings: dict[str, Any], catalogue: Any, sessions: Any, test: Any, out: Path, device: str
) -> Any:
    from missrec_t4r.config import Recipe
    from missrec_t4r.training.state import TrainingData
    from missrec_t4r.training.trainer import Trainer

    data = TrainingData(catalogue, sessions, test.take(np.arange(8)))
    trainer = Trainer(Recipe.load(recipe, settings), data, out, device)
    if trainer.graphed is not None:
        trainer.graphed.plain_steps = 1  # these are few batches: most would be over before their shape is recorded
    return trainer


def lines_that_wait(trainer: Any) -> list[str]:
    """Train an epoch and return the package's lines whose steps waited for the device, as CUDA finds them; sorted."""
    step, lines = trainer._step, set[str]()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing CUDA operation" in str(message):
            lines.add(own_line(traceback.extract_stack()) or "another package's line")

    def watched(*given: Any) -> Any:
        if trainer.status["step"] == 0:  # the first one makes the optimiser's state
            return step(*given)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            _watch("warn")
            try:
                return step(*given)
            finally:
                _watch("default")

    trainer._step = watched
    trainer._epoch()
    return sorted(lines)


def _watch(mode: str) -> None:
    if DEVICE != "cpu":
        torch.cuda.set_sync_debug_mode(mode)


def _note_graphs(record: Record, name: str, trainer: Any) -> None:
    """Note how many CUDA graphs a training has recorded; fail where it has recorded none."""
    if trainer.graphed is not None:
        record.add(at=["graphs", name], value=len(trainer.graphed.graphs))
        if not trainer.graphed.graphs:
            reason = trainer.graphed.obstacle or f"{trainer.status['step']} steps were too few"
            raise RuntimeError(f"training steps were not recorded as CUDA graphs: {reason}")


def _rate(trainer: Any, before: int = 0) -> float:
    """Return targets per second of a whole epoch, after ``before`` others and those in which graphs are recorded.

    A shape is recorded when it comes again; those of the first epoch need not, since the interests are others then.
    """
    for _ in range(before):
        trainer._epoch()
    graphed, left = trainer.graphed, _RECORDING
    while graphed is not None and not graphed.obstacle and left:
        known, steps, left = len(graphed.graphs), trainer.status["step"], left - 1
        trainer._epoch()
        if graphed.graphs and _STEPS_PER_GRAPH * (len(graphed.graphs) - known) <= trainer.status["step"] - steps:
            break
    _wait()
    record = trainer._epoch()
    _wait()
    return round(record["positions_per_s"], 1)


def _movielens(users: int, n_items: int) -> tuple[Any, Any]:
    """Return a catalogue of items with one modality, and sessions of 165 events on average."""
    import pyarrow as pa

    from missrec_t4r.data.catalogue import Catalogue, Modality
    from missrec_t4r.data.sessions import Sessions
    from missrec_t4r.schema import FIRST_ITEM_ROW

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.6, 1.0, users), 18, 2_300).astype(int)
    popularity = 1 / np.arange(1, n_items + 1) ** 0.7
    drawn = rng.choice(n_items, lengths.sum(), p=popularity / popularity.sum()) + FIRST_ITEM_ROW
    counts = np.bincount(drawn, minlength=n_items + FIRST_ITEM_ROW)[FIRST_ITEM_ROW:]
    vectors = rng.normal(size=(n_items + FIRST_ITEM_ROW, 384)).astype(np.float32)
    present = np.arange(len(vectors)) >= FIRST_ITEM_ROW
    items = pa.table({"item_id": np.arange(n_items), "train_count": counts})
    text = Modality(vectors * present[:, None], present, {"name": "random"})
    return Catalogue(items, {"text": text}), Sessions.from_lists(np.split(drawn, lengths.cumsum()[:-1]))


# Ranking


def rank(record: Record, sizes: Sizes, work: Path, _: argparse.Namespace) -> None:
    """The exact top 50 from session vectors, as a server searches on a GPU, on a CPU too."""
    from missrec_t4r.retrieval.device_search import DeviceItems, search_together
    from missrec_t4r.retrieval.topk import scan_bounds, search

    with torch.inference_mode():
        for rows in (2_000, 40_000):  # the CPU's search of sessions together, and one after the other
            with record.step(f"rank/{rows}"):
                table = _table(rows, "cpu")
                vectors = F.normalize(torch.randn(16, DIM, generator=torch.Generator().manual_seed(1)), dim=-1)
                expected = search(table, query := _query(table, vectors), scan_bounds(table, query), K)
                items = DeviceItems.place(table, torch.device(DEVICE))
                found, _ = search_together(items, _query(table, vectors.to(DEVICE)), K)
                record.equal(f"rank/{rows}", _difference(found, expected), SCORES)
        copy_rate = _copy_rate()
        for rows in sizes.tables:
            with record.step(f"rank/{rows}"):
                items = DeviceItems.place(_table(rows, DEVICE), torch.device(DEVICE))
                size = items.rough.nbytes
                for batch in (1, 64):
                    query = _query(items.table, F.normalize(torch.randn(batch, DIM, device=DEVICE), dim=-1))
                    ms = median_ms(lambda i=items, q=query: search_together(i, q, K))
                    record.add(at=["rank", f"{rows}/{batch}"], value=ms)
                    roof = {"tokens_gib": round(size / 2**30, 2), "at_copy_rate_ms": round(1e3 * size / copy_rate, 3)}
                    record.add(at=["roofline", f"{rows}/{batch}"], value=roof)
                del items, query


def _table(rows: int, device: str) -> Any:
    """Return items with two random tokens each, laid out as `pack_items` does, without a second copy of them."""
    from missrec_t4r.retrieval.packed_scores import PackedItems

    draw = torch.Generator(device).manual_seed(0)
    tokens = torch.empty(2 * rows, DIM, device=device)
    for piece in tokens.split(1 << 18):
        piece.copy_(F.normalize(torch.randn(piece.shape, device=device, generator=draw), dim=-1))
    place = torch.arange(2 * rows, device=device).view(2, rows)
    modality = torch.arange(2, device=device).unsqueeze(1).expand(2, rows)
    return PackedItems(tokens, place, modality, place[0], torch.full((rows,), 2.0, device=device))


def _query(table: Any, vectors: torch.Tensor) -> Any:
    from missrec_t4r.retrieval.topk import Query

    shape, device = (len(vectors), table.n_rows), vectors.device
    nothing = torch.zeros(1, 1, device=device).expand(shape)
    return Query(vectors, nothing, torch.ones(shape, dtype=torch.bool, device=device))


def _difference(found: list[Any], expected: list[Any]) -> float:
    """Return the largest difference of scores by place; infinite where rows differ whose scores do not tie."""
    largest = 0.0
    for one, other in zip(found, expected, strict=True):
        scores = one.scores.cpu()
        largest = max(largest, float((scores - other.scores).abs().max()))
        moved = one.rows.cpu() != other.rows
        near = torch.isclose(scores[:, None], scores[None], atol=SCORES, rtol=0).sum(1) > 1
        near[-1] = True  # the next one after the list may tie with its last
        if bool((moved & ~near).any()):
            return float("inf")
    return largest


def _copy_rate() -> float:
    """Return bytes per second that this device reads and writes when it copies."""
    source = torch.empty(1 << (30 if DEVICE != "cpu" else 26), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)


# Serving


def serve(record: Record, sizes: Sizes, work: Path, options: argparse.Namespace) -> None:
    """The ensemble through a real Triton, or in process; answers against those of the CPU in process."""
    from benchmarks.speed.serving_shop import bundle_of
    from missrec_t4r.serving.client.client import MISSRecClient
    from missrec_t4r.serving.client.in_process import InProcessTransport

    for items in sizes.items:
        with record.step(f"serve/{items}"):
            bundle = bundle_of(
                work / f"bundle-{items}", items, d_model=DIM if sizes is FULL else 16, most_sessions=20_000
            )
            rng = np.random.default_rng(0)
            sessions = [
                [f"B{item:09d}" for item in rng.integers(0, items, length)] for length in rng.integers(1, 30, 256)
            ]
            answers = []
            for device in ("cpu", DEVICE):
                transport = InProcessTransport(bundle, device=device, threads=2)
                with MISSRecClient("bundle", transport=transport) as client:
                    answers.append(client.recommend(sessions[:64], top_k=20))
            pairs = list(zip(*answers, strict=True))
            apart = max(float(np.abs(np.subtract(a.scores, b.scores)).max()) for a, b in pairs)
            record.equal(f"serve/{items}", apart, SCORES)
            with record.step(f"serve/{items}/threads"):
                _with_threads(record, items, transport, sessions[:64], answers[1])
            prefix = "" if items == sizes.items[0] else f"{items}_"
            if not options.in_process:
                del transport, client  # their memory on the card is the server's now
                torch.cuda.empty_cache()
                _through_triton(record, bundle, work, prefix, sizes.seconds)
            else:
                record.add(at=["served_by"], value="in process")
                with MISSRecClient("bundle", transport=transport) as client:
                    for batch in (1, 64):
                        ms = median_ms(lambda c=client, given=sessions[:batch]: c.recommend(given, top_k=20))
                        record.add(at=["serve", f"{prefix}p50_{batch}"], value=ms)
                    record.add(at=["serve", f"{prefix}sessions_per_s"], value=round(1e3 * 64 / ms, 1))


def _with_threads(record: Record, items: int, transport: Any, sessions: list[list[str]], alone: list[Any]) -> None:
    """Compare the answers of eight threads with those of one, and note how many graphs the encoder recorded."""
    from missrec_t4r.retrieval.graphed_encoder import GraphedEncoder
    from missrec_t4r.serving.client.client import MISSRecClient

    with MISSRecClient("bundle", transport=transport) as client, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda session: client.recommend([session], top_k=20)[0], sessions))
    apart = max(float(np.abs(np.subtract(a.scores, b.scores)).max()) for a, b in zip(found, alone, strict=True))
    record.equal(f"serve/{items}/threads", apart, SCORES)
    encoder = transport.ranker.ranker.encoder.plain
    if isinstance(encoder, GraphedEncoder):
        record.add(at=["graphs", str(items)], value=len(encoder.graphs))
        if not encoder.graphs:
            raise RuntimeError(f"the session encoder was recorded as no CUDA graph: {encoder.obstacle}")


def _through_triton(record: Record, bundle: Path, work: Path, prefix: str, seconds: float) -> None:
    from benchmarks.speed.serving import OUTPUTS, Served, in_turns, ours, started
    from missrec_t4r.serving.triton.repository import write_repository

    repository = work / bundle.name.replace("bundle", "triton")
    write_repository(bundle, repository, threads=2)
    with started(repository) as (server, _):
        times = in_turns({"ours": Served(server.grpc_url, "missrec", OUTPUTS, ours(bundle))}, seconds, 1)
    found = times["ours"].summary()
    record.add(at=["served_by"], value="triton, gRPC")
    for batch in (1, 64):
        record.add(at=["serve", f"{prefix}p50_{batch}"], value=found["p50_ms"][str(batch)])
    record.add(at=["serve", f"{prefix}sessions_per_s"], value=found["throughput"])


# All parts

PARTS = {"train": train, "rank": rank, "serve": serve}
"""Parts of this module; `gpu_etl.py` is the first one, which runs without torch."""
ALL = ("etl", *PARTS)


def check(parts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run every part in its own process and return what all of them found, which the file holds meanwhile."""
    result: dict[str, Any] = {"card": None, "driver": _driver(), "rapids": None, "torch": torch.__version__}
    if DEVICE != "cpu":
        result["card"] = torch.cuda.get_device_name()
    result |= {"tiny": options.tiny, "equal": True, "compared": {}, "bounds": {}, "failed": []}
    result |= {part: {} for part in parts}
    if DEVICE == "cpu" and not options.tiny:
        result["failed"] = [f"{part}: {_no_gpu(result['driver'])}" for part in parts if part in PARTS]
        parts = [part for part in parts if part not in PARTS]
    left_over = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            found, started = Path(folder) / f"{part}.jsonl", time.perf_counter()
            limit = LIMITS[part] * (PATIENCE if options.tiny else 1) + left_over
            left = [f"{part}: not finished", *(f"{one}: not begun" for one in parts[number + 1 :])]

            def save(before: Any = result, found: Path = found, left: list[str] = left) -> None:
                write_result("gpu-check", _with(before, found, left), options.results)

            result = _with(result, found, _run(part, found, limit, options, save))
            seconds = time.perf_counter() - started
            result.setdefault("seconds", {})[part] = round(seconds, 1)
            left_over = max(limit - seconds, 0.0)
    return result


def _run(part: str, found: Path, limit: float, options: argparse.Namespace, save: Callable[[], object]) -> list[str]:
    """Run a part to its end or its limit, ``save`` whenever it has found something, and return how it failed.

    Its temporary files are in a folder of their own: a part that is stopped would leave tens of gigabytes behind.
    """
    known, errors, work = 0, found.with_suffix(".log"), found.with_suffix("")
    work.mkdir()
    place = os.environ | {"TMPDIR": str(work)}
    started = time.perf_counter()
    save()
    with errors.open("wb") as log, subprocess.Popen(_command(part, found, options), stderr=log, env=place) as process:
        try:
            while (left := started + limit - time.perf_counter()) > 0 and _runs(process, min(left, _EVERY)):
                if found.is_file() and (size := found.stat().st_size) > known:
                    known = size
                    save()
            if process.poll() is None:
                return [f"{part}: stopped at its limit of {round(limit, 2):g} s"]
        finally:
            process.kill()
            process.wait()
            shutil.rmtree(work, ignore_errors=True)
    if process.returncode:
        last = (errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"])[-1]
        return [f"{part}: ended with {process.returncode}: {last[:300]}"]
    return []


def _command(part: str, found: Path, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--part", part]
    if part == "etl":
        command = [str(options.etl_python), "-m", "benchmarks.gpu_etl"]
    command += ["--record", str(found), *["--tiny"] * options.tiny]
    return command + ["--in-process"] * (options.in_process and part == "serve")


def _runs(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the end of a process, at most so long; return whether it still runs."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _with(result: dict[str, Any], found: Path, failed: Sequence[str]) -> dict[str, Any]:
    """Return a copy of the result with the whole lines of a part's findings, and with how it failed."""
    merged: dict[str, Any] = copy.deepcopy(result)
    lines = found.read_text(encoding="utf-8") if found.is_file() else ""
    for line in lines[: lines.rfind("\n") + 1].splitlines():
        _merge(merged, json.loads(line))
    merged["failed"] += failed
    return merged


def _merge(result: dict[str, Any], line: dict[str, Any]) -> None:
    if "failed" in line:
        result["failed"].append(line["failed"])
    elif "compared" in line:
        result["compared"][line["compared"]] = line["difference"]
        result["bounds"][line["compared"]] = line["bound"]
        result["equal"] &= line["equal"]
        if not line["equal"]:
            found = f"{line['difference']:.3g} apart, at most {line['bound']:g} expected"
            result["failed"].append(f"{line['compared']}: {found}")
    else:
        *groups, name = line["at"]
        at = result
        for group in groups:
            at = at.setdefault(group, {})
        at[name] = line["value"]


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def _no_gpu(driver: str | None) -> str:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    found = f"nvidia-smi shows driver {driver}" if driver else "nvidia-smi shows no driver"
    return (
        f"torch {torch.__version__}, built {built}, finds no GPU ({found}), so nothing would run on one: not measured; "
        "docs/howto/gpu.md, Install, says which torch a driver needs"
    )


def _table_of(result: dict[str, Any]) -> str:
    """Return all figures with their units and what they are to be compared with, then what is wrong."""
    card = result["card"] or ("no GPU: figures of the CPU" if result["tiny"] else "no GPU")
    lines = [f"{card}, driver {result['driver']}, torch {result['torch']}, RAPIDS {result['rapids']}"]
    for part in ALL:
        for name, value in result.get(part, {}).items():
            lines.append(f"{part:>6}  {name:<18} {value:>12,} {_unit(part, name)}{_beside(result, part, name)}")
    plain = {
        name: value for name, value in result.get("without_graphs", {}).items() if name not in result.get("train", {})
    }
    lines += [f" train  {name:<18} {value:>12,} targets/s, without graphs" for name, value in plain.items()]
    for name, difference in result["compared"].items():
        bound = result["bounds"][name]
        verdict = "equal" if difference <= bound else "DIFFERENT"
        lines.append(f" equal  {name:<18} {difference:>12.3g} apart, at most {bound:g}: {verdict}")
    wrong = [f"FAILED  {one}" for one in result["failed"]]
    good = sum(difference <= result["bounds"][name] for name, difference in result["compared"].items())
    verdict = f"{good} of {len(result['compared'])} comparisons equal; {len(wrong) or 'nothing'} failed"
    return "\n".join([*lines, *wrong, verdict])


def _unit(part: str, name: str) -> str:
    if name.endswith("sessions_per_s"):
        return "sessions/s"
    if part == "etl" or name.endswith("_s"):
        return "s"
    return "targets/s" if part == "train" else "ms"


def _beside(result: dict[str, Any], part: str, name: str) -> str:
    """Return what a figure is to be compared with: plain steps, one reading of the tokens, or nothing."""
    if part == "train" and (plain := result.get("without_graphs", {}).get(name)):
        share, shapes = result[part][name] / plain, result.get("graphs", {}).get(name, 0)
        return f"  {share:.2f} times the {plain:,} without graphs; {shapes} shapes recorded"
    if part == "rank" and (roof := result.get("roofline", {}).get(name)):
        return f"  to read the tokens once takes {roof['at_copy_rate_ms']:,} ms"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and write the result, or run one part (``--part``)."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("parts", nargs="*", help=f"of {', '.join(ALL)}; all without any")
    options.add_argument("--tiny", action="store_true", help="smallest sizes, to see that every part runs")
    options.add_argument("--in-process", action="store_true", help="serve without Triton, where none can run")
    etl_help = "an interpreter with NVTabular and cuDF for the part etl, where this one has none"
    options.add_argument("--etl-python", type=Path, default=Path(sys.executable), help=etl_help)
    options.add_argument("--results", type=Path, default=RESULTS, help="folder of the result")
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if unknown := set(chosen.parts) - set(ALL):
        options.error(f"no part {', '.join(sorted(unknown))}; expected: {', '.join(ALL)}")
    if chosen.part:
        with tempfile.TemporaryDirectory() as work:
            PARTS[chosen.part](Record(chosen.record), TINY if chosen.tiny else FULL, Path(work), chosen)
        return 0
    result = check(chosen.parts or list(ALL), chosen)
    print(_table_of(result))
    report("gpu-check", result, chosen.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
