"""A trial: the out-of-core ETL on Polars' streaming engine beside ours, the same splits from the same parquet.

    python -m benchmarks.speed.etl_polars --rows 10000000        (polars of requirements/bench.txt)

Polars' side is what a replacement would do at least: item indices, category codes by frequency, events partitioned by
the user's hash, then per partition sessions in the order of time and the leave-one-out rows of train, valid and test.
It has neither checks nor filters, derived columns, catalogue, workflows, updates or a continuation after a kill. Rows
are compared on a small table before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.speed.etl import CHECK_ROWS, generate, ours

EVENTS_PER_PARTITION = 2_000_000
FIRST = 3
"""Index of the first item and code of the first category."""


def with_polars(folder: Path, out: Path) -> None:
    """Write the splits by Polars."""
    import polars as pl

    events = pl.scan_parquet(folder / "events.parquet")
    items = pl.scan_parquet(folder / "items.parquet").with_row_index("item", offset=FIRST)
    kinds = events.group_by("event_type").len().sort(["len", "event_type"], descending=[True, False])
    codes = kinds.collect(engine="streaming").with_row_index("kind", offset=FIRST).drop("len")
    rows = pq.read_metadata(folder / "events.parquet").num_rows
    partitions = max(1, -(-rows // EVENTS_PER_PARTITION))
    part = (pl.col("user_id").hash() % partitions).alias("part")
    encoded = (
        events.with_row_index("place")
        .drop_nulls(["user_id", "item_id", "timestamp"])
        .join(items, on="item_id", how="left")
        .join(codes.lazy(), on="event_type", how="left")
        .select("place", "user_id", "item", "timestamp", "kind", "rating", part)
    )
    encoded.sink_parquet(pl.PartitionBy(out / "work", key="part"), mkdir=True, compression="lz4", engine="streaming")
    lists = {"item": "item_id-list", "timestamp": "timestamp-list", "kind": "event_type-list", "rating": "rating-list"}
    kinds_of = dict.fromkeys(lists, pl.Int64) | {"rating": pl.Float32}
    for split in ("train", "valid", "test"):
        (out / split).mkdir(parents=True)
    for number, folder_of_part in enumerate(sorted((out / "work").iterdir())):
        sessions = (
            pl.read_parquet(folder_of_part / "**/*.parquet")
            .sort("user_id", "timestamp", "place")
            .group_by("user_id", maintain_order=True)
            .agg(pl.col(name).cast(kinds_of[name]).alias(to) for name, to in lists.items())
        )
        size = pl.col("item_id-list").list.len().cast(pl.Int64)
        longer = size >= FIRST
        prefix = {"train": pl.when(longer).then(size - 2).otherwise(size), "valid": size - 1, "test": size}
        for split, length in prefix.items():
            rows_of = sessions if split == "train" else sessions.filter(longer)
            cut = rows_of.with_columns(pl.col(list(lists.values())).list.head(length))
            cut.write_parquet(out / split / f"part_{number:05}.parquet", compression="snappy", statistics=False)
    shutil.rmtree(out / "work")


WAYS = {"ours": ours, "polars": with_polars}


def rows_of(out: Path, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split in the order of users."""
    tables = [pq.read_table(file) for file in sorted((out / split).glob("*.parquet"))]
    return pa.concat_tables(tables, promote_options="permissive").sort_by("user_id").to_pylist()


def timed(way: str, folder: Path, out: Path) -> dict[str, float]:
    """Run one way in a new process; return seconds, processor seconds and peak memory."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.speed.etl_polars", "--way", way]
    run = subprocess.run([*command, "--folder", str(folder), "--out", str(out)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{way} failed:\n{run.stderr[-3000:]}")
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def run_way(way: str, folder: Path, out: Path) -> None:
    """Run one way in this process and print what it took."""
    import missrec_t4r.etl.pipeline  # noqa: F401  # imports are counted for neither
    from benchmarks.measure import peak_mib

    if way == "polars":
        import polars  # noqa: F401
    started, worked = time.perf_counter(), time.process_time()
    WAYS[way](folder, out)
    took = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    print(json.dumps({**took, "peak_mib": peak_mib()}))


def main() -> None:
    from benchmarks.measure import report

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        run_way(given.way, given.folder, given.out)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for size, name in ((CHECK_ROWS, "check"), (given.rows, "events")):
            generate(size, folder / name)
        for way in WAYS:
            timed(way, folder / "check", folder / f"check-{way}")
        for split in ("train", "valid", "test"):
            if rows_of(folder / "check-ours", split) != rows_of(folder / "check-polars", split):
                raise SystemExit(f"{split}: Polars and ours write different rows")
        took = {way: timed(way, folder / "events", folder / way) for way in WAYS}
    report(
        f"etl-polars-{given.rows}",
        {
            "rows": given.rows,
            **{f"{way}_{name}": round(value, 2) for way, found in took.items() for name, value in found.items()},
            "polars_over_ours": {name: round(took["polars"][name] / took["ours"][name], 2) for name in took["ours"]},
            "checked_rows": CHECK_ROWS,
        },
    )


if __name__ == "__main__":
    main()
