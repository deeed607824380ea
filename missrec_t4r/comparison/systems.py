"""The systems of a comparison: what a user may name, and what each one recommends to the sessions of the benchmark.

| given | is | class |
|---|---|---|
| a folder with ``run.json`` | a run of ``missrec train``, scored as it is exported; several are its seeds | `Run` |
| ``network``, ``terms`` | the network of the first run alone, its score terms alone | `PartOfRun` |
| a folder with ``t4rec_model_class.pkl``, a ``tr.Model`` | a Transformers4Rec model for the next item | `T4RModel` |
| a parquet file or folder | lists of whatever system made them | `ListFile` |
| ``popularity``, ``item_knn``, ``content_knn``, ``sasrec`` | a baseline, tuned for every protocol | `Baseline` |
| a function of `Sessions` | a `Scorer` | `ScorerSystem` |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.comparison.benchmark import Benchmark, Match, Ranked, Seed
from missrec_t4r.comparison.cost import cost
from missrec_t4r.comparison.lists import rank_lists, read_lists
from missrec_t4r.data.event_features import load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.evaluation.full_ranking import KEPT_STRICT, Ranking, Scorer, protocols_of, rank_systems
from missrec_t4r.evaluation.metrics import KS
from missrec_t4r.ranking.protocols import MODEL, NETWORK, TERMS, Blend, BlendScorer, blends_of
from missrec_t4r.ranking.tune import Validation
from missrec_t4r.runs.evaluate import ALL_BASELINES, fitted_baselines, rank_system
from missrec_t4r.runs.run_folder import RUN_FILE, WEIGHTS_FILE, LoadedRun, data_folder, load_run, read_info, trained_on
from missrec_t4r.schema import LIST_SUFFIX

OF_A_RUN: Final = (NETWORK, TERMS)
T4R_FILE: Final = "t4rec_model_class.pkl"
TOP_K: Final = max(KS)


@dataclass
class System(ABC):
    """A system to compare, as the user named it."""

    kind: ClassVar[str]
    name: str
    """Its label."""

    @abstractmethod
    def rank(self, benchmark: Benchmark) -> Ranked:
        """Rank the benchmark's sessions."""

    def _ranked_by(
        self, scorers: Mapping[str, Scorer], benchmark: Benchmark, histories: Sessions | None = None
    ) -> Ranked:
        """Return the ranking by scorers of the benchmark's catalogue, one per protocol."""
        histories = benchmark.histories if histories is None else histories
        scorers = {protocol: scorer for protocol, scorer in scorers.items() if protocol in benchmark.protocols}
        ranked = Ranked(self.name, self.kind, n_items=benchmark.catalogue.n_items)
        ranking = Ranking({}, {}, 0)
        if scorers:
            ranking = rank_system(
                scorers, histories, benchmark.targets, benchmark.catalogue, TOP_K, f"ranking {self.name}"
            )
            first = next(iter(scorers.values()))
            ranked.cost = cost(first, histories.known(), benchmark.catalogue.n_rows)
        ranked.seeds = [Seed(np.arange(len(benchmark.targets)), ranking.ranks, ranking.recommended)]
        return ranked


@dataclass
class Run(System):
    """A run of ``missrec train``."""

    kind = "run"
    folders: Sequence[Path]
    """One per seed."""
    parts_alone: list[str] = field(default_factory=list)
    """Parts of the first seed that are ranked in the same pass, of `OF_A_RUN`."""
    _ranked: dict[str, Ranked] = field(default_factory=dict)

    @property
    def data(self) -> Path:
        """Data folder of its first seed."""
        return data_folder(self.folders[0], read_info(self.folders[0]))

    def trained_on(self) -> int | None:
        """Return the checksum of the sessions of its training, None where it records none.

        Raises
        ------
        ConfigError
            Its seeds were trained on different sessions.
        """
        folders = {trained_on(folder): folder for folder in self.folders}
        folders.pop(None, None)
        if len(folders) > 1:
            first, second = list(folders.values())[:2]
            raise ConfigError(
                f"{first} and {second}, seeds of {self.name}, were trained on different sessions",
                "seeds that differ in nothing but the seed",
                "give each a name of its own: they are two systems",
            )
        return next(iter(folders), None)

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Rank with network and terms."""
        return self.with_parts(benchmark)[MODEL]

    def with_parts(self, benchmark: Benchmark) -> Mapping[str, Ranked]:
        """Rank with the run and with its parts, once; by ``model`` and the names of the parts."""
        if not self._ranked:
            sizes = [(folder / WEIGHTS_FILE).stat().st_size for folder in self.folders]
            self._ranked = {part: Ranked(part, f"{part} of {self.name}") for part in self.parts_alone}
            self._ranked[MODEL] = Ranked(self.name, self.kind, size=round(sum(sizes) / len(sizes)))
            for number, folder in enumerate(self.folders):
                self._rank_seed(folder, benchmark, self.parts_alone if number == 0 else [])
        return self._ranked

    def _rank_seed(self, folder: Path, benchmark: Benchmark, parts: Sequence[str]) -> None:
        run = load_run(folder, benchmark.data if benchmark.shared else None)
        train, valid, sessions = (
            load_sessions(run.data, split, run.model.event_columns) for split in ("train", "valid", benchmark.split)
        )
        histories, targets = sessions.split_last()
        validation = Validation(run.model, run.catalogue, train.known(), valid.with_known_target())
        rankings = rank_systems(
            BlendScorer(validation.scorer, _blends(run, validation, benchmark.protocols, parts)),
            histories,
            targets,
            run.catalogue.n_rows,
            top_k=TOP_K,
            description=f"ranking {self.name}",
        )
        if not self._ranked[MODEL].seeds:
            self._ranked[MODEL].cost = cost(validation.scorer, histories.known(), run.catalogue.n_rows)
        match = Match(benchmark, run.data, sessions, run.catalogue)
        for name, ranking in rankings.items():
            ranked = self._ranked[name]
            ranked.seeds.append(match.seed(ranking))
            ranked.n_items = run.catalogue.n_items
            ranked.counts |= match.counts


def _blends(
    run: LoadedRun, validation: Validation, protocols: Sequence[str], parts: Sequence[str]
) -> dict[str, dict[str, Blend]]:
    """Return the scores of a run as it is exported, under ``kept_strict`` tuned for it, and of its parts."""
    tuned: dict[str, dict[str, Blend]] = {}
    if KEPT_STRICT in protocols or parts:
        tuned = blends_of(run.model, validation, alone=TERMS in parts)[0]
    exported = Blend(run.model.terms)
    blends = {part: {protocol: tuned[part][protocol] for protocol in protocols} for part in parts}
    blends[MODEL] = {
        protocol: tuned[MODEL][KEPT_STRICT] if protocol == KEPT_STRICT else exported for protocol in protocols
    }
    return blends


@dataclass
class PartOfRun(System):
    """The network or the score terms of the first run of the comparison."""

    kind = "part of a run"
    part: str
    """Of `OF_A_RUN`."""
    run: Run | None = None

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Rank with the part alone."""
        if self.run is None:
            raise ConfigError(f"{self.part} without a run", "the run that it is a part of", "name a run folder too")
        return replace(self.run.with_parts(benchmark)[self.part], name=self.name)


@dataclass
class T4RModel(System):
    """A ``tr.Model``, or the folder that its ``save`` wrote: a pickle, which can run any code when it is read."""

    kind = "t4r model"
    model: Any
    trust_pickle: bool
    max_sequence_length: int | None
    """Last items of a session that it reads; by default what its inputs or its schema state."""

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Rank with the model's next-item task."""
        import missrec_t4r.t4r  # noqa: F401  # before Merlin: it sets what dask must find
        from missrec_t4r.t4r.scorer import T4RScorer, load_saved

        model, size = self.model, None
        if isinstance(model, str | Path):
            if not self.trust_pickle:
                raise ConfigError(
                    f"{model} is a pickle, which can run any code when it is read",
                    "your consent",
                    "if it is yours, add --trust-pickle",
                )
            size = sum(file.stat().st_size for file in Path(model).glob("*.pkl"))
            model = load_saved(Path(model))
        scorer = T4RScorer(model, benchmark.catalogue, self.max_sequence_length)
        columns = [name.removesuffix(LIST_SUFFIX) for name in scorer.columns if name != scorer.item]
        histories, _ = Sessions.load(benchmark.folder, columns).split_last()
        ranked = self._ranked_by(dict.fromkeys(scorer.protocols, scorer), benchmark, histories)
        ranked.size = size
        ranked.notes.append(f"reads the last {scorer.length} items of a session; another number: --max-sequence-length")
        return ranked


@dataclass
class ScorerSystem(System):
    """A function of the caller's that scores sessions."""

    kind = "scorer"
    scorer: Scorer

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Rank with the function."""
        return self._ranked_by(dict.fromkeys(protocols_of(self.scorer), self.scorer), benchmark)


@dataclass
class Baseline(System):
    """A baseline that is tuned on validation."""

    kind = "baseline"
    baseline: str

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Fit, tune and rank."""
        fitted, _ = fitted_baselines(
            benchmark.data, benchmark.catalogue, names=[self.baseline], keep=benchmark.keep, look_in=benchmark.look_in
        )
        if self.baseline not in fitted:
            raise ConfigError(
                f"{self.baseline} on a catalogue without vectors", "texts or images", "leave the baseline out"
            )
        scorer = fitted[self.baseline]
        scorers = scorer if isinstance(scorer, Mapping) else dict.fromkeys(protocols_of(scorer), scorer)
        return self._ranked_by(scorers, benchmark)


@dataclass
class ListFile(System):
    """Recommendation lists in parquet."""

    kind = "lists"
    path: Path

    def rank(self, benchmark: Benchmark) -> Ranked:
        """Evaluate the lists of the benchmark's users as they are."""
        lists = read_lists(self.path, benchmark.catalogue)
        line_of_user = {user: line for line, user in enumerate(lists.users.to_pylist())}
        lines = np.array([line_of_user.get(user, -1) for user in benchmark.users], np.int64)
        sessions = np.flatnonzero(lines >= 0)
        if not len(sessions):
            raise DataError(
                f"none of the {len(line_of_user):,} users of {self.path} is in {benchmark.folder} "
                f"({next(iter(line_of_user))!r} there, {benchmark.users[0]!r} here)",
                "the same raw user ids",
                "write lists for the users of this data folder",
            )
        ranks, shown = rank_lists(
            lists.rows[lines[sessions]],
            benchmark.histories.take(sessions),
            benchmark.targets[sessions],
            benchmark.catalogue.n_rows,
            TOP_K,
        )
        ranks, shown = (
            {protocol: own for protocol, own in by_protocol.items() if protocol in benchmark.protocols}
            for by_protocol in (ranks, shown)
        )
        counts = {
            "missing_users": len(benchmark.users) - len(sessions),
            "additional_users": len(line_of_user) - len(np.unique(lines[sessions])),
            **lists.counts,
        }
        longest = lists.rows.shape[1]
        notes = [f"lists of at most {longest} items"] if longest < TOP_K else []
        shortest = min((int((rows != -1).sum(1).min()) for rows in shown.values()), default=0)
        if shortest < min(KS):
            notes.append(f"the shortest list has {shortest} items: it cannot have a hit beyond")
        files = [self.path] if self.path.is_file() else self.path.glob("*.parquet")
        size = sum(file.stat().st_size for file in files)
        seed = Seed(sessions, ranks, shown)
        return Ranked(self.name, self.kind, [seed], size, benchmark.catalogue.n_items, counts, notes)


def named(
    systems: Mapping[str, Any] | Sequence[Any],
    baselines: Sequence[str] = (),
    *,
    trust_pickle: bool = False,
    max_sequence_length: int | None = None,
) -> list[System]:
    """Return the systems that were asked for and the baselines beside them, with their labels.

    Raises
    ------
    ConfigError
        A label is used twice, or one system has several values that are not runs.
    DataError
        A path is nothing that can be compared.
    """
    pairs = [*systems.items()] if isinstance(systems, Mapping) else [_labelled(system) for system in systems]
    pairs += [(name, name) for name in baselines if ("", name) not in pairs and (name, name) not in pairs]
    values = [list(value) if isinstance(value, list | tuple) else [value] for _, value in pairs]
    everything = [value for of_one_system in values for value in of_one_system]
    labels = [name or _label(seeds[0], everything) for (name, _), seeds in zip(pairs, values, strict=True)]
    if repeated := [name for name, times in Counter(labels).items() if times > 1]:
        raise ConfigError(f"two systems called {repeated[0]!r}", "one name each", "give names: NAME=PATH")
    result: list[System] = []
    for label, seeds in zip(labels, values, strict=True):
        if isinstance(seeds[0], str | Path) and (Path(seeds[0]) / RUN_FILE).is_file():
            result.append(Run(label, [Path(folder) for folder in seeds]))
            continue
        result.append(_system(label, seeds[0], trust_pickle, max_sequence_length))
        if len(seeds) > 1:
            raise ConfigError(f"{len(seeds)} paths of one system that are not runs", "runs as seeds, or one path")
    runs = runs_of(result)
    for system in result:
        if isinstance(system, PartOfRun) and runs:
            system.run = runs[0]
            runs[0].parts_alone.append(system.part)
    return result


def _labelled(system: Any) -> tuple[str, Any]:
    if not isinstance(system, str):
        return "", system
    name, equals, paths = system.partition("=")
    return (name, paths.split(",")) if equals and "/" not in name else ("", system)


def _label(value: Any, everything: Sequence[Any]) -> str:
    """Return the shortest end of a path that no other system has."""
    if not isinstance(value, str | Path):
        return type(value).__name__
    paths = [_parts(other) for other in everything if isinstance(other, str | Path)]
    names = _parts(value)
    ends = (names[-n:] for n in range(1, len(names) + 1))
    return str(Path(*next((end for end in ends if sum(path[-len(end) :] == end for path in paths) == 1), names)))


def _parts(path: str | Path) -> tuple[str, ...]:
    """Return the parts of a path, without the suffix of a parquet file; the number of ``run-0.5`` is none."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix == ".parquet" else path).parts


def _system(name: str, value: Any, trust_pickle: bool, max_sequence_length: int | None) -> System:
    """Return a system that is not a run."""
    if not isinstance(value, str | Path) and not hasattr(value, "heads"):
        return ScorerSystem(name, value)
    path = Path(value) if isinstance(value, str | Path) else None
    if path is None or (path / T4R_FILE).is_file():
        return T4RModel(name, value, trust_pickle, max_sequence_length)
    if not path.exists() and str(value) in ALL_BASELINES:
        return Baseline(name, str(value))
    if not path.exists() and str(value) in OF_A_RUN:
        return PartOfRun(name, str(value))
    is_bundle = (path / MANIFEST_FILE).is_file()
    if path.is_file() or (any(path.glob("*.parquet")) and not is_bundle):
        return ListFile(name, path)
    raise DataError(
        f"{path} is " + ("a bundle" if is_bundle else "nothing to compare" if path.exists() else "missing"),
        f"a run folder with {RUN_FILE}, a folder with {T4R_FILE}, a parquet file of lists, or one of "
        f"{', '.join((*ALL_BASELINES, *OF_A_RUN))}",
        "name the run that it was exported from" if is_bundle else "check the path",
    )


def runs_of(systems: Sequence[System]) -> list[Run]:
    """Return the runs among some systems."""
    return [system for system in systems if isinstance(system, Run)]
