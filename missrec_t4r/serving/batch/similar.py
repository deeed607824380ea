"""`missrec similar`: items for an item, by what a session of that item alone leads to, or by content.

``session`` asks the model as the server would be asked, for a session of one item without that item: what comes next.
``content`` compares modality tokens: the mean cosine of the modalities that both items have, computed exactly over the
whole catalogue; an item without any shared modality is not similar. It sees no behaviour and serves for substitutes.
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
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.retrieval.topk import top_items
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, UNKNOWN_ROW
from missrec_t4r.serving.batch.parquet_io import TableWriter, replace_dir
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.client.protocol import typed_id

WAYS = ("session", "content")
_ITEMS_AT_A_TIME = 256

RawItem = str | int
Similar = tuple[RawItem, list[RawItem], list[float]]
"""An item, the items most similar to it, best first, and their scores."""


def similar(
    items: Sequence[str | int] | None = None,
    *,
    out: str | Path | None = None,
    bundle: str | Path | None = None,
    run: str | Path | None = None,
    top_k: int = 10,
    by: Literal["session", "content"] = "session",
    threads: int = 1,
    progress: Progress = quiet,
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
    if by not in WAYS:
        raise ConfigError(f"--by {by!r}", " or ".join(WAYS))
    if top_k < 1:
        raise ConfigError(f"--top-k {top_k}", "at least 1")
    if items is None and out is None:
        raise ConfigError("neither --items nor --out", "ids to look up, or a file for the whole catalogue")
    started = time.monotonic()
    torch.set_num_threads(max(threads, 1))
    with bundle_or_run(bundle, run, progress=progress) as folder:
        result = _found(folder, items, out, top_k, by, threads, progress)
    return result if out is None else result | {"seconds": round(time.monotonic() - started, 2)}


def _found(
    folder: Path,
    items: Sequence[str | int] | None,
    out: str | Path | None,
    top_k: int,
    by: str,
    threads: int,
    progress: Progress,
) -> dict[str, Any]:
    """Return or write the similar items of a bundle."""
    loaded = load_bundle(folder)
    ids = (
        loaded.catalogue.ids_of(np.arange(FIRST_ITEM_ROW, loaded.catalogue.n_rows))
        if items is None
        else _known(items, loaded)
    )
    found = _by_content(loaded, ids, top_k) if by == "content" else _by_session(folder, ids, top_k, threads)
    followed = progress.track(found, f"items similar to {len(ids)} items", len(ids))
    if out is None:
        titles = read_titles(folder)
        return {
            "by": by,
            "similar": {str(item): _readable(others, scores, titles) for item, others, scores in followed},
        }
    with replace_dir(out) as aside, TableWriter(aside) as writer:
        kind = pa.string() if loaded.catalogue.id_type == "string" else pa.int64()
        for item, others, scores in followed:
            writer.write(_table(item, others, scores, kind))
        rows = writer.rows
    return {"by": by, "out": str(out), "items": len(ids), "rows": rows}


def content_similarity(loaded: LoadedBundle, rows: Tensor) -> Tensor:
    """Return the mean cosine over shared modalities, [item, catalogue]; -inf without one, and for the item itself.

    Parameters
    ----------
    loaded : LoadedBundle
    rows : Tensor [item], int64
        Catalogue rows.
    """
    tokens = loaded.model.candidates()
    total = torch.zeros(len(rows), tokens.mask.shape[1])
    shared = torch.zeros_like(total)
    for vectors, present in zip(tokens.modality, tokens.mask, strict=True):
        both = present[rows].float()[:, None] * present.float()
        total += (vectors[rows] @ vectors.T) * both
        shared += both
    scores = torch.where(shared > 0, total / shared.clamp_min(1), -torch.inf)
    scores[:, : UNKNOWN_ROW + 1] = -torch.inf
    return scores.scatter_(1, rows[:, None], -torch.inf)


@torch.inference_mode()
def _content_step(loaded: LoadedBundle, rows: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    return top_items(content_similarity(loaded, rows), top_k)


def _by_content(loaded: LoadedBundle, ids: Sequence[RawItem], top_k: int) -> Iterator[Similar]:
    rows = torch.from_numpy(loaded.catalogue.rows_of(list(ids)).copy())
    for start in range(0, len(ids), _ITEMS_AT_A_TIME):
        best, found = _content_step(loaded, rows[start : start + _ITEMS_AT_A_TIME], top_k)
        for item, scores, others in zip(ids[start : start + _ITEMS_AT_A_TIME], best, found, strict=True):
            kept = torch.isfinite(scores)
            yield item, loaded.catalogue.ids_of(others[kept].numpy()), scores[kept].tolist()


def _by_session(bundle: str | Path, ids: Sequence[RawItem], top_k: int, threads: int) -> Iterator[Similar]:
    with MISSRecClient.of_bundle(bundle, threads=threads) as client:
        for start in range(0, len(ids), _ITEMS_AT_A_TIME):
            chosen = ids[start : start + _ITEMS_AT_A_TIME]
            answers = client.recommend([[item] for item in chosen], top_k, exclude_seen=True)
            for item, answer in zip(chosen, answers, strict=True):
                yield item, list(answer.item_ids), answer.scores


def _known(items: Sequence[str | int], loaded: LoadedBundle) -> list[RawItem]:
    ids = [typed_id(item, loaded.catalogue.id_type) for item in items]
    unknown = [item for item, row in zip(ids, loaded.catalogue.rows_of(ids), strict=True) if row < FIRST_ITEM_ROW]
    if unknown or not ids:
        raise DataError(
            f"unknown items: {', '.join(map(str, unknown[:5]))}" if unknown else "no item", "items of the catalogue"
        )
    return ids


def _readable(others: list[RawItem], scores: list[float], titles: dict[RawItem, str]) -> list[dict[str, Any]]:
    return [
        {"item_id": item, "score": score} | ({"title": titles[item]} if item in titles else {})
        for item, score in zip(others, scores, strict=True)
    ]


def _table(item: RawItem, others: list[RawItem], scores: list[float], kind: pa.DataType) -> pa.Table:
    return pa.table(
        {
            ITEM_ID: pa.array([item] * len(others), kind),
            "rank": pa.array(range(1, len(others) + 1), pa.int32()),
            "similar_item_id": pa.array(others, kind),
            "score": pa.array(scores, pa.float32()),
        }
    )
