"""What a data report measures: events by day, lengths, popularity, coverage, oddities of the clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.session_files import read_rows, row_files
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError
from missrec_t4r.etl.event_settings import SESSION_ID
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, LIST_SUFFIX, SPLITS, TIMESTAMP, USER_ID

Ints = npt.NDArray[np.int64]

DAY = 86_400
_FIRST_CLOCK = 94_694_400  # 1973: smaller numbers are positions, not unix seconds
_POPULAR = 1_000
_LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1_000, 10_000)


@dataclass(frozen=True)
class Everything:
    """All sessions of a data folder, whole, and its catalogue."""

    sessions: Sessions
    catalogue: Catalogue
    findings: Mapping[str, int]
    """Check -> count, as the ETL wrote them."""
    raw_events: int
    """Events that the ETL kept."""
    users: int

    @classmethod
    def load(cls, data: Path) -> Everything:
        """Read a data folder; of a user's splits the longest is the whole session.

        Raises
        ------
        DataError
            It is no data folder.
        """
        report = data / "etl.json"
        if not report.is_file():
            raise DataError(f"{data} holds no etl.json", "a data folder", "write one with `missrec etl`")
        written = json.loads(report.read_text(encoding="utf-8"))
        parts = [_load(data / split) for split in SPLITS if any((data / split).glob("*.parquet"))]
        findings = {finding["check"]: int(finding["count"]) for finding in written.get("findings", [])}
        whole = _longest([sessions for sessions, _ in parts], [keys for _, keys in parts])
        events, users = int(written.get("events", len(whole.values))), int(written.get("users", len(whole)))
        return cls(whole, Catalogue.load(data / CATALOGUE_FOLDER), findings, events, users)

    @property
    def times(self) -> npt.NDArray[np.float64] | None:
        """Unix seconds per event, None where the data have positions or no times."""
        times = self.sessions.features.get(TIMESTAMP)
        if times is None or not len(times):
            return None
        seconds = np.asarray(times, np.float64)
        return seconds if float(np.median(seconds)) >= _FIRST_CLOCK else None


def measure(data: Everything, now: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the measures (flat, each a number; a gate names them) and the distributions behind the plots.

    Parameters
    ----------
    now : float
        Unix seconds; how old the newest event is, and which ones are in the future, is told from it.
    """
    sessions, catalogue = data.sessions, data.catalogue
    counts = np.bincount(sessions.values, minlength=catalogue.n_rows)[FIRST_ITEM_ROW:]
    lengths, events = sessions.lengths, len(sessions.values)
    top = np.sort(counts)[::-1]
    measures: dict[str, Any] = {
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
    shown: dict[str, Any] = {
        "session_lengths": _histogram(lengths, _LENGTHS),
        "popularity": _ranks(top),
        "popular": _popular(catalogue, counts),
        "coverage": {},
    }
    for name, modality in catalogue.modalities.items():
        present = modality.present[FIRST_ITEM_ROW:]
        measures[f"coverage.{name}"] = _share(present.sum(), len(present))
        measures[f"coverage_of_events.{name}"] = _share(counts[present].sum(), events)
        shown["coverage"][name] = {
            "items": measures[f"coverage.{name}"],
            "events": measures[f"coverage_of_events.{name}"],
            "width": modality.width,
            "encoder": modality.encoder.get("name", "?"),
            "fingerprint": modality.fingerprint,
        }
    measures |= {f"share.{check}": _share(count, data.raw_events) for check, count in data.findings.items()}
    if data.times is not None:
        clock, days = _clock(data.times, sessions, now)
        measures |= clock
        shown["events_per_day"] = days
    return measures, shown


def gini(counts: Ints) -> float:
    """Return how unequal the items' counts are: 0 all the same, towards 1 all events on one item.

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


def _clock(times: npt.NDArray[np.float64], sessions: Sessions, now: float) -> tuple[dict[str, Any], dict[str, int]]:
    """Return what is odd about the times, and the events per day (UTC)."""
    day = (times // DAY).astype(np.int64)
    first, last = int(day.min()), int(day.max())
    per_day = np.bincount(day - first, minlength=last - first + 1) if last - first < 40_000 else np.bincount([0])
    same = np.diff(times) == 0
    inside = np.ones(len(same), bool)
    inside[sessions.offsets[1:-1] - 1] = False  # the step from one session to the next is no step
    days = {
        datetime.fromtimestamp((first + index) * DAY, timezone.utc).strftime("%Y-%m-%d"): int(count)
        for index, count in enumerate(per_day)
    }
    measured = {
        "days": last - first + 1,
        "days_without_events": int((per_day == 0).sum()),
        "newest_age_days": round((now - float(times.max())) / DAY, 3),
        "share_future": _share((times > now + DAY).sum(), len(times)),
        "share_same_time_as_before": _share((same & inside).sum(), len(times)),
        "last_day_vs_median": round(float(per_day[-1] / max(np.median(per_day), 1)), 4),
    }
    return measured, days


def _load(folder: Path) -> tuple[Sessions, list[Any]]:
    """Return a split's sessions, and whose they are: the user, with the session's number where a user has several."""
    names = pq.read_schema(row_files(folder)[0]).names
    owners = [name for name in (USER_ID, SESSION_ID) if name in names]
    table = read_rows(folder, owners)
    keys: list[Any] = list(zip(*(table[name].to_pylist() for name in owners), strict=True))
    sessions = Sessions.load(folder, [TIMESTAMP] if TIMESTAMP + LIST_SUFFIX in names else [])
    return sessions, keys or list(range(len(sessions)))


def _longest(parts: list[Sessions], owners: list[list[Any]]) -> Sessions:
    """Return every owner's longest session; parts are prefixes of one another."""
    best: dict[Any, tuple[int, int, int]] = {}
    for index, part in enumerate(parts):
        for row, (user, length) in enumerate(zip(owners[index], part.lengths.tolist(), strict=True)):
            if user not in best or length > best[user][0]:
                best[user] = (length, index, row)
    taken = []
    for index, part in enumerate(parts):
        rows = [row for _, at, row in best.values() if at == index]
        taken.append(part.take(rows))
    values = np.concatenate([part.values for part in taken])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in taken]))]).astype(np.int64)
    shared = set.intersection(*(set(part.features) for part in taken))
    features = {name: np.concatenate([part.features[name] for part in taken]) for name in shared}
    return Sessions(values, offsets, features)


def _repeats(sessions: Sessions) -> int:
    """Return how many events are on an item that the session had before."""
    owner = np.repeat(np.arange(len(sessions)), sessions.lengths)
    pairs = owner * np.int64(sessions.values.max(initial=0) + 1) + sessions.values
    return len(pairs) - len(np.unique(pairs))


def _histogram(values: Ints, edges: tuple[int, ...]) -> dict[str, int]:
    """Return counts by range: "3-4", "10,000+"."""
    found, result = np.searchsorted(edges, values, side="right") - 1, {}
    for index, low in enumerate(edges):
        high = edges[index + 1] - 1 if index + 1 < len(edges) else None
        label = f"{low:,}+" if high is None else (f"{low:,}" if high == low else f"{low:,}-{high:,}")
        result[label] = int((found == index).sum())
    return result


def _ranks(top: Ints) -> list[list[int]]:
    """Return rank and count at ranks that are evenly spaced on a logarithmic axis."""
    some = int((top > 0).sum())
    at = np.unique(np.geomspace(1, max(some, 1), 60).astype(np.int64))
    return [[int(rank), int(top[rank - 1])] for rank in at if some]


def _popular(catalogue: Catalogue, counts: Ints) -> dict[str, float]:
    """Return the share of the events of the most popular items, by raw id, for the comparison with the next run."""
    rows = np.argsort(-counts, kind="stable")[:_POPULAR]
    ids = catalogue.ids_of(rows + FIRST_ITEM_ROW)
    return {str(item): _share(counts[row], counts.sum()) for item, row in zip(ids, rows, strict=True) if counts[row]}


def _share(part: Any, whole: int) -> float:
    return round(float(part) / max(whole, 1), 6)
