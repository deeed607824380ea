"""Int8 upper bounds of all scores: principal directions of the packed items in one byte per number, and their error.

A token y is stored as ``mean + V z`` with z in 8 bits, and with the length of its rest outside V. For a session s the
true ``s.y`` then lies within ``|s_V| |z error| + |s - s_V| |rest|`` of the estimate (Cauchy-Schwarz), plus the rounding
of arithmetic in 16 bits. `missrec_t4r.retrieval.topk.search` finds the exact top-k with such bounds: it scores the best
candidates exactly until no other bound reaches the k-th score (the exactness check).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from missrec_t4r.retrieval.packed_scores import PackedItems, fuse, fuse_two
from missrec_t4r.retrieval.topk import Query

AVAILABLE = hasattr(torch, "_weight_int8pack_mm")
"""Whether this torch multiplies by 8-bit matrices as they are stored; without it the full scan is used."""
SAMPLE = 20_000
"""Tokens that the principal directions are computed from."""
_KEPT = 0.985
"""Share of the tokens' variance that the principal directions hold at least."""
_MULTIPLE = 32
"""The number of directions is a multiple of this: what the processor multiplies at a time."""
CHUNK = 1 << 15
"""Rows per step: their estimates stay in the processor's cache."""
ROOM = 1e-5
"""Added to every largest length, for the rounding of lengths themselves."""
_HALF_PRECISION = 2.0**-8
"""Relative error of a number rounded to bfloat16, with room."""
_CANCELLED = 2e-6
"""Error of a difference of two squared lengths of at most 2."""
_SUMMING = 3e-5
"""Error of the sums inside one estimate."""


@dataclass(frozen=True)
class Int8Bounds:
    """Tokens of a `PackedItems` in 8 bits; see `quantise`."""

    codes: Tensor
    """[token, direction], int8."""
    scale: Tensor
    """[token], bfloat16: a token's step."""
    rest: Tensor
    """[row], float32: largest length of the rest of the row's tokens outside the directions."""
    error: Tensor
    """[]: largest length of the error of the 8 bits."""
    length: Tensor
    """[]: largest length of a token in 8 bits."""
    mean: Tensor
    """[dim]."""
    directions: Tensor
    """[dim, direction]: orthonormal, padded with zeros."""

    def bounds(self, table: PackedItems, query: Query, threads: int = 1) -> Tensor:
        """Return upper bounds of all scores, [batch, row]; -inf where not allowed.

        Parameters
        ----------
        table : PackedItems
            The packed items that these bounds belong to; their tokens are not read.
        query : Query
        threads : int
            Chunks worked on at the same time.
        """
        along = query.vectors @ self.directions  # [batch, direction]
        rough = along.to(torch.bfloat16)
        # lengths of the parts of the session outside the directions, and the error of the estimates: [batch]
        beyond = (query.vectors.square().sum(1) - along.square().sum(1)).clamp_min(0).sqrt() + 1e-4
        slack = (along - rough.float()).norm(dim=1) * self.length + along.norm(dim=1) * self.error + _SUMMING
        upper = query.added.new_empty(query.added.shape)
        starts = range(0, table.n_rows, CHUNK)

        @torch.inference_mode()
        def work(start: int) -> None:
            rows = slice(start, min(start + CHUNK, table.n_rows))
            self._bound_chunk(table, rough, rows, slack, beyond, upper[:, rows])

        if threads > 1 and len(starts) > 1:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(work, starts))
        else:
            for start in starts:
                work(start)
        upper += (query.vectors @ self.mean)[:, None]
        return upper.add_(query.added).masked_fill_(~query.allowed, -torch.inf)

    def _bound_chunk(
        self, table: PackedItems, rough: Tensor, rows: slice, slack: Tensor, beyond: Tensor, upper: Tensor
    ) -> None:
        first = self._estimates(rough, rows)
        largest = first.abs().amax(1)
        whole = self._further(table, rough, rows, first, largest)
        steep = steepness(len(table.place))
        off = steep * (slack + _HALF_PRECISION * largest)
        torch.addcmul(whole, (steep * beyond)[:, None], self.rest[rows][None], out=upper)
        upper += off[:, None]

    def _further(self, table: PackedItems, rough: Tensor, rows: slice, first: Tensor, largest: Tensor) -> Tensor:
        """Return the fused estimates of a chunk, given those of the rows' first tokens; raises ``largest`` in place."""
        start, end = torch.searchsorted(table.several, torch.tensor([rows.start, rows.stop])).tolist()
        if start == end:
            return first
        several, phi = table.several[start:end], table.phi[table.several[start:end]]
        second = self._estimates(rough, slice(table.n_rows + start, table.n_rows + end))
        torch.maximum(largest, second.abs().amax(1), out=largest)
        everywhere = end - start == rows.stop - rows.start
        own = first if everywhere else first[:, several - rows.start]
        if len(table.place) == 2:
            fused = fuse_two(own, second, phi)
        else:
            places = table.place[:, several]
            votes = [own, second, *(torch.zeros_like(own) for _ in places[2:])]
            for level, at in zip(votes[2:], places[2:], strict=True):
                has = torch.nonzero(at >= 0).flatten()
                if len(has):  # the tokens of one level stand together, in the order of their rows
                    level[:, has] = self._estimates(rough, slice(int(at[has[0]]), int(at[has[-1]]) + 1))
                    torch.maximum(largest, level.abs().amax(1), out=largest)
            fused = fuse(torch.stack(votes, 1), places >= 0, phi)
        return fused if everywhere else first.index_copy_(1, several - rows.start, fused)

    def _estimates(self, rough: Tensor, tokens: slice | Tensor) -> Tensor:
        return torch._weight_int8pack_mm(rough, self.codes[tokens], self.scale[tokens]).float()


@cache
def steepness(n_tokens: int) -> float:
    """Return the largest error of the fused score if no vote has an error above 1, for any phi.

    The slope of ``sum_m softmax(phi v)_m v_m`` in direction d is at most ``|d| (1 + sum_m w_m |x_m - mean|)`` with
    x = phi v. Split the tokens at the mean, p the weight above it: the sum is ``2 p (1 - p)`` times the distance of
    the two sides' means, and that is at most ``log(p / (1 - p)) + log(n - 1)``, because each side's mean is the
    logarithm of its mass less its entropy. The largest value over p is taken on a fine grid, with room (ours).
    """
    p = torch.linspace(1e-6, 1 - 1e-6, 200_001, dtype=torch.float64)
    apart = torch.logit(p) + math.log(max(n_tokens - 1, 1))
    return 1.0 + float((2 * p * (1 - p) * apart).max()) + 1e-4 if n_tokens > 1 else 1.0


def principal(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean [dim] of a sample of tokens [token, dim] and their principal directions [dim, direction]."""
    sample = sample[sample.square().sum(1) > 0].float()
    mean = sample.mean(0) if len(sample) else torch.zeros(sample.shape[1])
    values, vectors = torch.linalg.eigh((sample - mean).T @ (sample - mean) / max(len(sample), 1))
    share = values.flip(0).clamp_min(0).cumsum(0) / values.clamp_min(0).sum().clamp_min(1e-12)
    needed = int((share < _KEPT).sum()) + 1
    width = -(-needed // _MULTIPLE) * _MULTIPLE
    directions = torch.zeros(len(mean), width)
    directions[:, : min(width, len(mean))] = vectors.flip(1)[:, :width]
    return mean, directions


def compress(tokens: Tensor, mean: Tensor, directions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tokens [token, dim] in 8 bits: ``codes, scale, rest, error, length`` of `Int8Bounds`, the rest [token]."""
    centred = tokens.float() - mean
    along = centred @ directions
    steps = (along.abs().amax(1).clamp_min(1e-12) / 127).to(torch.bfloat16)
    whole = (along / steps.float()[:, None]).round_().clamp_(-127, 127)
    kept = whole * steps.float()[:, None]
    rest = (centred.square().sum(1) - along.square().sum(1)).clamp_min(0).add(_CANCELLED).sqrt()
    error, length = (along - kept).norm(dim=1).amax(), kept.norm(dim=1).amax()
    return whole.to(torch.int8), steps, rest, error, length


def rest_of_rows(rest: Tensor, place: Tensor) -> Tensor:
    """Return the largest remainder among the tokens of every row, [row], plus `ROOM` for rounding."""
    return rest[place.clamp_min(0)].masked_fill(place < 0, 0).amax(0) + ROOM


@torch.inference_mode()
def quantise(table: PackedItems) -> Int8Bounds:
    """Compress packed items, which keep their tokens for the exact scores."""
    tokens = table.tokens
    mean, directions = principal(tokens[:: max(len(tokens) // SAMPLE, 1)])
    parts = (compress(part, mean, directions) for part in tokens.split(CHUNK))
    codes, scale, rest, error, length = zip(*parts, strict=True)
    return Int8Bounds(
        torch.cat(codes),
        torch.cat(scale),
        rest_of_rows(torch.cat(rest), table.place),
        torch.stack(error).amax() + ROOM,
        torch.stack(length).amax() + ROOM,
        mean,
        directions,
    )
