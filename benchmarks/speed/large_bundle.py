"""Enlarge a trained bundle to any number of items, in bounded memory, to measure a server of a million items.

    python -m benchmarks.speed.large_bundle --bundle work/demo/shop/bundle --items 1000000 --out work/large

Every item is a real one plus a fraction of the difference of two others, in every modality and in its ID (as in
`large_tokens`); two modalities, IDs, dynamic fusion; co-occurrence neighbours are those of the real item. Content-kNN
is left out: it takes quadratic time. ``--isotropic`` draws vectors at random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import peak_mib, reset_peak, run_as_command
from benchmarks.speed.large_tokens import MOVED, NOISE
from missrec_t4r.bundle.bundle import LoadedBundle, load_bundle
from missrec_t4r.bundle.manifest import (
    CATALOGUE_FILE,
    FEATURES_FILE,
    ITEMS_FILE,
    MODEL_FILE,
    SEARCH_FILE,
    WEIGHTS_FILE,
    write_manifest,
)
from missrec_t4r.errors import ConfigError
from missrec_t4r.io.tensor_file import TensorFile
from missrec_t4r.retrieval.index_file import write_index
from missrec_t4r.schema import FIRST_ITEM_ROW, SCHEMA_FILE, SESSION_TRANSFORM_FILE

PHI = 2.0
NEIGHBOURS = 32
_CHUNK = 1 << 16


@torch.inference_mode()
def enlarge(bundle: Path, out: Path, n_items: int, *, isotropic: bool = False, seed: int = 0) -> dict[str, float]:
    """Write a bundle of ``n_items`` items, and return the time and memory of building its retrieval index."""
    real, n_rows = load_bundle(bundle), n_items + FIRST_ITEM_ROW
    if out.exists():
        raise ConfigError(f"--out {out} exists", "a new folder for gigabytes", "name another, or remove it")
    out.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    item_encoder = real.model.item_encoder
    whole = torch.nonzero(item_encoder.presence.all(0) & item_encoder.trained_ids).flatten()
    sources = whole[torch.randint(len(whole), (3, n_rows), generator=draw)]
    _write_catalogue(real, out, sources, draw, isotropic)
    _write_weights(real, out, sources, draw)
    _write_items(real, out, sources[0, FIRST_ITEM_ROW:].numpy())
    described = json.loads((bundle / MODEL_FILE).read_text()) | {"rows": n_rows}
    described["config"] |= {"candidate_fusion": "dynamic_shared", "n_neighbours": NEIGHBOURS, "n_similar_items": 0}
    (out / MODEL_FILE).write_text(json.dumps(described))
    for name in (FEATURES_FILE, SESSION_TRANSFORM_FILE, SCHEMA_FILE):
        shutil.copyfile(bundle / name, out / name)
    write_manifest(out)
    model = load_bundle(out).model
    before, started = reset_peak(), time.perf_counter()
    write_index(model, out / SEARCH_FILE)
    took = {"build_s": round(time.perf_counter() - started, 1), "build_peak_mib": round(peak_mib())}
    write_manifest(out)
    return took | {"before_mib": round(before)}


def _moved(table: Tensor, sources: Tensor, draw: torch.Generator) -> Tensor:
    one, plus, minus = table[sources]
    noise = torch.randn(one.shape, generator=draw) * (NOISE / one.shape[1] ** 0.5)
    return F.normalize(one + MOVED * (plus - minus) + noise, dim=-1)


def _write_catalogue(real: LoadedBundle, out: Path, sources: Tensor, draw: torch.Generator, isotropic: bool) -> None:
    n_rows, interests = sources.shape[1], real.model.interests
    present = torch.arange(n_rows) >= FIRST_ITEM_ROW
    small = {"interests.centroids": interests.centroids, "interests.assignment": interests.assignment[:, sources[0]]}
    small["interests.assignment"] *= present
    small |= {f"modality.{name}.present": present for name in real.catalogue.modalities}
    widths = {name: modality.width for name, modality in real.catalogue.modalities.items()}
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.items()}
    shapes |= {f"modality.{name}.vectors": (torch.float32, (n_rows, width)) for name, width in widths.items()}
    with TensorFile(out / CATALOGUE_FILE, shapes) as file:
        for name, tensor in small.items():
            file.write(name, tensor.contiguous())
        for name, modality in real.catalogue.modalities.items():
            table = F.normalize(torch.from_numpy(modality.vectors), dim=-1)
            for start in range(0, n_rows, _CHUNK):
                part = _moved(table, sources[:, start : start + _CHUNK], draw)
                part = F.normalize(torch.randn(part.shape, generator=draw), dim=-1) if isotropic else part
                part[: max(FIRST_ITEM_ROW - start, 0)] = 0
                file.write(f"modality.{name}.vectors", part, start)


def _write_weights(real: LoadedBundle, out: Path, sources: Tensor, draw: torch.Generator) -> None:
    kept = {}
    for name, tensor in real.model.state_dict().items():
        if name.startswith(("interests.", "terms.content_knn.", "fusion.")):
            continue
        if name == "item_encoder.id_embedding.weight":
            length = tensor.norm(dim=1).mean()
            parts = sources.split(_CHUNK, dim=1)
            tensor = torch.cat([_moved(F.normalize(tensor, dim=-1), part, draw) * length for part in parts])
        elif name.startswith("terms.item_knn.") and len(tensor) == real.catalogue.n_rows:
            tensor = (tensor[:, :NEIGHBOURS] if tensor.dim() == 2 else tensor)[sources[0]]
        kept[name] = tensor.contiguous()
    save_file(kept | {"fusion.phi": torch.tensor([PHI])}, out / WEIGHTS_FILE)


def _write_items(real: LoadedBundle, out: Path, sources: np.ndarray) -> None:
    rng, n_items = np.random.default_rng(0), len(sources)
    columns = {
        "item_id": [f"L{i:09d}" for i in range(n_items)],
        "train_count": np.maximum(real.catalogue.train_count[sources], 1),
        "brand": [f"brand {i}" for i in rng.integers(0, max(n_items // 40, 1), n_items)],
        "in_stock": rng.random(n_items) < 0.9,
        "price": rng.random(n_items) * 100,
    }
    pq.write_table(pa.table(columns), out / ITEMS_FILE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the bundle and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True, help="of a trained run: two modalities and IDs")
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--isotropic", action="store_true")
    chosen = parser.parse_args(arguments)
    print(json.dumps(enlarge(chosen.bundle, chosen.out, chosen.items, isotropic=chosen.isotropic)))
    return 0


if __name__ == "__main__":
    run_as_command(main)
