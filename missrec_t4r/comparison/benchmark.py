"""The sessions on which all systems are compared, what a system recommends to them, and those of other data folders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from missrec_t4r.arrays import Ints
from missrec_t4r.comparison.lists import as_text, rows_by_text
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.evaluation.full_ranking import PROTOCOLS, Ranking
from missrec_t4r.io.arrow_files import one_array
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID


class Seed(NamedTuple):
    """Ranks and lists of one model (one training seed)."""

    sessions: Ints
    """Indices of the benchmark's sessions that it has, ascending, [known]."""
    ranks: Mapping[str, Ints]
    """Ranks of their targets by protocol, [known]."""
    lists: Mapping[str, Ints]
    """Rows of the benchmark's catalogue by protocol, [known, place]; 2 for an item that it lacks, -1 at the end."""


@dataclass
class Ranked:
    """One system with all its seeds."""

    name: str
    kind: str
    seeds: list[Seed] = field(default_factory=list)
    size: int | None = None
    """Bytes on disk: weights of a run, the file of a model, the lists."""
    n_items: int = 0
    """Items among which it ranks."""
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What a reader must know about its figures."""
    cost: dict[str, Any] | None = None
    """As `missrec_t4r.comparison.cost.cost` returns it; None for lists and parts of a run."""

    @property
    def protocols(self) -> list[str]:
        """The protocols that all its seeds have."""
        return [name for name in PROTOCOLS if all(name in seed.ranks for seed in self.seeds)]


@dataclass
class Benchmark:
    """The sessions on which all systems are compared.

    Parameters
    ----------
    data : Path
        Data folder.
    split : str
        ``test`` or ``valid``.
    protocols : sequence of str
        Under which to rank.
    shared : bool
        Whether every run is ranked on this folder, instead of on its own.
    keep, look_in
        Folders of a trained ``sasrec``, as in `missrec_t4r.runs.sasrec_file.kept_sasrec`.
    """

    data: Path
    split: str
    protocols: Sequence[str]
    shared: bool
    keep: Path | None
    look_in: Sequence[Path]

    def __post_init__(self) -> None:
        self.catalogue = Catalogue.load(self.data / CATALOGUE_FOLDER)
        self.sessions = Sessions.load(self.folder, ())
        if not len(self.sessions):
            raise DataError(f"{self.folder} has no session", "at least one history with a target", "re-run missrec etl")
        histories, self.targets = self.sessions.split_last()
        self.histories = histories.known()

    @property
    def folder(self) -> Path:
        """Folder of the sessions."""
        return self.data / self.split

    @cached_property
    def users(self) -> list[str | None]:
        """Raw user ids as text, by which lists and the sessions of other folders are matched."""
        return _users(self.sessions, self.folder)


class Match:
    """The sessions of another data folder that are those of the benchmark: the same user with the same target."""

    def __init__(self, benchmark: Benchmark, data: Path, sessions: Sessions, catalogue: Catalogue) -> None:
        self.counts: dict[str, int] = {}
        self.rows = np.arange(catalogue.n_rows)
        """Row of the other catalogue -> row of the benchmark's."""
        self.sessions = self.others = np.arange(len(benchmark.sessions))
        """Indices of the sessions in the benchmark, and in the other folder."""
        if data.resolve() == benchmark.data.resolve():
            return
        self.rows[FIRST_ITEM_ROW:] = rows_by_text(one_array(catalogue.items[ITEM_ID]), benchmark.catalogue)
        place_of_user = {user: place for place, user in enumerate(_numbered(_users(sessions, data)))}
        others = np.array([place_of_user.get(user, -1) for user in _numbered(benchmark.users)], np.int64)
        same_user = np.flatnonzero(others >= 0)
        targets = self.rows[sessions.values[sessions.offsets[1:] - 1]]
        same_target = targets[others[same_user]] == benchmark.targets[same_user]
        self.sessions = same_user[same_target]
        self.others = others[self.sessions]
        self.counts = {
            "missing_users": int((others < 0).sum()),
            "sessions_with_another_target": int((~same_target).sum()),
            "additional_users": len(sessions) - len(same_user),
        }

    def seed(self, ranking: Ranking) -> Seed:
        """Return a ranking in the order and the rows of the benchmark."""
        lists = {
            protocol: np.where(rows >= 0, self.rows[np.maximum(rows, 0)], -1)[self.others]
            for protocol, rows in ranking.recommended.items()
        }
        ranks = {protocol: ranks[self.others] for protocol, ranks in ranking.ranks.items()}
        return Seed(self.sessions, ranks, lists)


def _users(sessions: Sessions, folder: Path) -> list[str | None]:
    if sessions.users is None:
        raise DataError(
            f"{folder} has no column user_id",
            "the users, by which lists are matched",
            "run missrec etl with --user-column",
        )
    users: list[str | None] = as_text(sessions.users).to_pylist()
    return users


def _numbered(users: Sequence[str | None]) -> list[tuple[str | None, int]]:
    """Return every user with the number of the user's session, as a user may have several."""
    numbers: defaultdict[str | None, Iterator[int]] = defaultdict(count)
    return [(user, next(numbers[user])) for user in users]
