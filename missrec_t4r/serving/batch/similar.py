"""`missrec similar`: items similar to an item, by the recommendations of a session of that item alone, or by content.

``session``: the recommendations for a session of one item, without that item; what people go on to.
``content``: the mean cosine of the modality embeddings over the modalities that both items have, exact over the whole
catalogue; an item without a shared modality is not similar. Independent of interactions; finds substitutes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from missrec_t4r.arrays import Floats, Ints
from missrec_t4r.bundle.bundle import LoadedBundle, bundle_or_run, load_bundle
from missrec_t4r.config.checks import require_at_least, require_choices
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import top_items
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.progress import track
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.schema import FIRST_ITEM_ROW, ITEM_ID, PADDING_ROW, UNKNOWN_ROW
from missrec_t4r.serving.batch.parquet_io import write_tables
from missrec_t4r.serving.batch.source import given_bundle
from missrec_t4r.serving.client.client import read_titles
from missrec_t4r.serving.client.in_process import torch_threads
from missrec_t4r.serving.client.protocol import typed_id

METHODS = ("session", "content")
_ITEMS_AT_A_TIME = 256

Search = Callable[[Ints, int], tuple[Ints, Floats]]
"""Rows of items and ``top_k`` to the rows of similar items [item, k], best first and 0-padded, and their scores."""


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
        Bundle written by `missrec export`, or folder of `missrec deploy`: the one that it serves.
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
    require_choices(by=(by, METHODS))
    require_at_least(1, top_k=top_k, threads=threads)
    if items is None and out is None:
        raise ConfigError("neither --items nor --out", "ids to look up, or a file for the whole catalogue")
    started = time.monotonic()
    with bundle_or_run(bundle and given_bundle(bundle), run) as folder, torch_threads(threads):
        found = SimilarItems(folder)
        if out is None:
            return {"by": by, "similar": found.of(() if items is None else items, top_k, by)}
        catalogue = found.loaded.catalogue
        rows = np.arange(FIRST_ITEM_ROW, catalogue.n_rows) if items is None else _rows_of(items, catalogue)
        n_rows = write_tables(out, found.tables(rows, top_k, by))
    seconds = round(time.monotonic() - started, 2)
    return {"by": by, "out": str(out), "items": len(rows), "rows": n_rows, "seconds": seconds}


class SimilarItems:
    """The search for similar items in a bundle, which is read once; so is what a method computes of all items.

    Parameters
    ----------
    bundle : Path
    """

    def __init__(self, bundle: Path) -> None:
        self.bundle, self.loaded = bundle, load_bundle(bundle)
        self._searches: dict[str, Search] = {}

    @cached_property
    def titles(self) -> Mapping[Any, str]:
        """Titles by item id, where the catalogue has them."""
        return read_titles(self.bundle)

    def of(self, items: Sequence[str | int], top_k: int, by: str) -> dict[str, list[dict[str, Any]]]:
        """Return for every item the similar ones, best first, as `similar` does.

        Raises
        ------
        DataError, ConfigError
            An item is not in the catalogue, or there is no such method.
        """
        require_choices(by=(by, METHODS))
        require_at_least(1, top_k=top_k)
        catalogue = self.loaded.catalogue
        rows = _rows_of(items, catalogue)
        by_item: dict[str, list[dict[str, Any]]] = {str(item): [] for item in catalogue.ids_of(rows)}
        for entry in (entry for table in self.tables(rows, top_k, by) for entry in table.to_pylist()):
            other = entry["similar_item_id"]
            title = {"title": self.titles[other]} if other in self.titles else {}
            by_item[str(entry[ITEM_ID])].append({"item_id": other, "score": entry["score"]} | title)
        return by_item

    def tables(self, rows: Ints, top_k: int, by: str) -> Iterator[pa.Table]:
        """Yield the items similar to those in ``rows``, best first, some hundred items at a time."""
        catalogue = self.loaded.catalogue
        id_type = pa.string() if catalogue.id_type == "string" else pa.int64()
        if by not in self._searches:
            self._searches[by] = (_content_search if by == "content" else _session_search)(self.loaded)
        starts = range(0, len(rows), _ITEMS_AT_A_TIME)
        for start in track(starts, f"items similar to {len(rows)} items, {_ITEMS_AT_A_TIME} at a time"):
            batch = rows[start : start + _ITEMS_AT_A_TIME]
            others, scores = self._searches[by](batch, top_k)
            item, rank = np.nonzero(others > PADDING_ROW)
            yield pa.table(
                {
                    ITEM_ID: pa.array(catalogue.ids_of(batch[item]), id_type),
                    "rank": pa.array(rank + 1, pa.int32()),
                    "similar_item_id": pa.array(catalogue.ids_of(others[item, rank]), id_type),
                    "score": pa.array(scores[item, rank], pa.float32()),
                }
            )


def content_similarity(candidates: CandidateEmbeddings, rows: Tensor) -> Tensor:
    """Return the mean cosine over shared modalities; -inf without one, and for the item itself.

    Parameters
    ----------
    candidates : CandidateEmbeddings
        All catalogue rows.
    rows : Tensor [item], int64
        Catalogue rows.

    Returns
    -------
    Tensor [item, catalogue]
    """
    rows = rows.to(candidates.mask.device)
    total = torch.zeros(len(rows), candidates.mask.shape[1], device=rows.device)  # [item, catalogue]
    shared = torch.zeros_like(total)
    for embeddings, present in zip(candidates.modality, candidates.mask, strict=True):  # one modality at a time
        has_modality = present[rows].float()[:, None] * present.float()  # of both items
        total += (embeddings[rows] @ embeddings.T) * has_modality  # embeddings have unit length
        shared += has_modality
    scores = torch.where(shared > 0, total / shared.clamp_min(1), -torch.inf)
    scores[:, : UNKNOWN_ROW + 1] = -torch.inf
    return scores.scatter_(1, rows[:, None], -torch.inf)


def _rows_of(items: Sequence[str | int], catalogue: Catalogue) -> Ints:
    ids = [*dict.fromkeys(typed_id(item, catalogue.id_type) for item in items)]
    rows = catalogue.rows_of(ids)
    unknown = [item for item, row in zip(ids, rows, strict=True) if row < FIRST_ITEM_ROW]
    if unknown or not ids:
        raise DataError(
            f"unknown items: {', '.join(map(str, unknown[:5]))}" if unknown else "no item", "items of the catalogue"
        )
    return rows


def _session_search(loaded: LoadedBundle) -> Search:
    ranker = Ranker(loaded.model, loaded.catalogue, tables=loaded.tables)

    def find(rows: Ints, top_k: int) -> tuple[Ints, Floats]:
        ranking = ranker.rank(rows[:, None], top_k=top_k, exclude_seen=True)
        return ranking.rows, ranking.scores

    return find


@torch.inference_mode()
def _content_search(loaded: LoadedBundle) -> Search:
    candidates = loaded.model.candidates()

    @torch.inference_mode()
    def find(rows: Ints, top_k: int) -> tuple[Ints, Floats]:
        scores, others = top_items(content_similarity(candidates, torch.tensor(rows)), top_k)
        return torch.where(torch.isfinite(scores), others, PADDING_ROW).cpu().numpy(), scores.cpu().numpy()

    return find
