"""Time and peak memory of a training step on a catalogue too large for the full softmax: chunked and sampled.

    python -m benchmarks.speed.large_catalogue                      # a million items: 4 GiB on disk, minutes
    python -m benchmarks.speed.large_catalogue --items 100000       # a tenth

The catalogue has random vectors in files; interests are given, as between two discoveries (benchmarks.speed.interests
measures those). Every softmax runs in its own process, so that peaks are separate. A step is item encoder, encoder,
decoder, loss, gradients and optimiser.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.measure import gemm_rate, peak_mib, report, reset_peak
from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.schema import FIRST_ITEM_ROW
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.optim import Optimiser
from missrec_t4r.training.step import choose_softmax, training_loss

MODALITIES = ("text", "image")
SOFTMAXES = ("chunked", "sampled")
_ROWS_AT_ONCE = 1 << 16


def main() -> None:
    """Measure every softmax in a process of its own and write the result."""
    options = _options()
    if options.only:
        print(json.dumps(measure(options, options.only, Path(options.folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for number, name in enumerate(MODALITIES):
            _write_vectors(Path(folder) / f"{name}.npy", options.items + FIRST_ITEM_ROW, options.width, number)
        print(f"vectors written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
        found = {softmax: _in_own_process(softmax, folder) for softmax in options.softmax}
    payload = {
        "items": options.items,
        "modalities": len(MODALITIES),
        "width": options.width,
        "d_model": options.d_model,
        "positions": options.sessions * options.length,
        "negatives": options.negatives,
        "chunk_size": options.chunk_size,
        "gemm_gflop_s": round(gemm_rate(), 1),
        "full_table_mib": round(options.sessions * options.length * options.items * 4 / 2**20),
        **found,
    }
    report(
        "large-catalogue" if options.items >= 1_000_000 else f"large-catalogue-{options.items}", payload, options.out
    )


def measure(options: argparse.Namespace, softmax: str, folder: Path) -> dict[str, Any]:
    """Return seconds per step, by phase, and memory before and during it."""
    model = _model(options, folder).train()
    train = TrainConfig.paper(softmax=softmax, negatives=options.negatives, chunk_size=options.chunk_size)  # type: ignore[arg-type]
    batch, n_rows = _batch(options), options.items + FIRST_ITEM_ROW
    chosen = choose_softmax(train, n_rows, options.sessions * options.length, torch.ones(n_rows), torch.device("cpu"))
    table = model.item_encoder.id_embedding
    assert table is not None
    by_rows = frozenset({table.weight}) if isinstance(chosen, SampledSoftmax) else frozenset()
    optimiser = Optimiser(model, train, by_rows, torch.device("cpu"))
    held, steps = reset_peak(), []
    for _ in range(options.steps):
        at = [time.perf_counter()]
        optimiser.zero_grad()
        loss = training_loss(model, batch, train, softmax=chosen)
        at.append(time.perf_counter())
        optimiser.backward(loss)
        at.append(time.perf_counter())
        optimiser.step(1e-3)
        at.append(time.perf_counter())
        steps.append(np.diff(at))
    forward, backward, update = np.array(steps[1:] or steps).mean(0)  # the first one also reads the files
    return {
        "step_s": round(float(forward + backward + update), 3),
        "forward_s": round(float(forward), 3),
        "backward_s": round(float(backward), 3),
        "optimiser_s": round(float(update), 3),
        "first_step_s": round(float(steps[0].sum()), 3),
        "loss": round(float(loss.detach()), 4),
        "before_mib": round(held),
        "peak_mib": round(peak_mib()),
    }


def _in_own_process(softmax: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--only", softmax, "--folder", folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{softmax}: {found}", file=sys.stderr)
    return found


def _model(options: argparse.Namespace, folder: Path) -> MISSRec:
    n_rows = options.items + FIRST_ITEM_ROW
    present = np.arange(n_rows) >= FIRST_ITEM_ROW
    modalities = {name: Modality(np.load(folder / f"{name}.npy", "c"), present) for name in MODALITIES}
    items = pa.table({"item_id": pa.array(range(options.items)), "train_count": pa.array(np.ones(options.items, int))})
    config = MISSRecConfig(
        d_model=options.d_model,
        interest_ratio=options.interest_ratio,
        n_neighbours=0,
        n_similar_items=0,
        candidate_fusion="dynamic_shared",
        modality_dropout=0.2,
        id_dropout=0.1,
    )
    torch.manual_seed(0)
    model = build_missrec(config, Catalogue(items, modalities))
    interests = model.interests
    interests.centroids.normal_()
    interests.assignment[:, FIRST_ITEM_ROW:] = torch.randint(
        1, len(interests.centroids), (len(MODALITIES), options.items)
    )
    return model


def _batch(options: argparse.Namespace) -> TrainingBatch:
    """Return sessions of random items and their next items."""
    draw = torch.Generator().manual_seed(0)
    sessions = torch.randint(
        FIRST_ITEM_ROW, options.items, (options.sessions, options.length + 1), generator=draw, dtype=torch.int64
    )
    return TrainingBatch(sessions[:, :-1].contiguous(), sessions[:, 1:].unsqueeze(-1).contiguous())


def _write_vectors(file: Path, n_rows: int, width: int, seed: int) -> None:
    table = np.lib.format.open_memmap(file, "w+", np.float32, (n_rows, width))
    draw = np.random.default_rng(seed)
    for start in range(0, n_rows, _ROWS_AT_ONCE):
        table[start : start + _ROWS_AT_ONCE] = draw.standard_normal(
            (len(table[start : start + _ROWS_AT_ONCE]), width), np.float32
        )
    table[:FIRST_ITEM_ROW] = 0
    table.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One training step on a large catalogue.")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512, help="of the modality vectors")
    parser.add_argument("--d-model", type=int, default=300)
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--length", type=int, default=8, help="positions per session; 64 x 8 are the paper's 512")
    parser.add_argument("--negatives", type=int, default=8192)
    parser.add_argument("--chunk-size", type=int, default=8192)
    parser.add_argument("--interest-ratio", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=3, help="the first one is reported apart")
    parser.add_argument("--softmax", nargs="+", choices=SOFTMAXES, default=list(SOFTMAXES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
