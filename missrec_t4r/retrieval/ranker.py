"""The ranker: batches of catalogue rows in, the best items per session out. The same code offline and in Triton.

Null and unknown rows are dropped and counted. A session without any known item cannot be encoded: its list is that of
the most popular items, marked as a fallback. Ranking order: score descending, ties by ascending row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from missrec_t4r.arrays import AnyArray, Bools, Floats, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventArrays, compact_event_features
from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.io.tensor_file import PeriodicPageRelease
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.batch_ranker import BatchRanker
from missrec_t4r.retrieval.device_search import (
    BYTES_PER_SCORE,
    DeviceItems,
    exact_products,
    first_candidates,
    require_room,
    search_together,
    sessions_with_room,
)
from missrec_t4r.retrieval.filters import NO_RULES, ItemColumns, Rules
from missrec_t4r.retrieval.index_file import RetrievalIndex
from missrec_t4r.retrieval.int8_bounds import AVAILABLE, Int8Bounds, quantise
from missrec_t4r.retrieval.packed_scores import PackedItems, pack_items
from missrec_t4r.retrieval.query_encoder import QueryEncoder
from missrec_t4r.retrieval.topk import SPARE, Batch, Found, Query, scan_bounds, search
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, UNKNOWN_ROW

_SCORES_IN_MEMORY = 1 << 25
"""Score matrices of one step hold at most this many numbers (128 MiB of float32): large catalogues, smaller steps."""
_TOKENS_IN_MEMORY = 1 << 26
"""Token tables of at most this many numbers (256 MiB) are kept for the sessions' items; larger ones are not."""
_RELEASE_EVERY = 8
"""Sessions after which mapped pages go back: the system hands out up to 2 MiB around every row that is read."""
CERTIFIED_FROM = 50_000
"""Rows from which int8 bounds replace the scan; smaller catalogues are scanned in less time."""


@dataclass(frozen=True)
class Ranking:
    """Ranked items of a batch of sessions."""

    rows: Ints
    """[batch, top_k]: catalogue rows, best first; 0 from ``n_items`` on."""
    scores: Floats
    """[batch, top_k]: before the temperature; for a fallback the item's popularity in [0, 1]; 0 from ``n_items`` on."""
    n_items: npt.NDArray[np.int32]
    """[batch]: items returned, fewer than ``top_k`` when fewer can be recommended."""
    n_unknown: npt.NDArray[np.int32]
    """[batch]: null and unknown rows that were dropped from the session."""
    fallback: Bools
    """[batch]: True where no item of the session is known, so that the list is that of the most popular items."""
    n_passed: npt.NDArray[np.int32]
    """[batch]: items that the filters let through, before the caps; ``n_items`` is the smaller of it and ``top_k``
    unless caps take some away."""


@dataclass
class Searcher:
    """The search of a batch, and how often it had to go on."""

    table: PackedItems
    quantised: Int8Bounds | None = None
    """For the bounds of a large catalogue; those of a small one are scanned."""
    together: DeviceItems | None = None
    """To search all sessions together; without them one after the other, from bounds of all scores."""
    widenings: int = 0
    """Sessions whose exactness check failed for the first candidates, so that the search widened."""

    def __call__(self, query: Query, k: int) -> Batch:
        """Return the k best items of every session."""
        if self.together is not None:
            first, batch = first_candidates(k), search_together(self.together, query, k)
        else:
            if self.quantised is None:
                bounds = scan_bounds(self.table, query)
            else:
                bounds = self.quantised.bounds(self.table, query, torch.get_num_threads())
            passed = [np.count_nonzero(line) for line in query.allowed.numpy(force=True)]
            first, batch = k + SPARE, Batch(search(self.table, query, bounds, k), passed)
        self.widenings += sum(best.scored > first for best in batch.found)
        return batch


class Ranker:
    """Exact top-k over the whole catalogue.

    Parameters
    ----------
    model : MISSRec
        Set to evaluation mode and moved to the device.
    catalogue : Catalogue
        The catalogue it was built for; its ``train_count`` is the popularity.
    device : str
        ``"cpu"``, ``"cuda:0"`` or ``"cuda"``, the current GPU.
    batch_size : int
        Sessions per pass of the model; an upper limit, large catalogues take less.
    certified_from : int
        Rows from which int8 bounds are used, on the CPU.
    tables : RetrievalIndex, optional
        Of the same model and catalogue, mapped from a bundle; computed here without it.
    together : bool, optional
        Search all sessions of a batch together (`missrec_t4r.retrieval.device_search`); on a GPU by default.

    Raises
    ------
    DataError
        No item can be recommended.
    ServingError
        A GPU has too little free memory: says how much is missing.
    """

    @exact_products()
    def __init__(
        self,
        model: MISSRec,
        catalogue: Catalogue,
        *,
        device: str = "cpu",
        batch_size: int = 64,
        certified_from: int = CERTIFIED_FROM,
        tables: RetrievalIndex | None = None,
        together: bool | None = None,
    ) -> None:
        self.device = torch.empty(0, device=device).device  # "cuda" is one of them: its tensors say which
        if self.device.type == "cuda":
            require_room(_bytes_to_move(model, catalogue.n_rows, tables, self.device), catalogue.n_rows, self.device)
        self.model, self.catalogue = model.eval().to(device), catalogue
        together = self.device.type == "cuda" if together is None else together
        self.batch_size = max(1, min(batch_size, _SCORES_IN_MEMORY // catalogue.n_rows))
        self.max_sequence_length = model.config.max_sequence_length
        self.columns = ItemColumns(catalogue.items)
        if not bool(model.recommendable.any()):
            raise DataError(
                "no item of the catalogue can be recommended",
                "an item that is not retired and has a modality or a trained ID",
                "make an item recommendable again with `missrec catalogue update`",
            )
        with torch.inference_mode():
            small = len(model.item_encoder.names) * catalogue.n_rows * model.config.d_model <= _TOKENS_IN_MEMORY
            tokens = self.model.item_encoder.catalogue() if small or tables is None else None
            table = pack_items(model.fusion, model.item_encoder.candidates(tokens)) if tables is None else tables.table
            if together:
                self.batch_size = sessions_with_room(table, self.device, batch_size)
            self.table = table.to(self.device)
            popularity = self._popular(catalogue)
        kept = tokens if small else None
        self.encoder = QueryEncoder(self.model, kept, self.device, self.batch_size, together=together)
        self.search = Searcher(self.table, together=DeviceItems.place(self.table, self.device) if together else None)
        if self.device.type == "cpu" and catalogue.n_rows >= certified_from and AVAILABLE and not together:
            self.search.quantised = quantise(self.table) if tables is None else tables.quantised
        self.batches = BatchRanker(self.search, self.model, popularity, self.columns, self.encoder)
        self._page_release = PeriodicPageRelease(self._mapped() if tables is not None else (), _RELEASE_EVERY)

    @torch.inference_mode()
    def rank(
        self,
        rows: Ints,
        *,
        top_k: int | npt.ArrayLike = 10,
        exclude_seen: bool | npt.ArrayLike = False,
        seen: Ints | None = None,
        exclude: Ints | None = None,
        allow: Ints | None = None,
        rules: Sequence[Rules] | None = None,
        event_features: Mapping[str, AnyArray] | None = None,
    ) -> Ranking:
        """Rank the catalogue for a batch of sessions.

        Parameters
        ----------
        rows : ndarray [batch, seq], int64
            Catalogue rows in the order of time, 0 for padding; the last ``max_sequence_length`` known ones count.
        top_k : int or array [batch]
            Items to return per session, at least 1; the result is as wide as the largest.
        exclude_seen : bool or array [batch]
            Whether a session's own items are left out.
        seen : ndarray [batch, any], int64, optional
            What "seen" means; ``rows`` by default (give the uncut session where ``rows`` is cut).
        exclude : ndarray [batch, any], int64, optional
            Further rows that must not be recommended, 0 for none.
        allow : ndarray [batch, any], int64, optional
            The only rows that may be recommended, 0 for none; a line of zeros allows everything.
        rules : sequence of Rules, one per session, optional
            Filters and caps over the catalogue's columns.
        event_features : mapping of str to ndarray [batch, seq] or [batch, seq, size], optional
            Event features of the sessions, aligned with ``rows``; what is missing counts as absent.

        Raises
        ------
        DataError
            A row outside the catalogue, or ``top_k`` below 1.
        ServingError
            Rules name a column that the catalogue does not have, or values of another type; or items that no filter
            rules out have no score, because the model's numbers are too large or not finite.
        """
        batch = len(rows)
        wanted = np.minimum(np.broadcast_to(np.asarray(top_k, np.int64).reshape(-1), batch), self.catalogue.n_items)
        hidden = np.broadcast_to(np.asarray(exclude_seen, bool).reshape(-1), batch)
        banned = np.where(hidden[:, None], rows if seen is None else seen, PADDING_ROW)
        banned = banned if exclude is None else np.concatenate([banned, exclude], axis=1)
        self._check(wanted, rows, banned, *(() if allow is None else (allow,)))
        known = compact(rows, self.max_sequence_length)
        aligned = compact_event_features(event_features, rows, self.max_sequence_length) if event_features else {}
        found: list[Found] = []
        passed: list[int] = []
        for start in range(0, batch, self.batch_size):
            step = slice(start, start + self.batch_size)
            own_rules = [NO_RULES] * len(known[step]) if rules is None else list(rules[step])
            own_features = {name: values[step] for name, values in aligned.items()}
            listed = None if allow is None else allow[step]
            best = self.batches(known[step], own_features, banned[step], listed, wanted[step], own_rules)
            found, passed = found + best.found, passed + best.passed
        self._page_release.count(batch)
        _refuse_missing(wanted, passed, found, rules)
        return self._ranking(rows, known, wanted, found, passed)

    def encode(self, known: Ints, event_features: Mapping[str, AnyArray] | None = None) -> Tensor:
        """Return the session vectors [batch, dim] of compacted rows [batch, seq]; zero for an empty session."""
        features = {name: torch.from_numpy(values).to(self.device) for name, values in (event_features or {}).items()}
        with exact_products():
            return self.encoder(torch.from_numpy(known).to(self.device), features)

    def query(self, known: Ints, event_features: EventArrays) -> Query:
        """Return the query of compacted rows [batch, seq] and their event features, without any filter."""
        return self.batches.query(known, event_features)

    def _ranking(self, rows: Ints, known: Ints, wanted: Ints, found: Sequence[Found], passed: Sequence[int]) -> Ranking:
        lengths = [len(best.rows) for best in found]
        counts = np.minimum(lengths, wanted).astype(np.int32)
        width = int(wanted.max(initial=1))
        items, scores = np.full((len(rows), width), PADDING_ROW, np.int64), np.zeros((len(rows), width), np.float32)
        if len(rows):
            width = min(max(lengths), width)
            real = np.arange(width) < counts[:, None]
            joined = torch.stack if min(lengths) == max(lengths) else partial(pad_sequence, batch_first=True)
            best_rows, best_scores = joined([best.rows for best in found]), joined([best.scores for best in found])
            items[:, :width] = best_rows.numpy(force=True)[:, :width] * real
            scores[:, :width] = best_scores.numpy(force=True)[:, :width] * real
        return Ranking(
            items,
            scores,
            counts,
            ((rows > PADDING_ROW) & (rows <= UNKNOWN_ROW)).sum(1).astype(np.int32),
            ~(known > PADDING_ROW).any(1),
            np.array(passed, np.int32),
        )

    def _mapped(self) -> list[Tensor]:
        """Return the tensors of a large catalogue of which single rows are read."""
        tensors = [self.table.tokens, *self.model.item_encoder.vectors.buffers()]
        tensors += [part for part in self.model.state_dict().values() if part.shape[:1] == (self.table.n_rows,)]
        return [tensor for tensor in tensors if tensor.device.type == "cpu"]  # a GPU's address means nothing here

    def _popular(self, catalogue: Catalogue) -> Tensor:
        counts = torch.from_numpy(catalogue.train_count).to(self.device, torch.float64)
        popularity = (counts / counts.max().clamp_min(1)).float()
        popularity[:FIRST_ITEM_ROW] = 0
        return popularity

    def _check(self, wanted: Ints, *rows: Ints) -> None:
        if (wanted < 1).any():
            raise DataError(f"top_k is {int(wanted.min())}", "at least 1", "request one item or more")
        for matrix in rows:
            if matrix.size and (matrix.min() < 0 or matrix.max() >= self.catalogue.n_rows):
                raise DataError(
                    f"a row between {int(matrix.min())} and {int(matrix.max())}",
                    f"rows of this catalogue, 0 to {self.catalogue.n_rows - 1}",
                    "transform the session with the session transform of the same bundle",
                )


def _bytes_to_move(model: MISSRec, n_rows: int, tables: RetrievalIndex | None, device: torch.device) -> int:
    """Return the bytes that a GPU must have for the model and for one session at least, before anything is moved."""
    moved = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()] if tensor.device != device)
    return moved + (0 if tables is None else DeviceItems.bytes_needed(tables.table, device) + BYTES_PER_SCORE * n_rows)


def _refuse_missing(wanted: Ints, passed: Sequence[int], found: Sequence[Found], rules: Sequence[Rules] | None) -> None:
    """Refuse a list that is shorter than its filters explain: a score that is not a number comes from the weights."""
    finite = not found or bool(torch.isfinite(torch.cat([best.scores for best in found])).all())
    for session, (k, n_passed, best) in enumerate(zip(wanted.tolist(), passed, found, strict=True)):
        least = min(k, n_passed)
        if rules is not None and rules[session].at_most:
            least = min(least, 1)  # caps may leave out any item but the first
        if len(best.rows) < least or not finite:
            raise ServingError(
                f"{len(best.rows)} of {least} items have a score that is a number",
                "a finite score for every item that may be recommended",
                "the model's weights are damaged or diverged: verify the bundle, train again",
            )


def compact(rows: Ints, max_length: int) -> Ints:
    """Move the known rows of every session to the left, in order, and keep the last ``max_length`` of them.

    Parameters
    ----------
    rows : ndarray [batch, seq], int64

    Returns
    -------
    ndarray [batch, at most max_length], int64
        0-padded on the right, at least one column wide.

    Examples
    --------
    >>> compact(np.array([[3, 2, 0, 4], [1, 0, 0, 0]]), 50).tolist()
    [[3, 4], [0, 0]]
    """
    return compact_event_features({"rows": rows}, rows, max_length)["rows"]
