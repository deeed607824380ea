"""Statistics of a data folder for the data report: counts, session lengths, popularity, coverage, event times."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import row_files
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.user_sessions import keyed_sessions, longest_rows
from missrec_t4r.errors import DataError
from missrec_t4r.etl.outputs import VERSIONS_FILE
from missrec_t4r.etl.quality.checks import largest_counts
from missrec_t4r.io.json_files import read_json
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, SPLITS, TIMESTAMP

DAY = 86_400
_FIRST_CLOCK = 94_694_400  # 1973 in unix seconds: smaller numbers are positions in a session, not times
_POPULAR = 1_000
"""Number of most popular items that are compared with the next run."""
_MOST_DAYS = 40_000
"""About a century. A larger range comes from broken times: then one bin is counted, not one per day."""
_LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000)


@dataclass(frozen=True)
class ReportData:
    """The whole sessions of a data folder, its catalogue and the counts of its ETL."""

    sessions: Sessions
    catalogue: Catalogue
    findings: Mapping[str, int]
    """Counts of the data-quality findings of the ETL, by check."""
    raw_events: int
    """Number of events that the findings are of: those that the ETL kept, of updates those that they read."""
    users: int
    version: int
    """Number of times that the folder was written: 1, and one more for each update."""

    @classmethod
    def load(cls, data: Path, accepted: int | None = None) -> ReportData:
        """Read a data folder; the longest of a session's splits is the whole session.

        Parameters
        ----------
        data : Path
        accepted : int, optional
            Version of the folder that a report accepted last: findings are those of all updates since, so that what
            was refused with one update is not accepted with the next. By default those of the newest update.

        Raises
        ------
        DataError
            It is not a data folder.
        """
        report = data / "etl.json"
        if not report.is_file():
            raise DataError(f"{data} holds no etl.json", "a data folder", "write one with `missrec etl`")
        written = read_json(report)
        splits = [data / split for split in SPLITS if row_files(data / split)]
        findings, read = largest_counts(written.get("findings", [])), int(written.get("events_read", 0))
        version, changes = int(written.get("version", 1)), _updates_after(data, accepted)
        if len(changes) > 1:
            read = sum(change.get("events_read", 0) for change in changes)
            findings = dict(sum((Counter(change.get("findings", {})) for change in changes), Counter[str]()))
        rows = [keyed_sessions(split, [TIMESTAMP]) for split in splits]
        sessions = longest_rows(rows)
        n_users = len({key[0] for _, keys in rows for key in keys})
        events, users = int(written.get("events", len(sessions.values))), int(written.get("users", n_users))
        return cls(sessions, Catalogue.load(data / CATALOGUE_FOLDER), findings, read or events, users, version)

    @property
    def times(self) -> Doubles | None:
        """Unix seconds per event; None if the data have no times, or positions instead."""
        times = self.sessions.features.get(TIMESTAMP)
        if times is None or not len(times):
            return None
        seconds = np.asarray(times, np.float64)
        return seconds if float(np.median(seconds)) >= _FIRST_CLOCK else None


def _updates_after(data: Path, accepted: int | None) -> list[Mapping[str, Any]]:
    """Return what ``versions.json`` says of the updates after a version; nothing where none was accepted."""
    file = data / VERSIONS_FILE
    changes = read_json(file)["changes"] if accepted is not None and file.is_file() else []
    return [change for change in changes if change["version"] > (accepted or 0)]


def compute_statistics(data: ReportData, now: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the statistics (flat, one number each, as a quality gate names them) and the distributions of the charts.

    Parameters
    ----------
    now : float
        Unix seconds: the reference for the age of the newest event and for events in the future.
    """
    sessions, catalogue = data.sessions, data.catalogue
    counts = np.bincount(sessions.values, minlength=catalogue.n_rows)[FIRST_ITEM_ROW:]  # events per item, [item]
    lengths, events = sessions.lengths, len(sessions.values)
    top = np.sort(counts)[::-1]  # most popular first
    statistics: dict[str, Any] = {
        "events": events,
        "sessions": len(sessions),
        "users": data.users,
        "items": catalogue.n_items,
        "items_without_events": int((counts == 0).sum()),
        "session_length_mean": round(float(lengths.mean()), 4),
        "session_length_median": float(np.median(lengths)),
        "session_length_max": int(lengths.max()),
        "share_short_sessions": _share((lengths < 3).sum(), len(lengths)),
        "share_top_1_percent_items": _share(top[: max(1, len(top) // 100)].sum(), events),
        "popularity_gini": gini(counts),
        "share_repeated_items": _share(_repeats(sessions), events),
    }
    distributions: dict[str, Any] = {
        "session_lengths": _histogram(lengths, _LENGTHS),
        "popularity": _ranks(top),
        "popular": _popular(catalogue, counts),
        "coverage": {},
    }
    for name, modality in catalogue.modalities.items():
        present = modality.present[FIRST_ITEM_ROW:]
        statistics[f"coverage.{name}"] = _share(present.sum(), len(present))
        statistics[f"coverage_of_events.{name}"] = _share(counts[present].sum(), events)
        distributions["coverage"][name] = {
            "items": statistics[f"coverage.{name}"],
            "events": statistics[f"coverage_of_events.{name}"],
            "width": modality.width,
            "encoder": modality.encoder.get("name", "?"),
            "fingerprint": modality.fingerprint,
        }
    statistics |= {f"share.{check}": _share(count, data.raw_events) for check, count in data.findings.items()}
    if data.times is not None:
        of_times, distributions["events_per_day"] = _time_statistics(data.times, sessions, now)
        statistics |= of_times
    return statistics, distributions


def gini(counts: Ints) -> float:
    """Return the Gini coefficient of the events per item: 0 all equal, towards 1 all events on one item.

        G = sum_i (2 i - n - 1) c_i / (n sum_i c_i),  c_1 <= ... <= c_n

    Examples
    --------
    >>> gini(np.array([5, 5, 5])), gini(np.array([0, 0, 0, 9]))
    (0.0, 0.75)
    """
    ordered = np.sort(counts).astype(np.float64)
    if not ordered.sum():
        return 0.0
    n = len(ordered)
    return round(float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * ordered.sum())), 6)


def _time_statistics(times: Doubles, sessions: Sessions, now: float) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the statistics of the event times and the number of events per day (UTC)."""
    day = (times // DAY).astype(np.int64)  # [event]
    first, last = int(day.min()), int(day.max())
    per_day = np.bincount(day - first if last - first < _MOST_DAYS else [0])  # [day]
    same = np.diff(times) == 0  # [event - 1]: an event at the time of the one before it
    inside = np.ones(len(same), bool)
    inside[sessions.offsets[1:-1] - 1] = False  # pairs of events that belong to different sessions do not count
    days = {
        str(np.datetime64(first + index, "D")): int(count)  # milliseconds, read as seconds, are beyond the year 9999
        for index, count in enumerate(per_day)
    }
    statistics = {
        "days": last - first + 1,
        "days_without_events": int((per_day == 0).sum()),
        "newest_age_days": round((now - float(times.max())) / DAY, 3),
        "share_future": _share((times > now + DAY).sum(), len(times)),
        "share_same_time_as_before": _share((same & inside).sum(), len(times)),
        "last_day_vs_median": round(float(per_day[-1] / max(np.median(per_day), 1)), 4),
    }
    return statistics, days


def _repeats(sessions: Sessions) -> int:
    """Count the events on an item that the session contains before."""
    n_rows = np.int64(sessions.values.max(initial=0) + 1)
    pairs = sessions.session_of_event * n_rows + sessions.values  # one number per (session, item)
    return len(pairs) - len(np.unique(pairs))


def _histogram(values: Ints, edges: tuple[int, ...]) -> dict[str, int]:
    """Return the counts by range: "3-4", "10,000+"."""
    counts, _ = np.histogram(values, [*edges, np.inf])
    labels = [f"{low:,}" if high - low == 1 else f"{low:,}-{high - 1:,}" for low, high in itertools.pairwise(edges)]
    return dict(zip([*labels, f"{edges[-1]:,}+"], counts.tolist(), strict=True))


def _ranks(top: Ints) -> list[list[int]]:
    """Return rank and count at up to 60 ranks that are evenly spaced on a logarithmic axis."""
    with_events = int((top > 0).sum())
    ranks = np.unique(np.geomspace(1, max(with_events, 1), 60).astype(np.int64))
    return [[int(rank), int(top[rank - 1])] for rank in ranks if with_events]


def _popular(catalogue: Catalogue, counts: Ints) -> dict[str, float]:
    """Return the most popular items' shares of the events, by raw id, for the comparison with the next run."""
    rows = np.argsort(-counts, kind="stable")[:_POPULAR]
    ids = catalogue.ids_of(rows + FIRST_ITEM_ROW)
    return {str(item): _share(counts[row], counts.sum()) for item, row in zip(ids, rows, strict=True) if counts[row]}


def _share(part: Any, whole: int) -> float:
    return round(float(part) / max(whole, 1), 6)
