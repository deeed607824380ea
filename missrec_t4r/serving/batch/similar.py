"""`missrec similar`: items similar to an item, by the recommendations of a session of that item alone, or by content.

``session``: the recommendations for a session of one item, without that item; what people go on to.
``content``: the mean cosine of the modality embeddings over the modalities that both items have, exact over the whole
catalogue; an item without a shared modality is not similar. Independent of interactions; finds substitutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from missrec_t4r.bundle.bundle import LoadedBundle, load_bundle
from missrec_t4r.bundle.from_run import bundle_or_run
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import track
from missrec_t4r.retrieval.topk import top_items
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, UNKNOWN_ROW
from missrec_t4r.serving.batch.parquet_io import write_results
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.client.in_process import torch_threads
from missrec_t4r.serving.client.protocol import typed_id

METHODS = ("session", "content")
_ITEMS_AT_A_TIME = 256

RawItem = str | int
Similar = tuple[RawItem, list[RawItem], list[float]]
"""An item, its most similar items, best first, and their scores."""


def similar(
    items: Sequence[str | int] | None = None,
    *,
    out: str | Path | None = None,
    bundle: str | Path | None = None,
    run: str | Path | None = None,
    top_k: int = 10,
    by: Literal["session", "content"] = "session",
    threads: int = 1,
) -> dict[str, Any]:
    """Find the items that are most similar to an item, by sessions or by content.

    Parameters
    ----------
    items : sequence of str or int, optional
        Item ids, comma-separated; all items of the catalogue without it, which needs --out.
    out : path, optional
        Parquet file to write, with item_id, rank, similar_item_id and score.
    bundle : path, optional
        Bundle written by `missrec export`.
    run : path, optional
        Run folder written by `missrec train`, in place of a bundle.
    top_k : int
        Similar items per item.
    by : {"session", "content"}
        session: what is recommended to a session of that item alone. content: cosine similarity of modality vectors.
    threads : int
        Number of torch threads.

    Returns
    -------
    dict
        ``similar`` by item (with titles where the catalogue has them), or what was written.

    Raises
    ------
    DataError
        An item is not in the catalogue.
    """
    if by not in METHODS:
        raise ConfigError(f"--by {by!r}", " or ".join(METHODS))
    require_at_least(1, top_k=top_k, threads=threads)
    if items is None and out is None:
        raise ConfigError("neither --items nor --out", "ids to look up, or a file for the whole catalogue")
    started = time.monotonic()
    with bundle_or_run(bundle, run) as folder, torch_threads(threads):
        result = _find(folder, items, out, top_k, by)
    return result if out is None else result | {"seconds": round(time.monotonic() - started, 2)}


def _find(
    folder: Path,
    items: Sequence[str | int] | None,
    out: str | Path | None,
    top_k: int,
    by: str,
) -> dict[str, Any]:
    """Return the similar items, or write them to ``out``."""
    loaded = load_bundle(folder)
    ids = (
        loaded.catalogue.ids_of(np.arange(FIRST_ITEM_ROW, loaded.catalogue.n_rows))
        if items is None
        else _require_items(items, loaded)
    )
    results = _by_content(loaded, ids, top_k) if by == "content" else _by_session(folder, ids, top_k)
    results = track(results, f"items similar to {len(ids)} items", len(ids))
    if out is None:
        titles = read_titles(folder)
        return {
            "by": by,
            "similar": {str(item): _with_titles(others, scores, titles) for item, others, scores in results},
        }
    with write_results(out) as writer:
        id_type = pa.string() if loaded.catalogue.id_type == "string" else pa.int64()
        for item, others, scores in results:
            writer.write(_table(item, others, scores, id_type))
        rows = writer.rows
    return {"by": by, "out": str(out), "items": len(ids), "rows": rows}


def content_similarity(loaded: LoadedBundle, rows: Tensor) -> Tensor:
    """Return the mean cosine over shared modalities; -inf without one, and for the item itself.

    Parameters
    ----------
    loaded : LoadedBundle
    rows : Tensor [item], int64
        Catalogue rows.

    Returns
    -------
    Tensor [item, catalogue]
    """
    candidates = loaded.model.candidates()
    rows = rows.to(candidates.mask.device)
    total = torch.zeros(len(rows), candidates.mask.shape[1], device=rows.device)  # [item, catalogue]
    shared = torch.zeros_like(total)
    for embeddings, present in zip(candidates.modality, candidates.mask, strict=True):  # one modality at a time
        both = present[rows].float()[:, None] * present.float()
        total += (embeddings[rows] @ embeddings.T) * both  # embeddings have unit length
        shared += both
    scores = torch.where(shared > 0, total / shared.clamp_min(1), -torch.inf)
    scores[:, : UNKNOWN_ROW + 1] = -torch.inf
    return scores.scatter_(1, rows[:, None], -torch.inf)


@torch.inference_mode()
def _top_by_content(loaded: LoadedBundle, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    best, similar_rows = top_items(content_similarity(loaded, rows), top_k)
    return best.cpu(), similar_rows.cpu()


def _by_content(loaded: LoadedBundle, ids: Sequence[RawItem], top_k: int) -> Iterator[Similar]:
    rows = torch.from_numpy(loaded.catalogue.rows_of(list(ids)).copy())
    for start in range(0, len(ids), _ITEMS_AT_A_TIME):
        batch = slice(start, start + _ITEMS_AT_A_TIME)
        top_scores, top_rows = _top_by_content(loaded, rows[batch], top_k)
        for item, scores, others in zip(ids[batch], top_scores, top_rows, strict=True):
            comparable = torch.isfinite(scores)
            yield item, loaded.catalogue.ids_of(others[comparable].numpy()), scores[comparable].tolist()


def _by_session(bundle: str | Path, ids: Sequence[RawItem], top_k: int) -> Iterator[Similar]:
    with MISSRecClient.of_bundle(bundle) as client:
        for start in range(0, len(ids), _ITEMS_AT_A_TIME):
            batch = ids[start : start + _ITEMS_AT_A_TIME]
            recommendations = client.recommend([[item] for item in batch], top_k, exclude_seen=True)
            for item, recommendation in zip(batch, recommendations, strict=True):
                yield item, list(recommendation.item_ids), recommendation.scores


def _require_items(items: Sequence[str | int], loaded: LoadedBundle) -> list[RawItem]:
    ids = [typed_id(item, loaded.catalogue.id_type) for item in items]
    unknown = [item for item, row in zip(ids, loaded.catalogue.rows_of(ids), strict=True) if row < FIRST_ITEM_ROW]
    if unknown or not ids:
        raise DataError(
            f"unknown items: {', '.join(map(str, unknown[:5]))}" if unknown else "no item", "items of the catalogue"
        )
    return ids


def _with_titles(others: list[RawItem], scores: list[float], titles: dict[RawItem, str]) -> list[dict[str, Any]]:
    return [
        {"item_id": item, "score": score} | ({"title": titles[item]} if item in titles else {})
        for item, score in zip(others, scores, strict=True)
    ]


def _table(item: RawItem, others: list[RawItem], scores: list[float], id_type: pa.DataType) -> pa.Table:
    return pa.table(
        {
            ITEM_ID: pa.array([item] * len(others), id_type),
            "rank": pa.array(range(1, len(others) + 1), pa.int32()),
            "similar_item_id": pa.array(others, id_type),
            "score": pa.array(scores, pa.float32()),
        }
    )
