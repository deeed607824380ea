"""The gate between training and serving: what is served must be what was evaluated.

Three things are compared on test sessions, row by row. The request transform with the data folder's own rows (and
with the fitted NVTabular workflow where NVTabular is installed); the answers of the reloaded bundle with the run's
model, whose ranking is worked out here a second time, by plain sorting; and, with `compare_served`, the answers of a
running server. Equal means: every id equal outside ties, every score within 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from missrec_t4r.bundle.id_encoder import RawId, SessionTransform
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import compact_event_features
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ParityError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.ranker import Ranker, compact
from missrec_t4r.schema import FIRST_ITEM_ROW, NULL_ROW, PADDING_ROW, UNKNOWN_ROW
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.event_features import SessionEventFeatures

TOLERANCE = 1e-5
"""Largest accepted difference of a score; scores closer than this are a tie."""

_STEP = 64

Rows = npt.NDArray[np.int64]
Answer = tuple[Rows, npt.NDArray[np.float32]]
"""Rows and scores of one session, best first."""


@dataclass(frozen=True)
class Parity:
    """The result of one comparison."""

    sessions: int
    """Sessions compared."""
    max_abs_diff: float
    """Largest difference between two scores at the same rank."""
    wrong_items: int
    """Recommended items that differ outside ties."""

    @property
    def equal(self) -> bool:
        """Whether all ids and scores agree."""
        return self.wrong_items == 0 and self.max_abs_diff <= TOLERANCE

    def require(self, what: str) -> Parity:
        """Return self, or refuse.

        Raises
        ------
        ParityError
            Ids or scores differ.
        """
        if not self.equal:
            raise ParityError(
                f"{what}: of {self.sessions} sessions {self.wrong_items} recommended items differ from the run's, "
                f"the largest score difference is {self.max_abs_diff:.3g}",
                f"equal ids outside ties and score differences up to {TOLERANCE:g}",
                "export with the version that trained the run; if it is the same, this is a bug of ours",
            )
        return self


def sample_histories(test: Sessions, n: int) -> Sessions:
    """Return at most ``n`` test histories without their targets, spread evenly over the file."""
    histories, _ = test.split_last()
    return histories.take(np.unique(np.linspace(0, len(histories) - 1, min(n, len(histories))).astype(np.int64)))


def raw_ids(catalogue: Catalogue, histories: Sessions) -> list[list[RawId]]:
    """Return sessions of rows as a shop would send them; unknown rows become an id that the catalogue does not have."""
    unknown = _unknown_id(catalogue)
    known = {int(row): raw for row, raw in _pairs(catalogue, histories)}
    return [[known.get(int(row), None if row == NULL_ROW else unknown) for row in session] for session in histories]


def raw_event_features(model: MISSRec, histories: Sessions) -> list[SessionEventFeatures]:
    """Return the sessions' side features as a shop would send them; empty for a model without any."""
    columns = (
        ()
        if model.event_features is None
        else [column for column in model.event_features.columns if column.name in histories.features]
    )
    bounds = zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True)
    return [
        {column.name: column.decode(histories.features[column.name][start:end]) for column in columns}
        for start, end in bounds
    ]


def check_rows(transform: SessionTransform, histories: Sessions, sessions: Sequence[Sequence[RawId]]) -> None:
    """Require that the request transform gives the rows that training saw (missing ids aside: 1 there, 2 here).

    Raises
    ------
    ParityError
        Names the first session that differs.
    """
    for index, (rows, history) in enumerate(zip(transform(*sessions), histories, strict=True)):
        expected = np.where(history == NULL_ROW, UNKNOWN_ROW, history)[-transform.max_sequence_length :]
        if rows.tolist() != expected.tolist():
            raise ParityError(
                f"test session {index} becomes rows {rows.tolist()}",
                f"{expected.tolist()}, as in the data folder",
                "re-run `missrec etl`: catalogue and sessions do not belong together",
            )


def compare_offline(ranker: Ranker, model: MISSRec, histories: Sessions, top_k: int = 10) -> Parity:
    """Compare a ranker with the model that was trained and evaluated.

    Parameters
    ----------
    ranker : Ranker
        Made from the reloaded bundle.
    model : MISSRec
        The run's own.
    histories : Sessions
    top_k : int
    """
    indices = np.arange(len(histories))
    length = model.config.max_sequence_length
    event_features = histories.padded_features(indices, length)
    ranking = ranker.rank(histories.padded(indices, length), top_k=top_k, event_features=event_features)
    answers = [
        (rows[:n], scores[:n]) for rows, scores, n in zip(ranking.rows, ranking.scores, ranking.n_items, strict=True)
    ]
    return compare_answers(model, histories, answers, top_k)


def compare_served(
    client: MISSRecClient, model: MISSRec, catalogue: Catalogue, histories: Sessions, top_k: int = 10, clients: int = 16
) -> Parity:
    """Compare a running server with the run's model: one session per request, many at a time, so that Triton batches.

    Parameters
    ----------
    client : MISSRecClient
        A gRPC client, which threads may share.
    model : MISSRec
    catalogue : Catalogue
    histories : Sessions
    top_k : int
    clients : int
        Requests under way at the same time.
    """

    def ask(session: list[RawId], event_features: SessionEventFeatures) -> Answer:
        answer = client.recommend([session], top_k, side=[event_features] if event_features else None)[0]
        return catalogue.rows_of(answer.item_ids), np.asarray(answer.scores, np.float32)

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(ask, raw_ids(catalogue, histories), raw_event_features(model, histories)))
    return compare_answers(model, histories, answers, top_k)


def compare_answers(model: MISSRec, histories: Sessions, answers: Sequence[Answer], top_k: int) -> Parity:
    """Compare answers, however they were got, with the model's own ranking of the whole catalogue.

    Parameters
    ----------
    model : MISSRec
    histories : Sessions
    answers : sequence of (rows, scores)
        Best first, one pair per session.
    top_k : int
        Items that were asked for.
    """
    largest, wrong = 0.0, 0
    for index, scores in enumerate(_reference(model, histories)):
        if scores is None:
            continue  # no known item: the popularity fallback is not the model's
        order = np.argsort(-scores, kind="stable")[:top_k]
        expected = order[np.isfinite(scores[order])]
        rows, given = answers[index]
        if len(rows) != len(expected):
            wrong += abs(len(rows) - len(expected)) or 1
            continue
        differences = np.abs(given.astype(np.float64) - scores[expected])
        largest = max(largest, float(differences.max(initial=0)) if np.isfinite(differences).all() else np.inf)
        ties = np.abs(scores[rows] - scores[expected]) <= TOLERANCE
        wrong += int(((rows != expected) & ~ties).sum()) + len(rows) - len(set(rows.tolist()))
    return Parity(len(answers), largest, wrong)


@torch.inference_mode()
def _reference(model: MISSRec, histories: Sessions) -> Iterator[npt.NDArray[np.float64] | None]:
    """Yield the run's scores of the whole catalogue for every session, None without a known item."""
    candidates = model.candidates()
    length = model.config.max_sequence_length
    for start in range(0, len(histories), _STEP):
        chosen = np.arange(start, min(start + _STEP, len(histories)))
        rows = histories.padded(chosen, length)
        session = torch.from_numpy(compact(rows, length))
        event_features = compact_event_features(histories.padded_features(chosen, length), rows, length)
        vectors = model(session, {name: torch.from_numpy(values) for name, values in event_features.items()})
        scores = model.score(vectors, candidates, session).double().numpy()
        empty = (session == PADDING_ROW).all(1).tolist()
        yield from (None if nothing else line for line, nothing in zip(scores, empty, strict=True))


def _pairs(catalogue: Catalogue, histories: Sessions) -> Iterator[tuple[int, str | int]]:
    rows = np.unique(histories.values[histories.values >= FIRST_ITEM_ROW])
    return zip(rows.tolist(), catalogue.ids_of(rows), strict=True)


def _unknown_id(catalogue: Catalogue) -> str | int:
    tries: Callable[[int], str | int] = (lambda n: f"?{n}") if catalogue.id_type == "string" else (lambda n: -1 - n)
    candidates = [tries(n) for n in range(catalogue.n_items + 1)]  # one more than the catalogue can hold
    return candidates[int(np.argmax(catalogue.rows_of(candidates) < FIRST_ITEM_ROW))]
