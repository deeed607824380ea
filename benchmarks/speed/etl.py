"""ETL speed: the out-of-core engine, NVTabular's stock operators, pandas and polars, each in its own process.

    python -m benchmarks.speed.etl --rows 1000000        (make bench-etl ROWS=1000000)

All read the same parquet and write the same sessions (items and event types encoded, time-ordered, one row per
user), which is checked on a small table before anything is timed. Ours writes more: the three splits, catalogue,
workflows and what an update needs. Stock operators are timed on at most ``--stock-rows``; their rate falls with size,
so the ratio is a lower bound. At the end ``--nights`` increments of 1 % new events each are added to our folder
(``--update --delta``), for random users and 1 % new ones with 1 % new items; then ``--compact`` rewrites the parquet
files, and the training split is read before and after. Interpreter start and imports are not counted for any of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CHECK_ROWS = 20_000
KINDS = np.array(["view", "cart", "purchase"])
LISTS = ("item_id", "timestamp", "event_type", "rating")
_AHEAD = 16
"""Row groups that are made while others are written."""


def population(rows: int) -> tuple[int, int]:
    """Return the number of users and items for a number of events: a user per eight events, an item per fifty."""
    return max(rows // 8, 50), max(rows // 50, 200)


def generate(
    rows: int,
    folder: Path,
    *,
    seed: int = 0,
    drawn_from: tuple[int, int] | None = None,
    first_time: int = 1_600_000_000,
) -> None:
    """Write events and items: users drawn evenly, items by a power law, a million rows per row group.

    Threads look items up while others are written: that takes most of the time.
    """
    chance = np.random.default_rng(seed)
    users, items = drawn_from or population(rows)
    share = 1 / np.arange(1, items + 1) ** 0.8
    bounds = np.cumsum(share) / share.sum()
    kinds = pa.array(KINDS)

    def table(user: Any, item: Any, time: Any, kind: Any, rating: Any) -> pa.Table:
        columns = {
            "user_id": user,
            "item_id": np.searchsorted(bounds, item).clip(max=items - 1) * 7 + 13,
            "timestamp": time,
            "event_type": kinds.take(pa.array(np.searchsorted([0.7, 0.9], kind))),
            "rating": rating.astype(np.float32),
        }
        return pa.table(columns)

    folder.mkdir(parents=True, exist_ok=True)
    writer = None
    with ThreadPoolExecutor() as pool:
        made: deque[Future[pa.Table]] = deque()
        for start in range(0, rows, 1_000_000):
            size = min(1_000_000, rows - start)
            drawn = (
                chance.integers(0, users, size),
                chance.random(size),
                chance.integers(first_time, first_time + 50_000_000, size),
                chance.random(size),
                chance.integers(1, 6, size),
            )
            made.append(pool.submit(table, *drawn))
            while made and (len(made) > _AHEAD or start + size == rows):
                one = made.popleft().result()
                writer = writer or pq.ParquetWriter(folder / "events.parquet", one.schema)
                writer.write_table(one)
    assert writer is not None
    writer.close()
    pq.write_table(pa.table({"item_id": np.arange(items) * 7 + 13}), folder / "items.parquet")


def ours(folder: Path, out: Path) -> None:
    from missrec_t4r.etl.pipeline import etl

    etl(folder / "events.parquet", folder / "items.parquet", out, engine="disk")


def stock(folder: Path, out: Path) -> None:
    import pandas as pd
    from merlin.io import Dataset
    from nvtabular import Workflow, ops

    items = pd.read_parquet(folder / "items.parquet")["item_id"]
    vocabularies = {"item_id": items, "event_type": pd.Series(KINDS)}
    encoded = ["item_id", "event_type"] >> ops.Categorify(vocabs=vocabularies, out_path=str(out / "build"))
    grouped = ["user_id", "timestamp", "rating"] + encoded >> ops.Groupby(
        ["user_id"], ["timestamp"], {name: ["list"] for name in LISTS}, name_sep="-"
    )
    workflow = Workflow(grouped)
    dataset = Dataset(str(folder / "events.parquet"), engine="parquet", part_size="8GB")
    workflow.fit(dataset)
    workflow.transform(dataset).to_parquet(str(out / "sessions"), output_files=1)


def pandas(folder: Path, out: Path) -> None:
    import pandas as pd

    items = pd.Index(pd.read_parquet(folder / "items.parquet")["item_id"])
    events = pd.read_parquet(folder / "events.parquet")
    events["item_id"] = items.get_indexer(events["item_id"]) + 3
    events["event_type"] = pd.Index(KINDS).get_indexer(events["event_type"]) + 3
    events = events.sort_values(["user_id", "timestamp"], kind="stable")
    sessions = events.groupby("user_id", sort=False)[list(LISTS)].agg(list).reset_index()
    (out / "sessions").mkdir(parents=True)
    sessions.to_parquet(out / "sessions" / "part_0.parquet", index=False)


def polars(folder: Path, out: Path) -> None:
    import polars as pl

    rows = pl.read_parquet(folder / "items.parquet").with_row_index("row", offset=3)
    kinds = pl.DataFrame({"event_type": KINDS.tolist(), "kind": [3, 4, 5]})
    events = pl.scan_parquet(folder / "events.parquet").with_row_index("place")
    sessions = (
        events.join(rows.lazy(), on="item_id", how="left")
        .join(kinds.lazy(), on="event_type", how="left")
        .sort("user_id", "timestamp", "place")
        .group_by("user_id", maintain_order=True)
        .agg(pl.col("row").alias("item_id"), "timestamp", pl.col("kind").alias("event_type"), "rating")
        .collect()
    )
    (out / "sessions").mkdir(parents=True)
    sessions.write_parquet(out / "sessions" / "part_0.parquet")


def day(folder: Path, out: Path) -> None:
    """Add an increment to an existing data folder (``out`` / "data") as a delta file."""
    from missrec_t4r.etl.engine.append import update

    update(folder / "events.parquet", out / "data", delta=True)


def plain_day(folder: Path, out: Path) -> None:
    """Add an increment to an existing data folder by rewriting its parquet files."""
    from missrec_t4r.etl.engine.append import update

    update(folder / "events.parquet", out / "data")


def compact(folder: Path, out: Path) -> None:
    """Compact the delta files into the parquet files."""
    from missrec_t4r.etl.engine.compact import compact as bring_together

    bring_together(out / "data")


def read(folder: Path, out: Path) -> None:
    """Read the training split as trainers do."""
    from missrec_t4r.data.sessions import Sessions

    Sessions.load(out / "data" / "train")


WAYS: dict[str, Callable[[Path, Path], None]] = {"ours": ours, "stock": stock, "pandas": pandas, "polars": polars}
LATER: dict[str, Callable[[Path, Path], None]] = {"day": day, "plain_day": plain_day, "compact": compact, "read": read}
"""What is done with our folder afterwards."""


def sessions_of(way: str, out: Path) -> dict[str, list[Any]]:
    """Return the sessions that a contestant wrote, in the order of users."""
    if way == "ours":  # leave-one-out: the test row is the whole session; users too short for one are in train
        parts = [pq.read_table(file) for split in ("test", "train") for file in sorted((out / split).glob("*.parquet"))]
        table = pa.concat_tables(parts)
        lengths = table["item_id-list"].combine_chunks().value_lengths().to_numpy()
        users = table["user_id"].to_numpy()
        order = np.lexsort((-lengths, users))
        first = order[np.concatenate([[True], users[order][1:] != users[order][:-1]])]
        table = table.take(pa.array(first))
    else:
        table = pa.concat_tables([pq.read_table(file) for file in sorted((out / "sessions").glob("*.parquet"))])
        table = table.sort_by("user_id")
    names = {name.removesuffix("-list"): name for name in table.column_names}
    return {name: table[names[name]].to_pylist() for name in ("user_id", *LISTS)}


def check(folder: Path) -> list[str]:
    """Run all contestants on a small table and require equal sessions; return the available ones."""
    present = [way for way in WAYS if way != "polars" or importlib.util.find_spec("polars")]
    generate(CHECK_ROWS, folder / "check")
    expected = None
    for way in present:
        timed(way, folder / "check", folder / f"check-{way}")
        found = sessions_of(way, folder / f"check-{way}")
        kinds = _kinds_in_order(folder / f"check-{way}") if way == "ours" else [3, 4, 5]
        found["event_type"] = [[kinds[code - 3] for code in row] for row in found["event_type"]]
        expected = expected or found
        for name, column in expected.items():
            if found[name] != column:
                raise SystemExit(f"{way} and ours write different sessions: column {name}")
    return present


def _kinds_in_order(out: Path) -> list[int]:
    """Return the common code of each of our codes: ours follow the frequency."""
    transform = json.loads((out / "session_transform.json").read_text(encoding="utf-8"))
    return [3 + KINDS.tolist().index(kind) for kind in transform["features"]["event_type"]["values"]]


def timed(way: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one contestant in a new process; return its seconds and peak memory."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.speed.etl",
        "--way",
        way,
        "--folder",
        str(folder),
        "--out",
        str(out),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{way} failed:\n{run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def run_way(way: str, folder: Path, out: Path) -> None:
    """Run the contestant in this process and print its seconds and peak memory."""
    from benchmarks.measure import peak_mib

    for module in {
        "ours": ["missrec_t4r.etl.pipeline"],
        "stock": ["missrec_t4r.etl", "nvtabular"],
        **{key: ["missrec_t4r.etl.engine.append", "missrec_t4r.data.sessions"] for key in LATER},
    }.get(way, [way]):
        importlib.import_module(module)
    started, worked = time.perf_counter(), time.process_time()
    {**WAYS, **LATER}[way](folder, out)
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({**took, "peak_mib": peak_mib()}))


def nights(folder: Path, rows: int, count: int) -> dict[str, Any]:
    """Add increments to our folder (``folder / "later" / "data"``) and compact it; return seconds and memory."""
    users, items = population(rows)
    later = folder / "later"
    took: dict[str, list[dict[str, float]]] = {name: [] for name in (*LATER, "read_compacted")}
    for number in range(1, count + 1):
        known = (users + users * number // 100, items + items * number // 100)
        first = 1_650_000_000 + 86_400 * number
        generate(rows // 100, folder / f"new-{number}", seed=number, drawn_from=known, first_time=first)
        if number == 1:
            shutil.copytree(later / "data", folder / "plain" / "data", copy_function=os.link)
            took["plain_day"].append(timed("plain_day", folder / "new-1", folder / "plain"))
            shutil.rmtree(folder / "plain")
        took["day"].append(timed("day", folder / f"new-{number}", later))
    took["read"].append(timed("read", later, later))
    took["compact"].append(timed("compact", later, later))
    took["read_compacted"].append(timed("read", later, later))
    for name, runs in took.items():
        print(f"{name}: {', '.join(format(run['seconds'], '.2f') for run in runs)} s", file=sys.stderr)
    return {
        "day_seconds": round(statistics.median(run["seconds"] for run in took["day"]), 3),
        "day_cpu_seconds": round(statistics.median(run["cpu_seconds"] for run in took["day"]), 3),
        "day_seconds_each": [round(run["seconds"], 3) for run in took["day"]],
        "day_peak_mib": round(max(run["peak_mib"] for run in took["day"])),
        **{f"{name}_seconds": round(took[name][0]["seconds"], 2) for name in took if name != "day"},
    }


def _shares(later: dict[str, Any], full: dict[str, float]) -> dict[str, float]:
    """Return an increment's share of the full run in wall time and in processor time, which other work changes less."""
    if not later:
        return {}
    by_clock, worked = later["day_seconds"] / full["seconds"], later["day_cpu_seconds"] / full["cpu_seconds"]
    return {"": round(by_clock, 3), "_cpu": round(worked, 3)}


def main() -> None:
    from benchmarks.measure import report  # imports torch, which a machine for the ETL alone does not have

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stock-rows", type=int, default=200_000, help="time the stock operators on at most so many")
    parser.add_argument("--ways", default=",".join(WAYS), help="which of them, comma-separated")
    parser.add_argument("--repeat", type=int, default=1, help="the best of so many runs")
    parser.add_argument(
        "--nights", type=int, default=5, help="number of increments of 1 %% that are added one after the other"
    )
    parser.add_argument("--way", choices=[*WAYS, *LATER])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.way:
        run_way(given.way, given.folder, given.out)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ways = [way for way in check(folder) if way in given.ways.split(",")]
        if "ours" not in ways:
            parser.error("--ways must name ours, which the others are compared with")
        generate(given.rows, folder / "events")
        stock_rows = min(given.rows, given.stock_rows)
        generate(stock_rows, folder / "stock")
        took: dict[str, dict[str, float]] = {}
        for way in ways:
            data = folder / ("stock" if way == "stock" else "events")
            runs = [timed(way, data, folder / f"{way}-{number}") for number in range(given.repeat)]
            took[way] = min(runs, key=lambda run: run["seconds"])
            print(f"{way}: {took[way]['seconds']:.1f} s, {took[way]['peak_mib']:.0f} MiB", file=sys.stderr)
        (folder / "later").mkdir()
        (folder / "ours-0").rename(folder / "later" / "data")
        later = nights(folder, given.rows, given.nights) if given.nights else {}
    rates = {way: (stock_rows if way == "stock" else given.rows) / found["seconds"] for way, found in took.items()}
    payload: dict[str, Any] = {
        "rows": given.rows,
        "rows_per_s": round(rates["ours"]),
        **{f"{way}_rows_per_s": round(rate) for way, rate in rates.items() if way != "ours"},
        "peak_mib": round(took["ours"]["peak_mib"]),
        **{f"{way}_peak_mib": round(found["peak_mib"]) for way, found in took.items() if way != "ours"},
        "seconds": {way: round(found["seconds"], 2) for way, found in took.items()},
        "cpu_seconds": {way: round(found["cpu_seconds"], 2) for way, found in took.items()},
        **later,
        **{f"day_share_of_full_run{kind}": share for kind, share in _shares(later, took["ours"]).items()},
        "stock_rows": stock_rows if "stock" in took else 0,
        "ratio_to": {way: round(rates["ours"] / rate, 2) for way, rate in rates.items() if way != "ours"},
        "checked_rows": CHECK_ROWS,
    }
    report(f"etl-{given.rows}", payload)


if __name__ == "__main__":
    main()
