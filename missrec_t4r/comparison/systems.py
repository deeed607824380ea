"""The systems of a comparison: what a user may name, and what each one recommends to the sessions of the benchmark.

| given | is |
|---|---|
| a folder with ``run.json`` | a run of ``missrec train``, scored as it is exported; several are seeds of one system |
| a folder with ``t4rec_model_class.pkl``, a ``tr.Model`` | a Transformers4Rec model with a next-item task |
| a parquet file or folder | lists of whatever system made them |
| ``popularity``, ``item_knn``, ``content_knn``, ``sasrec`` | a baseline, tuned on validation for every protocol |
| ``network``, ``terms`` | the network of the first run alone, its score terms alone |
| a function of `Sessions` | a `Scorer` |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from missrec_t4r.arrays import Ints
from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.comparison.cost import cost
from missrec_t4r.comparison.lists import LIST_PROTOCOLS, as_text, rank_lists, read_lists
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import (
    EXCLUDED,
    KEPT_STRICT,
    KEPT_WITH_HISTORY_TERM,
    PROTOCOLS,
    Ranking,
    Scorer,
    protocols_of,
    rank_systems,
)
from missrec_t4r.evaluation.metrics import KS
from missrec_t4r.io.json_files import read_json
from missrec_t4r.ranking.protocols import MODEL, NETWORK, TERMS, Blend, BlendScorer, blends_of
from missrec_t4r.ranking.tune import Validation
from missrec_t4r.runs.evaluate import ALL_BASELINES, System, fitted_baselines, rank_system
from missrec_t4r.runs.run_folder import RUN_FILE, WEIGHTS_FILE, data_folder, load_run, trained_on
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, UNKNOWN_ROW

OF_A_RUN: Final = (NETWORK, TERMS)
T4R_FILE: Final = "t4rec_model_class.pkl"
RUN, T4R, LISTS, BASELINE, SCORER, PART = "run", "t4r model", "lists", "baseline", "scorer", "part of a run"
TOP_K: Final = max(KS)


@dataclass(frozen=True)
class Named:
    """A system as it was asked for.

    Parameters
    ----------
    name : str
        Its label.
    kind : str
    parts : sequence
        Paths of its runs, one per seed, or its only path or object.
    """

    name: str
    kind: str
    parts: Sequence[Any]


class Seed(NamedTuple):
    """What one model recommends."""

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
    seeds: list[Seed]
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
        """Those that all its seeds have."""
        return [name for name in PROTOCOLS if all(name in seed.ranks for seed in self.seeds)]


class Benchmark:
    """The sessions on which all systems are compared.

    Parameters
    ----------
    data : Path
        Data folder.
    split : str
        ``test`` or ``valid``.
    shared : bool
        Whether every run is ranked on this folder, instead of on its own.
    """

    def __init__(self, data: Path, split: str, *, shared: bool) -> None:
        self.data, self.split, self.shared = data, split, shared
        self.catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
        self.sessions = Sessions.load(data / split, ())
        if not len(self.sessions):
            raise DataError(
                f"{data / split} has no session", "at least one history with a target", "re-run missrec etl"
            )
        histories, self.targets = self.sessions.split_last()
        self.histories = histories.known()

    @cached_property
    def users(self) -> list[str | None]:
        """Raw user ids as text, by which lists and the sessions of other folders are matched."""
        return _users(self.sessions, self.data / self.split)


def named(systems: Mapping[str, Any] | Sequence[Any]) -> list[Named]:
    """Return the systems with their labels and kinds.

    Raises
    ------
    ConfigError
        A label is used twice.
    DataError
        A path is nothing that can be compared.
    """
    given = [*systems.items()] if isinstance(systems, Mapping) else [_labelled(one) for one in systems]
    parts = [(name, _parts(value)) for name, value in given]
    labels = [name or _label(of[0], [one for _, others in parts for one in others]) for name, of in parts]
    if repeated := [name for name, count in Counter(labels).items() if count > 1]:
        raise ConfigError(f"two systems called {repeated[0]!r}", "one name each", "give names: NAME=PATH")
    return [Named(label, _kind(of), of) for label, (_, of) in zip(labels, parts, strict=True)]


def _labelled(one: Any) -> tuple[str, Any]:
    if not isinstance(one, str):
        return "", one
    name, equals, rest = one.partition("=")
    return (name, rest.split(",")) if equals and "/" not in name else ("", one)


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _label(part: Any, others: Sequence[Any]) -> str:
    """Return the shortest end of a path that no other system has."""
    if not isinstance(part, str | Path):
        return type(part).__name__
    names = Path(part).with_suffix("").parts
    ends = (names[-n:] for n in range(1, len(names) + 1))
    paths = [Path(other).with_suffix("").parts for other in others if isinstance(other, str | Path)]
    return str(Path(*next((end for end in ends if sum(path[-len(end) :] == end for path in paths) == 1), names)))


def _kind(parts: Sequence[Any]) -> str:
    first = parts[0]
    if not isinstance(first, str | Path):
        return T4R if hasattr(first, "heads") else SCORER
    path = Path(first)
    is_bundle = (path / MANIFEST_FILE).is_file()
    if not path.exists() and str(first) in (*ALL_BASELINES, *OF_A_RUN):
        return BASELINE if str(first) in ALL_BASELINES else PART
    kind = (
        RUN
        if (path / RUN_FILE).is_file()
        else T4R
        if (path / T4R_FILE).is_file()
        else LISTS
        if path.is_file() or (any(path.glob("*.parquet")) and not is_bundle)
        else ""
    )
    if not kind:
        raise DataError(
            f"{path} is " + ("a bundle" if is_bundle else "nothing to compare" if path.exists() else "missing"),
            f"a run folder with {RUN_FILE}, a folder with {T4R_FILE}, a parquet file of lists, or one of "
            f"{', '.join((*ALL_BASELINES, *OF_A_RUN))}",
            "name the run that it was exported from" if is_bundle else "check the path",
        )
    if len(parts) > 1 and kind != RUN:
        raise ConfigError(f"{len(parts)} paths of one system that are no runs", "runs as seeds, or one path")
    return kind


def training_sessions(systems: Sequence[Named]) -> dict[str, int]:
    """Return the checksum of the sessions that each run was trained on, where it records one.

    Raises
    ------
    ConfigError
        The seeds of one system were trained on different sessions.
    """
    found: dict[str, int] = {}
    for one in systems:
        recorded = [(part, trained_on(Path(part))) for part in one.parts] if one.kind == RUN else []
        known = {checksum: part for part, checksum in recorded if checksum is not None}
        if len(known) > 1:
            first, second = list(known.values())[:2]
            raise ConfigError(
                f"{first} and {second}, seeds of {one.name}, were trained on different sessions",
                "seeds that differ in nothing but the seed",
                "give each a name of its own: they are two systems",
            )
        found |= dict.fromkeys([one.name], next(iter(known))) if known else {}
    return found


def ranked(
    systems: Sequence[Named],
    benchmark: Benchmark,
    protocols: Sequence[str],
    *,
    trust_pickle: bool = False,
    max_sequence_length: int | None = None,
    keep: Path | None = None,
) -> list[Ranked]:
    """Rank with every system, in the order in which they were given; ``keep`` is where a trained baseline is kept."""
    parts = [one.parts[0] for one in systems if one.kind == PART]
    found: dict[str, Ranked] = {}
    names = [one.parts[0] for one in systems if one.kind == BASELINE]
    if names:
        found |= _baselines(systems, names, benchmark, protocols, keep)
    for one in systems:
        if one.kind == RUN:
            rankings = _run(one, benchmark, protocols, parts)
            for label in [label for label in rankings if label in OF_A_RUN]:
                owner = next(other for other in systems if other.kind == PART and other.parts[0] == label)
                found[owner.name] = rankings[label]
            found[one.name], parts = rankings[MODEL], []
        elif one.kind == LISTS:
            found[one.name] = _lists(one, benchmark, protocols)
        elif one.kind in (T4R, SCORER):
            found[one.name] = _scorer(one, benchmark, protocols, trust_pickle, max_sequence_length)
    if parts:
        raise ConfigError(f"{parts[0]} without a run", "the run that it is a part of", "name a run folder too")
    return [found[one.name] for one in systems]


def _run(one: Named, benchmark: Benchmark, protocols: Sequence[str], parts: Sequence[str]) -> dict[str, Ranked]:
    """Return the run's ranking, and those of the wanted parts of its first seed."""
    sizes = [(Path(part) / WEIGHTS_FILE).stat().st_size for part in one.parts]
    found = {MODEL: Ranked(one.name, RUN, [], round(sum(sizes) / len(sizes)))}
    for name in parts:
        found[name] = Ranked(name, f"{name} of {one.name}", [])
    for number, part in enumerate(one.parts):
        loaded = load_run(part, benchmark.data if benchmark.shared else None)
        sessions = load_sessions(loaded.data, benchmark.split, loaded.model.event_columns)
        histories, targets = sessions.split_last()
        train, valid = (load_sessions(loaded.data, name, loaded.model.event_columns) for name in ("train", "valid"))
        validation = Validation(loaded.model, loaded.catalogue, train.known(), valid.with_known_target())
        wanted = () if number else parts
        blends: dict[str, dict[str, Blend]] = {}
        if KEPT_STRICT in protocols or wanted:
            blends = blends_of(loaded.model, validation, alone=TERMS in wanted)[0]
        exported = Blend(loaded.model.terms)
        strict = blends.get(MODEL, {}).get(KEPT_STRICT, exported)
        blends[MODEL] = {EXCLUDED: exported, KEPT_STRICT: strict, KEPT_WITH_HISTORY_TERM: exported}
        chosen = {
            name: {protocol: blend for protocol, blend in blends[name].items() if protocol in protocols}
            for name in (MODEL, *wanted)
        }
        rankings = rank_systems(
            BlendScorer(validation.scorer, chosen),
            histories,
            targets,
            loaded.catalogue.n_rows,
            top_k=TOP_K,
            description=f"ranking {one.name}",
        )
        if not number:
            found[MODEL].cost = cost(validation.scorer, histories.known(), loaded.catalogue.n_rows)
        match = _Match(benchmark, loaded.data, sessions, loaded.catalogue)
        for name, ranking in rankings.items():
            found[name].seeds.append(match.seed(ranking))
            found[name].n_items = loaded.catalogue.n_items
            found[name].counts |= match.counts
    return found


class _Match:
    """The sessions of another data folder that are those of the benchmark: the same user with the same target."""

    def __init__(self, benchmark: Benchmark, data: Path, sessions: Sessions, catalogue: Catalogue) -> None:
        self.counts: dict[str, int] = {}
        self.rows = np.arange(catalogue.n_rows)
        self.ours = self.theirs = np.arange(len(benchmark.sessions))
        if data.resolve() == benchmark.data.resolve():
            return
        ids = pa.array(catalogue.ids_of(np.arange(FIRST_ITEM_ROW, catalogue.n_rows)))
        known = as_text(pa.array(benchmark.catalogue.ids_of(np.arange(FIRST_ITEM_ROW, benchmark.catalogue.n_rows))))
        found = pc.index_in(as_text(ids), value_set=known).cast(pa.int64())
        self.rows[FIRST_ITEM_ROW:] = pc.add(found, FIRST_ITEM_ROW).fill_null(UNKNOWN_ROW).to_numpy(zero_copy_only=False)
        place = {key: index for index, key in enumerate(_numbered(_users(sessions, data)))}
        theirs = np.array([place.get(key, -1) for key in _numbered(benchmark.users)], np.int64)
        same_user = np.flatnonzero(theirs >= 0)
        targets = self.rows[sessions.values[sessions.offsets[1:] - 1]]
        same = targets[theirs[same_user]] == benchmark.targets[same_user]
        self.ours = same_user[same]
        self.theirs = theirs[self.ours]
        self.counts = {
            "users_that_it_lacks": int((theirs < 0).sum()),
            "sessions_with_another_target": int((~same).sum()),
            "users_of_its_own": len(sessions) - len(same_user),
        }

    def seed(self, ranking: Ranking) -> Seed:
        """Return a ranking in the order and the rows of the benchmark."""
        lists = {
            name: np.where(of >= 0, self.rows[np.maximum(of, 0)], -1)[self.theirs]
            for name, of in ranking.recommended.items()
        }
        return Seed(self.ours, {name: ranks[self.theirs] for name, ranks in ranking.ranks.items()}, lists)


def _lists(one: Named, benchmark: Benchmark, protocols: Sequence[str]) -> Ranked:
    path = Path(one.parts[0])
    lists = read_lists(path, benchmark.catalogue)
    place = {user: index for index, user in enumerate(lists.users.to_pylist())}
    theirs = np.array([place.get(user, -1) for user in benchmark.users], np.int64)
    ours = np.flatnonzero(theirs >= 0)
    if not len(ours):
        raise DataError(
            f"none of the {len(place):,} users of {path} is in {benchmark.data / benchmark.split} "
            f"({next(iter(place))!r} there, {benchmark.users[0]!r} here)",
            "the same raw user ids",
            "write lists for the users of this data folder",
        )
    mine = type(lists)(lists.users, lists.rows[theirs[ours]], lists.longest, lists.counts)
    histories, targets = benchmark.histories.take(ours), benchmark.targets[ours]
    both = rank_lists(mine, histories, targets, benchmark.catalogue.n_rows, TOP_K)
    chosen = {name: found for name, found in both.items() if name in protocols and name in LIST_PROTOCOLS}
    seed = Seed(ours, {name: of[0] for name, of in chosen.items()}, {name: of[1] for name, of in chosen.items()})
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    counts = {
        "users_that_it_lacks": len(benchmark.users) - len(ours),
        "users_of_its_own": len(place) - len(np.unique(theirs[ours])),
        **lists.counts,
    }
    short = min([len(of[0]) and int((of[1] != -1).sum(1).min()) for of in chosen.values()], default=0)
    notes = [f"lists of at most {lists.longest} items"] if lists.longest < TOP_K else []
    notes += [f"the shortest list has {short} items: it cannot have a hit beyond"] if short < min(KS) else []
    size = sum(file.stat().st_size for file in files)
    return Ranked(one.name, LISTS, [seed], size, benchmark.catalogue.n_items, counts, notes)


def _baselines(
    systems: Sequence[Named], names: Sequence[str], benchmark: Benchmark, protocols: Sequence[str], keep: Path | None
) -> dict[str, Ranked]:
    runs = [Path(part) for one in systems if one.kind == RUN for part in one.parts]
    fitted, _ = fitted_baselines(benchmark.data, benchmark.catalogue, names=names, keep=keep, look_in=runs)
    if missing := [name for name in names if name not in fitted]:
        raise ConfigError(f"{missing[0]} on a catalogue without vectors", "texts or images", "leave the baseline out")
    labels = {one.parts[0]: one.name for one in systems if one.kind == BASELINE}
    return {labels[name]: _of_scorer(labels[name], BASELINE, fitted[name], benchmark, protocols) for name in names}


def _of_scorer(
    name: str, kind: str, system: System, benchmark: Benchmark, protocols: Sequence[str], histories: Any = None
) -> Ranked:
    of = system if isinstance(system, Mapping) else dict.fromkeys(protocols_of(system), system)
    chosen = {protocol: scorer for protocol, scorer in of.items() if protocol in protocols}
    histories = benchmark.sessions.split_last()[0] if histories is None else histories
    ranking = rank_system(
        chosen,
        histories,
        benchmark.targets,
        benchmark.catalogue,
        TOP_K,
        f"ranking {name}",
    )
    seed = Seed(np.arange(len(benchmark.targets)), ranking.ranks, ranking.recommended)
    costs = cost(next(iter(chosen.values())), histories.known(), benchmark.catalogue.n_rows) if chosen else None
    return Ranked(name, kind, [seed], n_items=benchmark.catalogue.n_items, cost=costs)


def _scorer(
    one: Named, benchmark: Benchmark, protocols: Sequence[str], trust_pickle: bool, max_sequence_length: int | None
) -> Ranked:
    value = one.parts[0]
    if one.kind == SCORER:
        return _of_scorer(one.name, SCORER, cast("Scorer", value), benchmark, protocols)
    from missrec_t4r.comparison.t4r_model import t4r_system

    system, columns, size, length = t4r_system(
        value, benchmark.catalogue, max_sequence_length, trust_pickle=trust_pickle
    )
    histories = Sessions.load(benchmark.data / benchmark.split, columns).split_last()[0]
    found = _of_scorer(one.name, T4R, system, benchmark, protocols, histories)
    found.size = size
    found.notes.append(f"reads the last {length} items of a session; another number: --max-sequence-length")
    return found


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
    seen: Counter[str | None] = Counter()
    result = []
    for user in users:
        result.append((user, seen[user]))
        seen[user] += 1
    return result


def first_data_folder(systems: Sequence[Named]) -> Path:
    """Return the data folder of the first run.

    Raises
    ------
    ConfigError
        There is no run.
    """
    for one in systems:
        if one.kind == RUN:
            run = Path(one.parts[0])
            return data_folder(run, read_json(run / RUN_FILE))
    raise ConfigError("no run and no --data", "the data folder with the sessions to compare on", "give --data")
