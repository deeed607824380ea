"""Import Amazon reviews of 2018 and 2023 in their original layout: gzip JSON lines of reviews and of metadata.

2018: ``reviewerID``, ``asin``, ``unixReviewTime``, ``overall``; metadata by ``asin``. 2023: ``user_id``,
``parent_asin``, ``timestamp`` in milliseconds, ``rating``; metadata by ``parent_asin``. Defaults follow the published
benchmarks. 2018 (UniSRec, MISSRec): items need a title, copies of a review are dropped, later reviews of the same
item are kept, 5-core. 2023 (its authors' ``5core/last_out``): only the earliest review of a user on an item, 5-core,
items with and without a title. The text of an item is its title, categories and brand.
"""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import DataError
from missrec_t4r.etl.quality.checks import Findings
from missrec_t4r.etl.sources.json_lines import read_columns, records
from missrec_t4r.etl.sources.standard import clean_events, write_dataset
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

_TAG = re.compile(r"<[^>]{1,200}>")
_PRICE = re.compile(r"\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Layout:
    """Field names and benchmark defaults of one edition."""

    user: str
    item: str
    time: str
    rating: str
    per_second: int
    """Units of the time field per second."""
    brand: str
    categories: str
    pictures: tuple[str, ...]
    keep_repeats: bool
    """Whether the published benchmark keeps a user's later reviews of one item."""
    keep_untitled: bool
    """Whether the published benchmark keeps items without a title."""


_2018 = ("reviewerID", "asin", "unixReviewTime", "overall", 1, "brand", "category", ("imageURLHighRes", "imageURL"))
_2023 = ("user_id", "parent_asin", "timestamp", "rating", 1000, "store", "categories", ("images",))
LAYOUTS = {
    "2018": Layout(*_2018, keep_repeats=True, keep_untitled=False),
    "2023": Layout(*_2023, keep_repeats=False, keep_untitled=True),
}


def import_amazon(
    edition: str,
    reviews: str | Path,
    metadata: str | Path,
    out: str | Path,
    *,
    k_core: int = 5,
    min_rating: float = 0.0,
    keep_repeats: bool | None = None,
    keep_untitled: bool | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Turn reviews and metadata into ``interactions.parquet`` and ``items.parquet`` for `missrec etl`.

    Parameters
    ----------
    edition : {"2018", "2023"}
        Edition of the data set.
    reviews : path
        Reviews of a category: JSON lines, plain or gzip.
    metadata : path
        Item metadata of the same category: JSON lines, plain or gzip.
    out : path
        Folder to write; an older import is replaced as a whole.
    k_core : int
        Drop users and items with fewer events, repeatedly until all have as many; 0 is off.
    min_rating : float
        Drop reviews with fewer stars.
    keep_repeats : bool, optional
        Keep or drop a user's later reviews of the same item; by default as the edition's benchmark does.
    keep_untitled : bool, optional
        Keep or drop items without a title in the metadata; by default as the edition's benchmark does.
    dry_run : bool
        Read and count everything; write nothing.

    Returns
    -------
    dict
        Users, items, events, splits and findings; also written to import.json.

    Raises
    ------
    DataError
        A file is missing, damaged or of another layout, or nothing is left.
    """
    require_at_least(0, k_core=k_core)
    layout, findings = LAYOUTS[edition], Findings()
    keep_repeats = layout.keep_repeats if keep_repeats is None else keep_repeats
    keep_untitled = layout.keep_untitled if keep_untitled is None else keep_untitled
    log.info("reading the metadata")
    items = _items(metadata, layout, findings)
    log.info(f"{len(items):,} items; reading the reviews")
    events = _events(reviews, layout, findings)
    if min_rating > 0:
        events = events[events["rating"] >= min_rating]
    if not keep_untitled:
        titled = events[ITEM_ID].isin(items[ITEM_ID][items["title"].notna()])
        findings.add("untitled_items", int((~titled).sum()), "events on items without a title are left out")
        events = events[titled]
    events = clean_events(events, findings, k_core=k_core, keep_repeats=keep_repeats)
    source = {"name": f"amazon-{edition}", "reviews": Path(reviews).name, "metadata": Path(metadata).name}
    kept = {"keep_repeats": keep_repeats, "keep_untitled": keep_untitled}
    settings = {"k_core": k_core, "min_rating": min_rating, **kept}
    return write_dataset(Path(out), events, items, findings, source | settings, dry_run=dry_run)


def _events(file: str | Path, layout: Layout, findings: Findings) -> pd.DataFrame:
    kinds = {layout.user: pa.string(), layout.item: pa.string(), layout.time: pa.int64(), layout.rating: pa.float64()}
    table = read_columns(Path(file), pa.schema(list(kinds.items())), findings)
    for name in (layout.user, layout.item, layout.time):
        if table[name].null_count == table.num_rows:
            raise DataError(
                f"no line of {file} has a field {name!r}", "reviews of this edition", "try the other amazon edition"
            )
    names = {layout.user: USER_ID, layout.item: ITEM_ID, layout.time: TIMESTAMP, layout.rating: "rating"}
    events = table.rename_columns([names[name] for name in table.column_names]).to_pandas()
    if layout.per_second != 1:
        # Fractions of seconds are kept: rounded to seconds, events of one user would lose their order.
        events[TIMESTAMP] = events[TIMESTAMP] / layout.per_second
    return events


def _items(file: str | Path, layout: Layout, findings: Findings) -> pd.DataFrame:
    lines = track(records(Path(file), findings), "metadata")
    rows = [_item(record, layout) for record in lines if record.get(layout.item)]
    if not rows:
        raise DataError(
            f"no line of {file} has a field {layout.item!r}", "metadata of this edition", "try the other edition"
        )
    items = pd.DataFrame(rows)
    duplicate = items.duplicated(ITEM_ID)
    findings.add("duplicate_items", int(duplicate.sum()), "of several lines with one id the first is kept")
    return items[~duplicate].reset_index(drop=True)


def _item(record: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    title, brand = _clean(record.get("title")), _clean(record.get(layout.brand))
    categories = [text for entry in _list(record.get(layout.categories)) if (text := _clean(entry))]
    if title and "getTime" in title:
        title = None  # JavaScript in place of the title: a known defect of the 2018 edition
    text = ". ".join(part for part in (title, ", ".join(categories), brand) if part)
    return {
        ITEM_ID: str(record[layout.item]),
        "title": title,
        "text": text or None,
        "description": " ".join(part for entry in _list(record.get("description")) if (part := _clean(entry))) or None,
        "brand": brand,
        "categories": ", ".join(categories) or None,
        "price": price(record.get("price")),
        "image_url": _picture(record, layout),
    }


def price(value: Any) -> float | None:
    """Return the price (the lower one of a range), or None.

    Examples
    --------
    >>> price("$1,299.50"), price("$5.00 - $9.00"), price(12.5), price("from script{")
    (1299.5, 5.0, 12.5, None)
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    text = str(value or "").strip()
    match = _PRICE.search(text) if len(text) < 30 else None  # longer texts are scripts
    return float(match.group().replace(",", "")) if match else None


def _picture(record: Mapping[str, Any], layout: Layout) -> str | None:
    """Return the URL of the main image in its largest size."""
    for name in layout.pictures:
        pictures = _list(record.get(name))
        mains = [entry for entry in pictures if isinstance(entry, Mapping) and entry.get("variant") == "MAIN"]
        for entry in [*mains, *pictures]:
            sizes = list(map(entry.get, ("hi_res", "large", "thumb"))) if isinstance(entry, Mapping) else [entry]
            if address := next((size for size in sizes if isinstance(size, str) and size), None):
                return address
    return None


def _clean(value: Any) -> str | None:
    """Return a text without HTML entities, tags and line breaks."""
    return " ".join(_TAG.sub(" ", html.unescape(str(value or ""))).split()) or None


def _list(value: Any) -> list[Any]:
    if value in (None, ""):
        return []
    return value if isinstance(value, list) else [value]
