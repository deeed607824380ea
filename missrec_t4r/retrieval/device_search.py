"""Exact top-k of all sessions of a batch together, as a GPU computes it: nothing waits for the host but one result.

    1. scan      all scores from tokens in 16 bits, a chunk of the catalogue at a time, and the maximum of every block
    2. choose    the blocks with the highest maxima, and the best candidates among their rows
    3. rescore   the candidates, from 32-bit tokens in 64-bit sums (`PackedItems.exact`), as on the CPU
    4. certify   the k-th exact score lies above the worst candidate's bound: then no other row can be among the best

Sessions that are not certified are searched again with more candidates. With s and y in 32 bits, ŝ and ŷ in 16, u the
rounding of 16 bits and n the width, the scan's v satisfies (Cauchy-Schwarz; a sum of n products in 32 bits errs by less
than n 2^-22 of the sum of their magnitudes in any order, also where an adder cuts off instead of rounding)

    |s.y - v| <= |s - ŝ| |y| + |ŝ| |y - ŷ| + (u + n 2^-22) |ŝ| |ŷ|

and the fused score errs by at most `steepness` times that. The lengths are computed, not assumed. Ours; plain torch, so
that a CPU runs the same code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.arrays import AnyArray
from missrec_t4r.errors import ServingError
from missrec_t4r.retrieval.int8_bounds import steepness
from missrec_t4r.retrieval.packed_scores import PackedItems, fuse, fuse_two
from missrec_t4r.retrieval.topk import Batch, Found, Query

BLOCK = 128
"""Rows of a block, of which the first level knows the maximum alone."""
SPARE = 32
"""Candidates are twice k and these: in 16 bits about so many more may be among the best."""
_WIDER = 8
"""By which the candidates of an uncertified session are multiplied."""
_SCANNED = 1 << 23
"""Scores of a chunk, at most: 32 MiB of float32, which the cache of a large GPU holds between two operations."""
_ADDRESSED = (1 << 31) - 1
"""Numbers of tokens in one product, at most: beyond, cuBLAS was seen to read wrong addresses for a single session
(pytorch/pytorch#17897)."""
_GATHERED = 1 << 27
"""Numbers of gathered tokens at a time, at most: 1 GiB in 64 bits."""
_CANDIDATE_BYTES = 1 << 32
"""Bytes of the candidates of all sessions together, at most: 4 GiB."""
_WORD = 8
"""Bytes at which an uploaded array begins."""
_ALIGNED = 8
"""Widths are padded to a multiple of this, as matrix units want it in 16 bits."""
_ROUNDING = 4e-6
"""Error of fusing and adding in 32 bits, with room."""
BYTES_PER_SCORE = 24
"""Bytes of memory per session and row while a batch is ranked: scores, terms, masks and their temporaries."""
_ONE_PASS = 1 << 30
"""Scores of one batch, at most."""
RESERVED = 1 << 30
"""Bytes that a batch leaves free: for the graphs of the session encoder, cuBLAS and the kernels themselves."""


@dataclass(frozen=True)
class DeviceItems:
    """A catalogue as it lies on the device; see `place`."""

    table: PackedItems
    """Tokens in 32 bits: the exact scores are theirs."""
    rough: Tensor
    """[modality, row, dim padded to a multiple of 8], 16 bits: a missing second token repeats the first."""
    present: Tensor
    """[modality, row], bool: True where the row has so many tokens."""
    error: Tensor
    """[]: largest length of the rounding error of a token."""
    length: Tensor
    """[]: largest length of a token, in 32 or in 16 bits."""

    @classmethod
    def place(cls, table: PackedItems, device: torch.device, dtype: torch.dtype = torch.float16) -> DeviceItems:
        """Copy a table to a device and round its tokens, a part at a time.

        Parameters
        ----------
        table : PackedItems
            With tokens in float32, on any device.
        device : torch.device
        dtype : torch.dtype
            Of the first pass: float16, or bfloat16 with bounds eight times as wide.
        """
        table = table.to(device)
        n_levels, n_rows = table.place.shape
        width = table.tokens.shape[1]
        rough = torch.zeros(n_levels, n_rows, -(-width // _ALIGNED) * _ALIGNED, dtype=dtype, device=device)
        error, length = torch.zeros((), device=device), torch.zeros((), device=device)
        step = max(_GATHERED // (n_levels * width), 1)
        for start in range(0, n_rows, step):
            places = table.place[:, start : start + step]
            whole = table.tokens[torch.where(places < 0, places[:1], places)]  # [modality, row, dim]
            part = rough[:, start : start + step, :width]
            part.copy_(whole)
            error = torch.maximum(error, (whole - part.float()).norm(dim=-1).amax())
            length = torch.maximum(length, torch.maximum(whole.norm(dim=-1).amax(), part.float().norm(dim=-1).amax()))
        return cls(table, rough, table.place >= 0, error * (1 + 1e-6), length * (1 + 1e-6))

    @staticmethod
    def bytes_needed(table: PackedItems, device: torch.device) -> int:
        """Return the bytes that `place` allocates on the device."""
        n_levels, n_rows = table.place.shape
        parts = table.tokens, table.place, table.modality, table.several, table.phi
        moved = sum(part.nbytes for part in parts) if table.tokens.device != device else 0
        rough = 2 * n_levels * n_rows * -(-table.tokens.shape[1] // _ALIGNED) * _ALIGNED
        rounding = min(3 * 4 * _GATHERED, 6 * rough)  # three copies of a part in 32 bits
        return moved + rough + rounding + n_levels * n_rows  # `present`

    def scan(self, query: Query) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores [batch, padded row] in 32 bits, -inf where not allowed, block maxima, and the scan's error.

        Rows are padded to whole blocks, with -inf. The error [batch, 1] holds for every row of the session.
        """
        n_rows, batch = self.table.n_rows, len(query.vectors)
        n_blocks = -(-n_rows // BLOCK)
        vectors = F.pad(query.vectors.float(), (0, self.rough.shape[2] - query.vectors.shape[1]))
        rough = vectors.to(self.rough.dtype)
        scores = vectors.new_full((batch, n_blocks * BLOCK), -torch.inf)
        maxima = vectors.new_empty(batch, n_blocks)
        never = scores.new_full((), -torch.inf)
        has_terms = any(query.added.stride())
        step = max(min(_SCANNED // batch, _ADDRESSED // self.rough.shape[2]) // BLOCK, 1) * BLOCK
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            fused = self._fused(rough, rows)
            if has_terms:
                fused = fused.add_(query.added[:, rows])
            torch.where(query.allowed[:, rows], fused, never, out=scores[:, rows])
            blocks = slice(start // BLOCK, -(-rows.stop // BLOCK))
            torch.amax(scores[:, start : blocks.stop * BLOCK].unflatten(1, (-1, BLOCK)), dim=2, out=maxima[:, blocks])
        return scores, maxima, self._error(vectors, rough)

    def _fused(self, session: Tensor, rows: slice) -> Tensor:
        """Return the fused scores [batch, chunk] in 32 bits."""
        votes = [(session @ level[rows].T).float() for level in self.rough]  # [batch, chunk] each
        if len(votes) == 1:
            return votes[0]
        if len(votes) == 2:  # a row with one token has it twice, which fuses to its vote
            return fuse_two(votes[0], votes[1], self.table.phi[rows])
        return fuse(torch.stack(votes, 1), self.present[:, rows], self.table.phi[rows])

    def _error(self, vectors: Tensor, rough: Tensor) -> Tensor:
        """Return by how much a score of `scan` may be below the exact one, [batch, 1]."""
        rounded, width = rough.float(), rough.shape[1]
        unit = torch.finfo(self.rough.dtype).eps / 2
        lengths, off = rounded.norm(dim=1, keepdim=True), (vectors - rounded).norm(dim=1, keepdim=True)
        vote = off * self.length + lengths * self.error + (unit + width * 2.0**-22) * lengths * self.length
        return steepness(len(self.rough)) * (1 + 1e-4) * vote + _ROUNDING

    def candidates(self, query: Query, k: int, width: int) -> Tensor:
        """Return every session's best items and whether they are certain, in one matrix [batch, 2 k + 3] of int32.

        Rows, the bits of their scores, the number of items found, 1 if they are certain, and the number of rows that
        are allowed. Nothing here waits for the device.

        Parameters
        ----------
        query : Query
        k : int
            Items per session.
        width : int
            Candidates that are scored exactly.
        """
        n_rows = self.table.n_rows
        width = min(width, n_rows)
        scores, maxima, error = self.scan(query)
        chosen = maxima.topk(min(width, maxima.shape[1]), dim=1, sorted=False).indices
        within = torch.arange(BLOCK, device=chosen.device)
        columns = (chosen.unsqueeze(2) * BLOCK + within).flatten(1)  # [batch, block * row]
        best = scores.gather(1, columns).topk(width, dim=1)
        rows = columns.gather(1, best.indices).sort(dim=1).values  # ascending: a stable sort keeps ties in that order
        real = rows < n_rows
        rows = rows.clamp_max(n_rows - 1)
        exact = self._exact(query, rows).masked_fill(~(query.allowed.gather(1, rows) & real), -torch.inf)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        k, rows = min(k, width), rows.gather(1, order)
        worst, last = best.values[:, -1:], exact[:, k - 1 : k]
        # adding in 32 bits errs by less than 2^-22 of the sum, which may be large where terms are
        certain = (worst + error + worst.abs() * 2.0**-22 < last) | (worst == -torch.inf)
        certain = certain | (width == n_rows)
        counts = torch.isfinite(exact[:, :k]).sum(1, keepdim=True)
        facts = (counts, certain, query.allowed.sum(1, keepdim=True))
        return torch.cat([rows[:, :k].int(), exact[:, :k].view(torch.int32), *(fact.int() for fact in facts)], dim=1)

    def _exact(self, query: Query, rows: Tensor) -> Tensor:
        """Return the exact scores [batch, candidate] plus terms, in 32 bits."""
        n_levels, dim = len(self.rough), self.table.tokens.shape[1]
        parts = rows.split(max(_GATHERED // (n_levels * dim * len(rows)), 1), dim=1)
        network = torch.cat([self.table.exact(query.vectors, part) for part in parts], dim=1)
        return (network + query.added.gather(1, rows)).float()


@torch.inference_mode()
def search_together(items: DeviceItems, query: Query, k: int) -> Batch:
    """Return every session's k best allowed items, on the host, as `missrec_t4r.retrieval.topk.search` does.

    One result is read from the device; where sessions are not certified, one more for all of them per round, or for as
    many as `_CANDIDATE_BYTES` hold.

    Parameters
    ----------
    items : DeviceItems
    query : Query
        On the same device; ``added`` may be one number that is expanded.
    k : int
        At least 1.
    """
    found: list[Found] = [Found(torch.empty(0), torch.empty(0, dtype=torch.int64), 0)] * len(query.vectors)
    passed, undecided, width = [0] * len(found), np.arange(len(found)), first_candidates(k)
    with exact_products():
        while len(undecided):
            width = min(width, items.table.n_rows)
            step = max(_CANDIDATE_BYTES // _bytes_of_candidates(width, items.table.n_rows), 1)
            parts = [query.take(slice(at, at + step)) for at in range(0, len(undecided), step)]
            result = torch.cat([items.candidates(part, k, width).cpu() for part in parts])
            rows, scores = result[:, :-3].chunk(2, dim=1)
            rows, scores = rows.long(), scores.contiguous().view(torch.float32)
            certain = result[:, -2].numpy() > 0
            for line, (session, n, n_allowed) in enumerate(
                zip(undecided.tolist(), result[:, -3].tolist(), result[:, -1].tolist(), strict=True)
            ):
                if certain[line]:
                    found[session], passed[session] = Found(scores[line, :n], rows[line, :n], width), n_allowed
            undecided, width = undecided[~certain], width * _WIDER
            if len(undecided):
                (left,) = upload([np.flatnonzero(~certain)], query.vectors.device)
                query = query.take(left)
    return Batch(found, passed)


def first_candidates(k: int) -> int:
    """Return the number of candidates of a session's first search, where the catalogue has so many."""
    return 2 * k + SPARE


def _bytes_of_candidates(width: int, n_rows: int) -> int:
    """Return the bytes that choosing and scoring ``width`` candidates of a session takes, beside its scores."""
    return 12 * min(width * BLOCK, n_rows) + 64 * width  # rows of the chosen blocks; order, rows and exact scores


_ROUGH: Final = [
    name
    for name in (
        "allow_fp16_reduced_precision_reduction",
        "allow_bf16_reduced_precision_reduction",
        "allow_fp16_accumulation",  # torch from 2.7 on
    )
    if hasattr(torch.backends.cuda.matmul, name)
]
"""Switches that let cuBLAS add in 16 bits."""


class _Exact:
    """How many calls are within `exact_products`, and how to restore what the first one found."""

    lock = threading.Lock()
    calls = 0
    restore: ClassVar[Callable[[], None]]


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply matrices as the error bound assumes: no TF32, and sums of 16-bit products in 32 bits.

    The switches are those of the process: of threads that are within at the same time, the last one restores them.
    """
    with _Exact.lock:
        if not _Exact.calls:
            _Exact.restore = _multiply_exactly()
        _Exact.calls += 1
    try:
        yield
    finally:
        with _Exact.lock:
            _Exact.calls -= 1
            if not _Exact.calls:
                _Exact.restore()


def _multiply_exactly() -> Callable[[], None]:
    """Set the switches and return a function that restores them; NVIDIA's containers of PyTorch switch TF32 on."""
    matmul = torch.backends.cuda.matmul
    before = [(name, getattr(matmul, name)) for name in _ROUGH if getattr(matmul, name)]
    precision, newer = "", getattr(matmul, "fp32_precision", "none")
    with suppress(RuntimeError):  # torch refuses to say where only the newer `fp32_precision` was set
        precision = torch.get_float32_matmul_precision()
    is_rough = precision != "highest" or newer == "tf32"
    if is_rough:
        torch.set_float32_matmul_precision("highest")
    for name, _ in before:
        setattr(matmul, name, False)

    def restore() -> None:
        if is_rough and precision:
            torch.set_float32_matmul_precision(precision)
        for name, value in [*before, *([("fp32_precision", newer)] if is_rough and newer != "none" else [])]:
            setattr(matmul, name, value)

    return restore


def upload(arrays: Sequence[AnyArray], device: torch.device) -> list[Tensor]:
    """Copy arrays to a device, all in one, and without waiting for it on a GPU."""
    if device.type == "cpu":
        return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    sizes = [-(-array.nbytes // _WORD) * _WORD for array in arrays]
    host = np.zeros(sum(sizes), np.uint8)
    starts = np.cumsum([0, *sizes]).tolist()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    there = torch.from_numpy(host).pin_memory().to(device, non_blocking=True)
    kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
    return [
        there[start : start + array.nbytes].view(kind).view(array.shape)
        for start, array, kind in zip(starts, arrays, kinds, strict=False)
    ]


def sessions_with_room(table: PackedItems, device: torch.device, batch_size: int) -> int:
    """Return how many sessions may be ranked together on a GPU, at most ``batch_size``.

    Raises
    ------
    ServingError
        Not even one: says how much memory is missing.
    """
    most = max(min(batch_size, _ONE_PASS // table.n_rows), 1)
    if device.type == "cpu":
        return most
    tables, per_session = DeviceItems.bytes_needed(table, device), BYTES_PER_SCORE * table.n_rows
    free = require_room(tables + per_session, table.n_rows, device)
    return max(min(most, (free - tables - RESERVED) // per_session), 1)


def require_room(needed: int, n_rows: int, device: torch.device) -> int:
    """Return the free bytes of a GPU, which must be ``needed`` at least.

    Raises
    ------
    ServingError
        There are fewer: says how much memory is missing.
    """
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        raise ServingError(
            f"{device} has {free / 2**30:.2f} GiB free for a catalogue of {n_rows:,} rows",
            f"{needed / 2**30:.2f} GiB, {(needed - free) / 2**30:.2f} GiB more",
            "use one instance per card, free the card, or serve on the CPU (KIND_CPU in config.pbtxt)",
        )
    return int(free)
