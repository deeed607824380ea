"""Synthetic shop in which content matters: interests show in texts, styles in images, order in the sessions.

An item belongs to one of 24 interests, is one of the four products of that interest (tent, sleeping bag,
camp stove, lantern) and has one of six styles; popularity is long-tailed. Title and description are made of the
interest's words and the product's name, the image of the style's colours and pattern. Texts do not mention the style
and images do not show the interest, so both modalities are needed. Some items lack the text, others the image.

A user prefers one style and moves within an interest from product to product (a tent, then a sleeping bag), then to a
related interest: the next item depends on the last one, so order matters and popularity alone predicts little. Part of
the items are launched late, most of them near the end, and are promoted while they are new: the last events are about
items without training events, which only content can find. Times are unix seconds over about a year.

Event features: users who buy move on to the next product, users who only view compare; short dwell times precede a
change of interest, and dwell times are longer on the preferred style; the category is the item's department, also where
its text is missing. These columns have their own random generator and do not change the items of the sessions.

The same seed gives the same tables and, with the same Pillow version, the same images. Frozen: models are not tuned on
it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.arrays import Doubles, Ints
from missrec_t4r.errors import ConfigError
from missrec_t4r.etl.sources.synthetic.shop_images import draw
from missrec_t4r.etl.sources.synthetic.shop_text import BRANDS, EVENT_TYPES, FILLERS, INTERESTS, STYLES
from missrec_t4r.io.atomic import refuse_unmanaged, replace_dir, translate_disk_errors
from missrec_t4r.io.json_files import write_json
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

SHOP_FILE = "shop.json"
PRODUCTS = 4
"""Products per interest."""
END = 1_735_689_600
"""1 January 2025, the latest time of an event."""
DAY = 86_400

LATE_SHARE, LATE_DAYS = 0.4, 120
"""Share of the items that are launched late, and the number of days before the end in which this happens."""
PROMOTION = 5.0
"""Factor on the popularity of an item in the first thirty days after its launch."""
WITHOUT_TEXT, WITHOUT_IMAGE = 0.06, 0.15
COMPARE, FOLLOW, DRIFT = 0.18, 0.48, 0.24
"""Probability of the same product again, of the next one, of a related interest; else any product of the interest."""
LIKES = 0.85
"""Probability that the user's preferred style decides about the item."""
STRAY = 0.08
"""Probability of an event that depends on popularity only."""
STAY, GO_ON, LEAVE, WANDER = range(4)
"""Moves after an event: the same product again, the next one, a related interest, any product."""
KIND_GIVEN_MOVE = ((0.85, 0.12, 0.03), (0.25, 0.20, 0.55), (0.70, 0.10, 0.20), (0.60, 0.20, 0.20))
"""Probability of view, cart and purchase, by the following move."""
DWELL_GIVEN_MOVE = (90.0, 60.0, 12.0, 30.0)
"""Median seconds on an item's page, by the following move; twice as long on the preferred style."""


@dataclass(frozen=True)
class Items:
    """Latent variables of the catalogue, one entry per item."""

    interest: Ints
    product: Ints
    style: Ints
    popularity: Doubles
    launch: Doubles
    """Unix seconds."""


@dataclass(frozen=True)
class Events:
    """All interactions, sorted by time."""

    user: Ints
    item: Ints
    time: Ints
    kind: Ints
    dwell: Doubles
    """Seconds on the item's page."""


def generate_shop(out: str | Path, *, seed: int = 7, users: int = 3000, items: int = 1200) -> dict[str, Any]:
    """Generate a synthetic shop: interactions.parquet, items.parquet with texts, and images/*.png.

    Parameters
    ----------
    out : path
        Folder to write: new, empty, or an older generated shop, which is replaced as a whole.
    seed : int
        Random seed; the same seed gives the same shop.
    users : int
        Number of users, with about ten events each.
    items : int
        Number of items, at least 100.

    Returns
    -------
    dict
        Counts of what was written.

    Raises
    ------
    ConfigError
        Too few users or items.
    DataError
        The folder holds other files.
    """
    if users < 1 or items < 100:
        raise ConfigError(f"{users} users and {items} items", "at least 1 user and 100 items", "raise the numbers")
    out = Path(out)
    refuse_unmanaged(out, SHOP_FILE, "generated shop")
    rng = np.random.default_rng(seed)
    latent = make_items(items, rng)
    log.info(f"generating {users:,} users over {items:,} items")
    events = make_events(latent, users, rng, np.random.default_rng([seed, 1]))
    table = _item_table(latent, rng)
    shop = {
        "seed": seed,
        "users": users,
        "items": items,
        "events": len(events.item),
        "without_text": table["title"].null_count,
        "without_image": table["image"].null_count,
        "late_items": int((latent.launch > 0).sum()),
    }
    with translate_disk_errors(out), replace_dir(out) as folder:
        pq.write_table(_event_table(events, latent), folder / "interactions.parquet")
        pq.write_table(table, folder / "items.parquet")
        _draw_all(latent, table, folder, rng)
        write_json(folder / SHOP_FILE, shop)
    return {"data": str(out), **shop}


def make_items(n_items: int, rng: np.random.Generator) -> Items:
    """Draw the latent catalogue; every (interest, product) pair exists, styles are drawn freely."""
    pairs = np.arange(n_items) % (len(INTERESTS) * PRODUCTS)
    rng.shuffle(pairs)
    ranks = rng.permutation(n_items) + 1.0
    late = rng.random(n_items) < LATE_SHARE
    launch = np.where(late, END - LATE_DAYS * DAY * rng.random(n_items) ** 2 - DAY, 0.0)
    return Items(pairs // PRODUCTS, pairs % PRODUCTS, rng.integers(0, len(STYLES), n_items), ranks**-0.45, launch)


def related_interests(rng: np.random.Generator) -> Doubles:
    """Return where a user drifts to from each interest: three related ones, [interest, interest]."""
    n = len(INTERESTS)
    drift = np.zeros((n, n))
    for interest in range(n):
        others = rng.permutation(np.delete(np.arange(n), interest))[:3]
        drift[interest, others] = (0.65, 0.25, 0.10)
    return drift


def make_events(items: Items, users: int, rng: np.random.Generator, feature_rng: np.random.Generator) -> Events:
    """Simulate all users; events are sorted by time.

    Parameters
    ----------
    items : Items
    users : int
    rng : numpy Generator
        Generator of users, times and items.
    feature_rng : numpy Generator
        Generator of the event features.
    """
    drift = related_interests(rng)
    start = rng.dirichlet(np.full(len(INTERESTS), 3.0))
    walks = [_user_events(items, drift, start, rng, feature_rng) for _ in track(range(users), "users")]
    user = np.repeat(np.arange(users), [len(chosen) for chosen, *_ in walks])
    item, time, kind, dwell = (np.concatenate(parts) for parts in zip(*walks, strict=True))
    order = np.lexsort([user, time])
    return Events(user[order], item[order], time[order], kind[order], dwell[order])


def next_state(interest: int, product: int, drift: Doubles, rng: np.random.Generator) -> tuple[int, int]:
    """Draw the next interest and product of a user."""
    chance = rng.random()
    if chance < COMPARE:
        return interest, product
    if chance < COMPARE + FOLLOW and product + 1 < PRODUCTS:
        return interest, product + 1
    if chance < COMPARE + FOLLOW + DRIFT:
        return int(rng.choice(len(drift), p=drift[interest])), 0
    return interest, int(rng.integers(PRODUCTS))


def move_between(before: tuple[int, int], after: tuple[int, int]) -> int:
    """Return the kind of move from one (interest, product) to the next.

    Examples
    --------
    >>> move_between((4, 1), (4, 2)) == GO_ON, move_between((4, 1), (7, 0)) == LEAVE
    (True, True)
    """
    if before == after:
        return STAY
    if before[0] != after[0]:
        return LEAVE
    return GO_ON if after[1] == before[1] + 1 else WANDER


def _user_events(
    items: Items, drift: Doubles, start: Doubles, rng: np.random.Generator, feature_rng: np.random.Generator
) -> tuple[Ints, Ints, Ints, Doubles]:
    length = int(np.clip(rng.lognormal(math.log(8.5), 0.5), 4, 50))
    times = _event_times(length, rng)
    preferred = int(rng.integers(len(STYLES)))
    interest, product = int(rng.choice(len(start), p=start)), int(rng.integers(PRODUCTS))
    chosen: list[int] = []
    moves: list[int] = []
    fresh = np.ones(len(items.interest), bool)  # a user interacts with an item once
    for time in times:  # weights, fresh, new: [item]
        new = (items.launch > 0) & (time - items.launch < 30 * DAY)
        weights = items.popularity * fresh * (items.launch <= time) * np.where(new, PROMOTION, 1.0)
        if rng.random() >= STRAY:
            weights = weights * ((items.interest == interest) & (items.product == product))
            if rng.random() < LIKES:
                weights = weights * np.where(items.style == preferred, 1.0, 0.02)
        if weights.sum() == 0:  # no item of this interest and product is left: any launched item
            weights = items.popularity * fresh * (items.launch <= time)
        item = int(rng.choice(len(weights), p=weights / weights.sum()))
        chosen.append(item)
        fresh[item] = False
        before = interest, product
        interest, product = next_state(interest, product, drift, rng)
        moves.append(move_between(before, (interest, product)))
    bounds = np.cumsum(np.array(KIND_GIVEN_MOVE)[moves], axis=1)  # [event, kind]: inverse of the distribution
    kinds = (rng.random(length)[:, None] > bounds[:, :-1]).sum(1)
    own = items.style[chosen] == preferred  # [event]
    dwell = np.array(DWELL_GIVEN_MOVE)[moves] * np.where(own, 2.0, 1.0) * feature_rng.lognormal(0.0, 0.4, length)
    return np.array(chosen), times, kinds.astype(np.int64), np.round(dwell, 1)


def _event_times(length: int, rng: np.random.Generator) -> Ints:
    last = END - min(rng.exponential(25 * DAY), 200 * DAY)
    gaps = rng.lognormal(math.log(4 * DAY), 1.0, length - 1)
    return np.sort(last - np.concatenate([[0.0], np.cumsum(gaps)])).astype(np.int64)


def _event_table(events: Events, items: Items) -> pa.Table:
    departments = np.array([interest.department for interest in INTERESTS])
    return pa.table(
        {
            USER_ID: [f"U{user:05d}" for user in events.user],
            ITEM_ID: [_item_id(item) for item in events.item],
            TIMESTAMP: events.time,
            "event_type": np.array(EVENT_TYPES)[events.kind],
            "dwell_seconds": events.dwell,
            "category": departments[items.interest[events.item]],
        }
    )


def _item_table(items: Items, rng: np.random.Generator) -> pa.Table:
    n_items = len(items.interest)
    lacks = rng.random(n_items)
    no_text, no_image = lacks < WITHOUT_TEXT, lacks > 1 - WITHOUT_IMAGE
    titles, descriptions, departments, brands, prices = [], [], [], [], []
    for interest_index, product in zip(items.interest, items.product, strict=True):
        interest = INTERESTS[interest_index]
        brands.append(BRANDS[(interest_index + int(rng.integers(4))) % len(BRANDS)])
        titles.append(_title(interest.words, interest.products[product], brands[-1], rng))
        descriptions.append(_description(interest.words, interest.products[product], rng))
        departments.append(interest.department)
        prices.append(round(float(rng.lognormal(math.log(20 * (PRODUCTS + 1 - product)), 0.4)), 2))
    ids = [_item_id(item) for item in range(n_items)]
    return pa.table(
        {
            ITEM_ID: ids,
            "title": pa.array(titles, mask=no_text),
            "description": pa.array(descriptions, mask=no_text),
            "category": departments,
            "brand": brands,
            "price": prices,
            "image": pa.array([f"images/{name}.png" for name in ids], mask=no_image),
        }
    )


def _title(words: tuple[str, ...], product: str, brand: str, rng: np.random.Generator) -> str:
    first, second = rng.choice(words, 2, replace=False)
    return f"{brand} {first.capitalize()} {second.capitalize()} {product.title()}"


def _description(words: tuple[str, ...], product: str, rng: np.random.Generator) -> str:
    chosen = [*rng.choice(words, 4, replace=False), *rng.choice(FILLERS, 6, replace=False)]
    rng.shuffle(chosen)
    return f"{product.capitalize()}: {' '.join(chosen[:5])}. {' '.join(chosen[5:]).capitalize()}."


def _draw_all(items: Items, table: pa.Table, folder: Path, rng: np.random.Generator) -> None:
    (folder / "images").mkdir()
    paths = table["image"].to_pylist()
    for item in track(range(len(paths)), "images"):
        image_rng = np.random.default_rng(rng.integers(2**63))
        if paths[item] is not None:
            draw(STYLES[items.style[item]], image_rng).save(folder / paths[item])


def _item_id(item: int) -> str:
    return f"P{item:05d}"
