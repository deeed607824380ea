"""Parity of training and serving: the served recommendations must be those that were evaluated.

Three comparisons on test sessions, row by row:

1. the compiled request workflow with the rows of the data folder (`check_rows`), and with the fitted NVTabular workflow
   where NVTabular is installed (`check_workflow`);
2. the reloaded bundle with the run's model, ranked here independently by sorting all scores (`compare_offline`);
3. a running server with the run's model (`compare_served`).

Equal means that every id is equal outside ties and every score differs by at most 1e-5.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch

from missrec_t4r.arrays import Doubles, Floats, Ints
from missrec_t4r.bundle.id_encoder import RawId, SessionTransform
from missrec_t4r.bundle.item_table import vocabulary_of
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import compact_event_features
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ParityError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.retrieval.ranker import Ranker, compact
from missrec_t4r.schema import FIRST_ITEM_ROW, NULL_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE, UNKNOWN_ROW
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.event_features import SessionEventFeatures

TOLERANCE = 1e-5
"""Largest accepted difference of a score; scores closer than this are a tie."""

_BATCH = 64
_REQUEST_WORKFLOW = "request_workflow"
_TOP_K = 10
"""Items per session that a bundle and its run are compared on."""
_CLIENTS = 16
"""Concurrent requests to a server, so that its dynamic batching has requests to merge."""

RankedItems = tuple[Ints, Floats]
"""Rows and scores of one session's recommendations, best first."""


@dataclass(frozen=True)
class Parity:
    """Result of one comparison."""

    sessions: int
    """Compared sessions."""
    max_abs_diff: float
    """Largest difference between two scores at the same rank."""
    wrong_items: int
    """Recommended items that differ, outside ties."""

    @property
    def equal(self) -> bool:
        """Whether all ids and scores agree."""
        return self.wrong_items == 0 and self.max_abs_diff <= TOLERANCE

    def require(self, what: str) -> Parity:
        """Return self if ids and scores agree.

        Parameters
        ----------
        what : str
            Name of the compared object in the message.

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
                "export with the version that trained the run; if it is the same, report a bug",
            )
        return self


def sample_histories(test: Sessions, n: int) -> Sessions:
    """Return at most ``n`` test sessions without their targets, evenly spaced over the file."""
    histories, _ = test.split_last()
    return histories.take(np.unique(np.linspace(0, len(histories) - 1, min(n, len(histories))).astype(np.int64)))


def raw_ids(catalogue: Catalogue, histories: Sessions) -> list[list[RawId]]:
    """Convert sessions of rows to raw ids, as a client sends them; unknown rows become an id outside the catalogue."""
    rows = np.unique(histories.values[histories.values >= FIRST_ITEM_ROW])
    unknown, id_of = _unknown_id(catalogue), dict(zip(rows.tolist(), catalogue.ids_of(rows), strict=True))
    return [[id_of.get(row, None if row == NULL_ROW else unknown) for row in session.tolist()] for session in histories]


def raw_event_features(model: MISSRec, histories: Sessions) -> list[SessionEventFeatures]:
    """Return the sessions' raw event features, as a client sends them; empty for a model without any."""
    columns = [column for column in model.event_columns if column.name in histories.features]
    bounds = zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True)
    return [
        {column.name: column.decode(histories.features[column.name][start:end]) for column in columns}
        for start, end in bounds
    ]


def check_rows(transform: SessionTransform, histories: Sessions, sessions: Sequence[Sequence[RawId]]) -> None:
    """Require that the request transform returns the rows of the data folder.

    Missing ids are compared as unknown ones: they are row 1 in the data folder and row 2 in a request.

    Parameters
    ----------
    transform : SessionTransform
    histories : Sessions
        Rows of the data folder.
    sessions : sequence of sequences
        Their raw ids, from `raw_ids`.

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


def check_workflow(data: Path, catalogue: Catalogue, sessions: Sequence[Sequence[RawId]]) -> str:
    """Require that NVTabular's request workflow returns the same rows as the compiled one.

    Parameters
    ----------
    data : Path
        Data folder with the fitted workflow.
    catalogue : Catalogue
        The exported catalogue.
    sessions : sequence of sequences
        Raw test sessions; variants with unknown and missing ids, too long and empty ones are added.

    Returns
    -------
    str
        ``"equal on N sessions"``, or why the check was skipped.

    Raises
    ------
    ParityError
        Names the first session that differs.
    """
    folder = data / _REQUEST_WORKFLOW
    if not folder.is_dir():
        return f"skipped: {data} holds no {_REQUEST_WORKFLOW}"
    if importlib.util.find_spec("nvtabular") is None:
        return "skipped: nvtabular is not installed"
    if catalogue.id_type != "string":  # NVTabular refuses missing ids in integer lists
        sessions = [[item for item in session if item is not None] for session in sessions]
    variants = hostile_variants(sessions, catalogue.id_type)
    transform = SessionTransform.load(data / SESSION_TRANSFORM_FILE, vocabulary_of(catalogue.items))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Merlin warns about its own dependencies
        from missrec_t4r.etl.nvt.request_transform import request_rows

        expected_rows = request_rows(folder, variants)
    for session, expected, rows in zip(variants, expected_rows, transform(*variants), strict=True):
        if rows.tolist() != expected:
            raise ParityError(
                f"session {session} becomes rows {rows.tolist()}",
                f"{expected}, as NVTabular's request workflow gives",
                "re-run `missrec etl`: transform and workflow are of different runs",
            )
    return f"equal on {len(variants)} sessions"


def hostile_variants(sessions: Sequence[Sequence[RawId]], id_type: str) -> list[list[RawId]]:
    """Return the sessions, variants of each with unknown ids and of excessive length, and an empty session.

    Missing ids are inserted for string catalogues only: NVTabular refuses them in integer lists.

    Examples
    --------
    >>> [len(session) for session in hostile_variants([["lamp", "desk"]], "string")]
    [2, 4, 128, 0]
    """
    rng = random.Random(7)
    unknown: list[RawId] = ["", " ", "no such item", "☂", None] if id_type == "string" else [-1, 0, 2**62]
    variants: list[list[RawId]] = [list(session) for session in sessions]
    for session in sessions:
        mixed = [*session, *rng.choices(unknown, k=2)]
        rng.shuffle(mixed)
        variants += [mixed, mixed * 32]  # longer than any max_sequence_length
    return [*variants, []]


def compare_offline(ranker: Ranker, model: MISSRec, histories: Sessions) -> Parity:
    """Compare the ranker of a reloaded bundle with the trained and evaluated model.

    Parameters
    ----------
    ranker : Ranker
        Of the reloaded bundle.
    model : MISSRec
        Of the run.
    histories : Sessions
    """
    indices = np.arange(len(histories))
    length = model.config.max_sequence_length
    event_features = histories.padded_features(indices, length)
    ranking = ranker.rank(histories.padded(indices, length), top_k=_TOP_K, event_features=event_features)
    ranked = [
        (rows[:n], scores[:n]) for rows, scores, n in zip(ranking.rows, ranking.scores, ranking.n_items, strict=True)
    ]
    return compare_ranked(model, histories, ranked, _TOP_K)


def compare_served(client: MISSRecClient, model: MISSRec, catalogue: Catalogue, histories: Sessions) -> Parity:
    """Compare a running server with the run's model, with one session per request and concurrent requests.

    Triton therefore batches requests of different clients, as in production.

    Parameters
    ----------
    client : MISSRecClient
        A gRPC client, which threads may share.
    model : MISSRec
        Of the run.
    catalogue : Catalogue
    histories : Sessions
    """

    def recommend(session: list[RawId], event_features: SessionEventFeatures) -> RankedItems:
        result = client.recommend([session], _TOP_K, side=[event_features] if event_features else None)[0]
        return catalogue.rows_of(result.item_ids), np.asarray(result.scores, np.float32)

    with ThreadPoolExecutor(_CLIENTS) as pool:
        ranked = list(pool.map(recommend, raw_ids(catalogue, histories), raw_event_features(model, histories)))
    return compare_ranked(model, histories, ranked, _TOP_K)


def compare_ranked(model: MISSRec, histories: Sessions, ranked: Sequence[RankedItems], top_k: int) -> Parity:
    """Compare recommendations with the model's own ranking of the whole catalogue.

    Parameters
    ----------
    model : MISSRec
    histories : Sessions
    ranked : sequence of (rows, scores)
        Recommendations of every session, best first.
    top_k : int
        Requested items.
    """
    largest, wrong = 0.0, 0
    for (rows, served_scores), scores in zip(ranked, _reference(model, histories), strict=True):
        if scores is None:
            continue  # no known item: popularity ranks, not the model
        order = np.argsort(-scores, kind="stable")[:top_k]  # ties by catalogue order, as in serving
        expected = order[np.isfinite(scores[order])]  # -inf: not recommendable
        if len(rows) != len(expected):
            wrong += abs(len(rows) - len(expected))
            continue
        differences = np.abs(served_scores.astype(np.float64) - scores[expected])
        largest = max(largest, float(differences.max(initial=0)) if np.isfinite(differences).all() else np.inf)
        # Another item at a rank is a tie if the model scores it like the expected one; repeated items are always wrong
        ties = np.abs(scores[rows] - scores[expected]) <= TOLERANCE
        wrong += int(((rows != expected) & ~ties).sum()) + len(rows) - len(set(rows.tolist()))
    return Parity(len(ranked), largest, wrong)


@torch.inference_mode()
def _reference(model: MISSRec, histories: Sessions) -> Iterator[Doubles | None]:
    """Yield the run's scores of every session, [catalogue]; None without a known item."""
    candidates = model.candidates()
    length = model.config.max_sequence_length
    for start in range(0, len(histories), _BATCH):
        batch = np.arange(start, min(start + _BATCH, len(histories)))
        rows = histories.padded(batch, length)
        session = torch.from_numpy(compact(rows, length)).to(candidates.mask.device)
        event_features = compact_event_features(histories.padded_features(batch, length), rows, length)
        features = {name: torch.from_numpy(values).to(session.device) for name, values in event_features.items()}
        scores = model.score(model(session, features), candidates, session).double().cpu().numpy()  # [batch, catalogue]
        empty = (session == PADDING_ROW).all(1).tolist()
        yield from (None if is_empty else row for row, is_empty in zip(scores, empty, strict=True))


def _unknown_id(catalogue: Catalogue) -> str | int:
    """Return an id that the catalogue does not have."""
    names: Iterator[str | int] = (f"?{n}" for n in count()) if catalogue.id_type == "string" else count(-1, -1)
    return next(name for name in names if catalogue.rows_of([name])[0] < FIRST_ITEM_ROW)
