"""Public data sets in their original layouts, made here by hand, and the real ones' counts where they are at hand."""

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from missrec_t4r.cli import app
from missrec_t4r.errors import DataError
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.amazon import import_amazon
from missrec_t4r.etl.sources.movielens import import_movielens
from tests.workflows.tables import items_of


def _gzip(file: Path, rows: list[dict[str, Any]], more: str = "") -> Path:
    file.write_bytes(gzip.compress(("".join(json.dumps(row) + "\n" for row in rows) + more).encode()))
    return file


def _review_2018(user: str, item: str, time: int, stars: float = 5.0) -> dict[str, Any]:
    return {
        "overall": stars,
        "verified": True,
        "reviewTime": "07 4, 2016",
        "reviewerID": user,
        "asin": item,
        "style": {"Size:": " 1"},
        "reviewText": "Works.",
        "summary": "ok",
        "unixReviewTime": time,
    }


META_2018 = [
    {
        "category": ["Industrial &amp; Scientific", "Tapes"],
        "description": ["Strong <b>tape</b>.", ""],
        "title": "Duct&nbsp;tape\n50 m",
        "brand": "Stick",
        "price": "$1,299.50 - $1,300",
        "asin": "B1",
        "imageURL": ["http://small"],
        "imageURLHighRes": ["http://large"],
        "rank": ">#1 in Tapes",
        "also_buy": [],
    },
    {"category": [], "description": "Plain", "title": "Glue", "brand": "", "price": "", "asin": "B2", "imageURL": []},
    {"category": [], "title": "var aPageStart = (new Date()).getTime();", "asin": "B3"},
    {"category": [], "title": "Glue again", "asin": "B2"},
]
REVIEWS_2018 = [
    _review_2018("U1", "B2", 200),
    _review_2018("U1", "B1", 100, 1.0),
    _review_2018("U1", "B1", 300),  # a second review of the same item
    _review_2018("U2", "B1", 50),
    _review_2018("U2", "B1", 50),  # a copy
    _review_2018("U2", "B2", 60),
    _review_2018("U2", "B3", 70),  # no usable title
    _review_2018("U3", "B2", 10),  # the only one of its user
]


def test_amazon_2018(tmp_path: Path) -> None:
    reviews = _gzip(tmp_path / "reviews.json.gz", REVIEWS_2018)
    report = import_amazon("2018", reviews, _gzip(tmp_path / "meta.json.gz", META_2018), tmp_path / "out", k_core=2)
    events = pq.read_table(tmp_path / "out" / "interactions.parquet").to_pylist()
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["split"]) for row in events] == [
        ("U1", "B1", 100, "train"),
        ("U1", "B2", 200, "valid"),
        ("U1", "B1", 300, "test"),
        ("U2", "B1", 50, "train"),
        ("U2", "B2", 60, "train"),
    ]
    tape, glue = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert tape == {
        "item_id": "B1",
        "title": "Duct tape 50 m",
        "text": "Duct tape 50 m. Industrial & Scientific, Tapes. Stick",
        "description": "Strong tape .",
        "brand": "Stick",
        "categories": "Industrial & Scientific, Tapes",
        "price": 1299.5,
        "image_url": "http://large",
    }
    assert (glue["text"], glue["price"], glue["image_url"]) == ("Glue", None, None)
    assert {finding["check"]: finding["count"] for finding in report["findings"]} == {
        "duplicate_items": 1,
        "untitled_items": 1,
        "duplicate_events": 1,
    }
    first = import_amazon(
        "2018", reviews, tmp_path / "meta.json.gz", tmp_path / "out", k_core=2, keep_repeats=False, min_rating=2
    )
    assert first["events"] == 4  # U1's one star is gone, so the later review of B1 is the first


def test_amazon_2023_with_milliseconds_and_parent_products(tmp_path: Path) -> None:
    def review(user: str, item: str, time: int) -> dict[str, Any]:
        return {
            "rating": 4.0,
            "title": "t",
            "asin": "X" + item,
            "parent_asin": item,
            "user_id": user,
            "timestamp": time,
        }

    reviews = [review(user, f"P{item}", 1_588_687_728_000 + 7 * item) for user in ("A", "B") for item in (2, 0, 1)]
    meta = [
        {
            "main_category": "All Beauty",
            "title": f"Soap {item}",
            "price": [9.99, "12.50", "—"][item],
            "images": [
                {"thumb": "t", "large": "l", "variant": "PT01", "hi_res": "h"},
                {"large": "m", "variant": "MAIN"},
            ],
            "store": "Howard",
            "categories": ["Beauty", "Soap"],
            "parent_asin": f"P{item}",
            "details": {"Brand": "Howard"},
        }
        for item in range(3)
    ]
    out = tmp_path / "out"
    report = import_amazon(
        "2023", _gzip(tmp_path / "r.jsonl.gz", reviews), _gzip(tmp_path / "m.gz", meta), out, k_core=2
    )
    assert (report["users"], report["items"], report["events"]) == (2, 3, 6)
    assert report["splits"] == {"test": 2, "train": 2, "valid": 2}
    items = pq.read_table(out / "items.parquet").to_pandas()
    assert items["price"].tolist()[:2] == [9.99, 12.5]
    assert items["image_url"].tolist() == ["m"] * 3
    events = pq.read_table(out / "interactions.parquet").to_pandas()
    assert events["timestamp"].tolist()[:2] == [1_588_687_728.0, 1_588_687_728.007]
    etl(out / "interactions.parquet", out / "items.parquet", tmp_path / "data")  # goes straight in
    assert items_of(tmp_path / "data", "test") == {"A": [3, 4, 5], "B": [3, 4, 5]}


def test_damaged_amazon_files_are_explained(tmp_path: Path) -> None:
    rows = [*REVIEWS_2018 * 30, _review_2018("U4", "B1", 2**70)]
    reviews, meta = _gzip(tmp_path / "r.json.gz", rows, '{"asin": \n'), _gzip(tmp_path / "m.gz", META_2018)
    report = import_amazon("2018", reviews, meta, tmp_path / "out", k_core=0)
    findings = {finding["check"]: finding["count"] for finding in report["findings"]}
    assert (findings["broken_lines"], findings["wrong_type"], findings["incomplete_events"]) == (1, 1, 1)
    with pytest.raises(DataError, match="1 of 2 lines of .* are not JSON objects, such as 'oops'"):
        import_amazon("2018", _gzip(tmp_path / "b.gz", REVIEWS_2018[:1], "oops"), meta, tmp_path / "out", k_core=0)
    with pytest.raises(DataError, match="no line of .* has a field 'parent_asin'.*the other edition"):
        import_amazon("2023", reviews, meta, tmp_path / "new")
    reviews.write_bytes(reviews.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"r.json.gz ends in the middle or is damaged after line \d+"):
        import_amazon("2018", reviews, meta, tmp_path / "new")
    reviews.write_bytes(b"")
    with pytest.raises(DataError, match="has no bytes"):
        import_amazon("2018", reviews, meta, tmp_path / "new")
    assert not (tmp_path / "new").exists()


FILMS = {"1": ("Toy Story (1995)", ["Animation", "Children's"]), "2": ("Città (1987)", ["Drama"]), "3": ("Nobody", [])}
RATINGS = [("7", "2", 4, 30), ("7", "1", 5, 20), ("7", "3", 3, 40), ("9", "1", 2, 10)]


def _archive(folder: Path, layout: str) -> Path:
    """Write the three ratings and films in one of GroupLens's layouts."""
    flags = "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama".split()
    if layout == "ml-100k":
        lines = ["\t".join(map(str, row)) for row in RATINGS]
        films = [
            "|".join([film, title, "01-Jan-1995", "", "http://x", *("01"[flag in genres] for flag in flags), *"0" * 10])
            for film, (title, genres) in FILMS.items()
        ]
        files = {"u.data": lines, "u.item": films}
    elif layout == "ml-1m":
        films = [f"{film}::{title}::{'|'.join(genres)}" for film, (title, genres) in FILMS.items()]
        files = {"ratings.dat": ["::".join(map(str, row)) for row in RATINGS], "movies.dat": films}
    else:
        films = [
            f'{film},"{title}",{"|".join(genres) or "(no genres listed)"}' for film, (title, genres) in FILMS.items()
        ]
        ratings = ["userId,movieId,rating,timestamp", *(",".join(map(str, row)) for row in RATINGS)]
        files = {"ratings.csv": ratings, "movies.csv": ["movieId,title,genres", *films]}
    encoding = "utf-8" if layout == "ml-25m" else "latin-1"
    with zipfile.ZipFile(folder / f"{layout}.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{layout}/{name}", ("\n".join(content) + "\n").encode(encoding))
    return folder / f"{layout}.zip"


@pytest.mark.parametrize("layout", ["ml-100k", "ml-1m", "ml-25m"])
def test_movielens(layout: str, tmp_path: Path) -> None:
    archive = _archive(tmp_path, layout)
    ran = CliRunner().invoke(app, ["import", "movielens", "--archive", str(archive), "--out", str(tmp_path / "out")])
    report = json.loads(ran.stdout.splitlines()[-1])
    assert (report["users"], report["items"], report["events"]) == (2, 3, 4)
    assert report["source"]["layout"] == layout
    good = import_movielens(archive, tmp_path / "good", min_rating=4)
    assert (good["items"], good["events"]) == (2, 2)  # four stars and more
    events = pq.read_table(tmp_path / "out" / "interactions.parquet").to_pylist()
    assert [(row["user_id"], row["item_id"], row["timestamp"], row["split"]) for row in events] == [
        ("7", "1", 20, "train"),
        ("7", "2", 30, "valid"),
        ("7", "3", 40, "test"),
        ("9", "1", 10, "train"),
    ]
    toy, city, nobody = pq.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert (toy["title"], toy["year"], toy["genres"]) == ("Toy Story", 1995, "Animation, Children's")
    assert (city["text"], nobody["year"], nobody["genres"]) == ("Città (1987). Drama", None, None)

    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    unpacked = import_movielens(tmp_path / "unpacked", tmp_path / "again", min_item_count=2)
    assert (unpacked["items"], unpacked["events"]) == (1, 2)
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(DataError, match="not a complete zip archive"):
        import_movielens(archive, tmp_path / "out")


def _published(shared_data: Path, name: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = shared_data / name
    return pd.read_parquet(folder / "interactions.parquet"), pd.read_parquet(folder / "items.parquet")


def test_amazon_scientific_has_the_published_counts_and_splits(shared_data: Path, tmp_path: Path) -> None:
    """The real sequences, written in the layout of 2018 in any order and with copies, come back as published."""
    events, items = _published(shared_data, "amazon_scientific")
    repeats = events.groupby("user_id").head(1)
    rows = [
        _review_2018(row.user_id, row.item_id, row.timestamp)
        for row in pd.concat([events, repeats]).sample(frac=1, random_state=3).itertuples()
    ]
    meta = [{"asin": row.item_id, "title": row.title or "untitled"} for row in items.itertuples()]
    out = tmp_path / "out"
    report = import_amazon("2018", _gzip(tmp_path / "r.gz", rows), _gzip(tmp_path / "m.gz", meta), out)
    assert (report["users"], report["items"], report["events"]) == (8_442, 4_385, 59_427)
    assert report["splits"] == {"test": 8_442, "valid": 8_442, "train": 59_427 - 2 * 8_442}
    assert items["item_id"].tolist() == pq.read_table(out / "items.parquet")["item_id"].to_pylist()
    ours = pq.read_table(out / "interactions.parquet").to_pandas().drop(columns="rating")
    theirs = events.sort_values(["user_id", "timestamp"])[list(ours)].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours, theirs, check_dtype=False)


def test_movielens_100k_has_the_published_counts(shared_data: Path, tmp_path: Path) -> None:
    events, items = _published(shared_data, "ml100k_posters")
    columns = ["user_id", "item_id", "rating", "timestamp"]
    films = [f"{row.item_id}|{row.title} ({row.year})|||{'|0' * 19}" for row in items.itertuples()]
    (tmp_path / "raw").mkdir()
    events[columns].to_csv(tmp_path / "raw" / "u.data", sep="\t", header=False, index=False)
    (tmp_path / "raw" / "u.item").write_text("\n".join(films), encoding="latin-1", errors="replace")
    report = import_movielens(tmp_path / "raw", tmp_path / "out")
    assert (report["users"], report["items"], report["events"]) == (943, 1_682, 100_000)
    ours = pq.read_table(tmp_path / "out" / "interactions.parquet").to_pandas()
    ours = ours.set_index(["user_id", "item_id"])["split"].sort_index()
    theirs = events.set_index(["user_id", "item_id"])["split"].sort_index()
    assert (ours == theirs).mean() > 0.99  # ties of one second are in the order of the file


def test_movielens_1m_has_the_published_counts(shared_data: Path, tmp_path: Path) -> None:
    events, items = _published(shared_data, "ml1m_posters")
    (tmp_path / "raw").mkdir()
    text = events.assign(rating=5)[["user_id", "item_id", "rating", "timestamp"]].to_csv(header=False, index=False)
    (tmp_path / "raw" / "ratings.dat").write_text(text.replace(",", "::"))
    films = [f"{row.item_id}::{row.title} ({row.year})::Drama" for row in items.itertuples()]
    (tmp_path / "raw" / "movies.dat").write_text("\n".join(films), encoding="latin-1", errors="replace")
    frequent = import_movielens(tmp_path / "raw", tmp_path / "out", min_item_count=5)
    assert (frequent["users"], frequent["items"], frequent["events"]) == (6_040, 3_416, 999_611)
