"""Import MovieLens archives in their original layouts: ml-100k, ml-1m, and the csv of ml-20m, -25m, -32m and latest."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd

from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import DataError
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.etl.sources.standard import clean_events, write_dataset
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

_YEAR = r"^(.*?)\s*\((\d{4})\)\s*$"
_EVENTS = [USER_ID, ITEM_ID, "rating", TIMESTAMP]
_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()
"""Genre flags at the end of a line of ml-100k's u.item, in this order."""
Read = Callable[[str], bytes]


def import_movielens(
    archive: str | Path,
    out: str | Path,
    *,
    k_core: int = 0,
    min_item_count: int = 0,
    min_rating: float = 0.0,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Convert a MovieLens archive to ``interactions.parquet`` and ``items.parquet``.

    Parameters
    ----------
    archive : path
        ml-100k.zip, ml-1m.zip, ml-25m.zip or the like, as GroupLens publishes it, or its unpacked folder.
    out : path
        Folder to write; an older import is replaced as a whole.
    k_core : int
        Drop users and items with fewer ratings, repeatedly until all have as many; 0 is off.
    min_item_count : int
        Drop films with fewer ratings, once; 5 gives the published ml-1m set of 3,416 films; 0 is off.
    min_rating : float
        Drop ratings with fewer stars.
    dry_run : bool
        Read and count everything; write nothing.

    Returns
    -------
    dict
        Users, items, events, splits and findings; also written to import.json.

    Raises
    ------
    DataError
        The archive is missing or damaged, or its layout is unknown.
    """
    require_at_least(0, k_core=k_core, min_item_count=min_item_count)
    findings = Findings()
    edition, read = _open(Path(archive))
    log.info(f"reading MovieLens in the layout of {edition}")
    try:
        events, items = _LAYOUTS[edition](read)
    except (KeyError, FileNotFoundError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive} looks like {edition}, but cannot be read ({error})",
            "the archive as GroupLens ships it",
            "download it again",
        ) from error
    if min_rating > 0:
        events = events[events["rating"] >= min_rating]
    if min_item_count > 0:
        events = events[events.groupby(ITEM_ID)[ITEM_ID].transform("size") >= min_item_count]
    events = clean_events(events, findings, k_core=k_core, keep_repeats=True)
    source = {"name": "movielens", "layout": edition, "archive": Path(archive).name}
    settings = {"k_core": k_core, "min_item_count": min_item_count, "min_rating": min_rating}
    return write_dataset(Path(out), events, items, findings, source | settings, dry_run=dry_run)


def _open(archive: Path) -> tuple[str, Read]:
    """Return the layout of an archive and a function that reads one of its files by name."""
    files: dict[str, Path | zipfile.Path]
    if archive.is_dir():
        files = {file.name: file for file in archive.rglob("*") if file.is_file()}
    else:
        try:
            opened = zipfile.ZipFile(archive)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{archive} is not a complete zip archive ({error})",
                "a MovieLens zip or its folder",
                "download it again",
            ) from error
        files = {Path(name).name: zipfile.Path(opened, name) for name in opened.namelist()}
    for edition, required in _REQUIRED_FILES.items():
        if required <= files.keys():
            return edition, lambda name: files[name].read_bytes()
    raise DataError(
        f"{archive} holds {sorted(files)[:8]}",
        f"the files of one of {list(_REQUIRED_FILES)}",
        "name a MovieLens archive",
    )


def _ml_100k(read: Read) -> tuple[pd.DataFrame, pd.DataFrame]:
    events = _events(read("u.data"))
    films = [line.split("|") for line in read("u.item").decode("latin-1").splitlines() if line]
    genres = [[name for name, flag in zip(_GENRES, film[5:], strict=True) if flag == "1"] for film in films]
    return events, _films([film[0] for film in films], [film[1] for film in films], genres)


def _ml_1m(read: Read) -> tuple[pd.DataFrame, pd.DataFrame]:
    events = _events(read("ratings.dat").replace(b"::", b"\t"))
    films = [line.split("::") for line in read("movies.dat").decode("latin-1").splitlines() if line]
    genres = [film[2].split("|") if film[2] else [] for film in films]
    return events, _films([film[0] for film in films], [film[1] for film in films], genres)


def _csv(read: Read) -> tuple[pd.DataFrame, pd.DataFrame]:
    names = {"userId": USER_ID, "movieId": ITEM_ID}
    events = pd.read_csv(BytesIO(read("ratings.csv")), dtype={"userId": str, "movieId": str}).rename(columns=names)
    films = pd.read_csv(BytesIO(read("movies.csv")), dtype=str).fillna("")
    genres = [[] if text.startswith("(no") else text.split("|") for text in films["genres"]]
    return events, _films(films["movieId"].tolist(), films["title"].tolist(), genres)


def _events(lines: bytes) -> pd.DataFrame:
    return pd.read_csv(BytesIO(lines), sep="\t", names=_EVENTS, dtype={USER_ID: str, ITEM_ID: str})


def _films(ids: list[str], titles: list[str], genres: list[list[str]]) -> pd.DataFrame:
    """Return the item table: title without the year, year, genres, and a text of title and genres."""
    names, joined = pd.Series(titles, dtype=object), [", ".join(entries) for entries in genres]
    parts = names.str.extract(_YEAR)
    texts = [". ".join(filter(None, [title.strip(), listed])) for title, listed in zip(titles, joined, strict=True)]
    return pd.DataFrame(
        {
            ITEM_ID: ids,
            "title": parts[0].fillna(names),
            "year": pd.to_numeric(parts[1]).astype("Int64"),
            "genres": [listed or None for listed in joined],
            "text": [text or None for text in texts],
        }
    )


_LAYOUTS = {"ml-100k": _ml_100k, "ml-1m": _ml_1m, "ml-25m": _csv}
_REQUIRED_FILES = {
    "ml-100k": {"u.data", "u.item"},
    "ml-1m": {"ratings.dat", "movies.dat"},
    "ml-25m": {"ratings.csv", "movies.csv"},
}
"""Layout -> the files by which it is recognised."""
