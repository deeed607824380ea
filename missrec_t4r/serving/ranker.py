"""The ranker: batches of catalogue rows in, the best items per session out. The same code offline and in Triton.

Null and unknown rows are dropped and counted. A session without any known item cannot be encoded: it is answered with
the most popular items, and the answer says so. Ranking order: score descending, ties by ascending row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import DataError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.model.retrieval import top_items
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, UNKNOWN_ROW

Rows = npt.NDArray[np.int64]

_SCORES_IN_MEMORY = 1 << 25
"""Score matrices of one step hold at most this many numbers (128 MiB of float32): large catalogues, smaller steps."""


@dataclass(frozen=True)
class Ranking:
    """Answers to a batch of sessions."""

    rows: Rows
    """[batch, top_k]: catalogue rows, best first; 0 from ``n_items`` on."""
    scores: npt.NDArray[np.float32]
    """[batch, top_k]: before the temperature; for a fallback the item's popularity in [0, 1]; 0 from ``n_items`` on."""
    n_items: npt.NDArray[np.int32]
    """[batch]: items returned, less than asked for when fewer can be recommended."""
    n_unknown: npt.NDArray[np.int32]
    """[batch]: null and unknown rows that were dropped from the session."""
    fallback: npt.NDArray[np.bool_]
    """[batch]: True where no item of the session is known and popularity answered."""


class Ranker:
    """Exact top-k over the whole catalogue.

    Parameters
    ----------
    model : MISSRec
        Set to evaluation mode and moved to the device.
    catalogue : Catalogue
        The catalogue it was built for; its ``train_count`` is the popularity.
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    batch_size : int
        Sessions per pass of the model; an upper limit, large catalogues take less.
    """

    def __init__(self, model: MISSRec, catalogue: Catalogue, *, device: str = "cpu", batch_size: int = 64) -> None:
        self.model, self.catalogue = model.eval().to(device), catalogue
        self.device = torch.device(device)
        self.batch_size = max(1, min(batch_size, _SCORES_IN_MEMORY // catalogue.n_rows))
        self.max_sequence_length = model.config.max_sequence_length
        with torch.inference_mode():
            self._candidates = self.model.candidates()
            self._popularity = self._popular(catalogue)

    @torch.inference_mode()
    def rank(
        self,
        rows: Rows,
        *,
        top_k: int | npt.ArrayLike = 10,
        exclude_seen: bool | npt.ArrayLike = False,
        seen: Rows | None = None,
        exclude: Rows | None = None,
    ) -> Ranking:
        """Answer a batch of sessions.

        Parameters
        ----------
        rows : ndarray [batch, seq], int64
            Catalogue rows in the order of time, 0 for padding; the last ``max_sequence_length`` known ones count.
        top_k : int or array [batch]
            Items wanted per session, at least 1; answers are as wide as the largest.
        exclude_seen : bool or array [batch]
            Whether a session's own items are left out.
        seen : ndarray [batch, any], int64, optional
            What "seen" means; ``rows`` by default (give the uncut session where ``rows`` is cut).
        exclude : ndarray [batch, any], int64, optional
            Further rows that must not be recommended, 0 for none.

        Raises
        ------
        DataError
            A row outside the catalogue, or ``top_k`` below 1.
        """
        batch = len(rows)
        wanted = np.minimum(np.broadcast_to(np.asarray(top_k, np.int64).reshape(-1), batch), self.catalogue.n_items)
        hidden = np.broadcast_to(np.asarray(exclude_seen, bool).reshape(-1), batch)
        banned = np.where(hidden[:, None], rows if seen is None else seen, PADDING_ROW)
        banned = banned if exclude is None else np.concatenate([banned, exclude], axis=1)
        self._check(wanted, rows, banned)
        known = compact(rows, self.max_sequence_length)
        width = int(wanted.max(initial=1))
        steps = [slice(start, start + self.batch_size) for start in range(0, batch, self.batch_size)]
        parts = [self._best(known[step], banned[step], width) for step in steps]
        scores = np.concatenate([np.empty((0, width), np.float32)] + [part[0] for part in parts])
        items = np.concatenate([np.empty((0, width), np.int64)] + [part[1] for part in parts])
        given = np.isfinite(scores) & (np.arange(width) < wanted[:, None])
        return Ranking(
            np.where(given, items, PADDING_ROW),
            np.where(given, scores, np.float32(0)),
            given.sum(1).astype(np.int32),
            ((rows > PADDING_ROW) & (rows <= UNKNOWN_ROW)).sum(1).astype(np.int32),
            ~(known > PADDING_ROW).any(1),
        )

    def _best(self, known: Rows, banned: Rows, width: int) -> tuple[npt.NDArray[np.float32], Rows]:
        known = known[:, : max(int((known > PADDING_ROW).sum(1).max(initial=0)), 1)]
        session = torch.from_numpy(known).to(self.device)
        empty = ~(session > PADDING_ROW).any(1)
        scores = self._popularity.expand(len(known), -1)
        if not bool(empty.all()):
            scores = torch.where(empty[:, None], scores, self._score(session))
        excluded = torch.from_numpy(banned).to(self.device)
        scores = scores.scatter(1, excluded, -torch.inf)  # rows 0 to 2 are never recommended, so padding does no harm
        best, items = top_items(scores, width)
        return best.cpu().numpy(), items.cpu().numpy()

    def _score(self, session: Tensor) -> Tensor:
        return self.model.score(self.model(session), self._candidates, session).float()

    def _popular(self, catalogue: Catalogue) -> Tensor:
        counts = torch.from_numpy(catalogue.train_count).to(self.device, torch.float64)
        popularity = (counts / counts.max().clamp_min(1)).float()
        popularity[:FIRST_ITEM_ROW] = -torch.inf
        return popularity

    def _check(self, wanted: npt.NDArray[np.int64], *rows: Rows) -> None:
        if (wanted < 1).any():
            raise DataError(f"top_k is {int(wanted.min())}", "at least 1", "ask for one item or more")
        for matrix in rows:
            if matrix.size and (matrix.min() < 0 or matrix.max() >= self.catalogue.n_rows):
                raise DataError(
                    f"a row between {int(matrix.min())} and {int(matrix.max())}",
                    f"rows of this catalogue, 0 to {self.catalogue.n_rows - 1}",
                    "transform the session with the session transform of the same bundle",
                )


def compact(rows: Rows, max_length: int) -> Rows:
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
    known = rows > UNKNOWN_ROW
    counts = known.sum(1)
    kept = np.minimum(counts, max_length)
    width = max(int(kept.max(initial=0)), 1)
    compacted = np.full((len(rows), width), PADDING_ROW, np.int64)
    place = np.cumsum(known, axis=1) - 1 - (counts - kept)[:, None]
    taken = known & (place >= 0)
    compacted[np.nonzero(taken)[0], place[taken]] = rows[taken]
    return compacted
