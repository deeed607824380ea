"""Generated shop, version 2: a catalogue with texts and pictures, and sessions with the statistics of a real data set.

An item belongs to one of 24 interests, is one of the four products of that interest (tent, sleeping bag, camp stove,
lantern), has one of six styles and belongs to a set of items of its interest that go together; popularity is
long-tailed. Title and description are made of the interest's words and the product's name, the image of the style's
colours and pattern: texts do not mention the style and images do not show the interest. Some items lack the text,
others the image. Part of the items are launched late and are promoted while they are new: some of the last events are
about items without training events, which only content can find. Times are unix seconds over about a year.

A user has a taste for one style. The next event repeats an item of the user, or is an item of the last item's set, or
stays in its interest (mostly at the same product), or returns to an earlier interest, or begins a new one. Which item
of the interest it is depends on popularity and taste. No order of products is built in, because the real data show
none.

Event columns tell of the user and of the item of their event, never of the next event: `event_columns` receives the
users' traits (taste, browser or buyer, reading pace) and the chosen items, and draws from a stream of its own. Users
buy and read more where the style is theirs; the category is the item's department, also where its text is missing.

Parameters under "Measured" were set once from the statistics of Amazon Industrial & Scientific
(``python -m benchmarks.quality.shop_statistics``; docs/benchmarks.md, "The generated shop"), before any model saw this
version; those under "Ours" have no counterpart there. Frozen: the tables of the default sizes have a known hash
(`fingerprint`, tests/workflows/test_generator.py), because a shop that is changed until a model does well measures
nothing. Whoever changes the shop makes a new version, with new results.

All streams derive from one seed by `numpy.random.SeedSequence`, and everything is drawn from uniform numbers
(`Generator.random`), whose values do not depend on the version of numpy or the platform. Images also need the same
Pillow version.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r.arrays import Bools, Doubles, Ints
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.etl.sources.synthetic.shop_images import draw
from missrec_t4r.etl.sources.synthetic.shop_text import BRANDS, EVENT_TYPES, FILLERS, INTERESTS, STYLES
from missrec_t4r.io.atomic import atomic_write_dir, refuse_unmanaged
from missrec_t4r.io.json_files import write_json
from missrec_t4r.progress import track
from missrec_t4r.schema import ITEM_ID, TIMESTAMP, USER_ID

log = logging.getLogger(__name__)

VERSION = 2
SHOP_FILE = "shop.json"
PRODUCTS = 4
"""Products per interest."""
END = 1_735_689_600
"""1 January 2025, the latest time of an event."""
DAY = 86_400

# Measured on Amazon Scientific (benchmarks/quality/shop_statistics.py)

SHORTEST, LONGEST = 5, 80
"""Events of a user."""
LENGTH_MU, LENGTH_SIGMA = 0.72, 0.88
"""Mean and standard deviation of log(events of a user - 4)."""
POPULARITY_SKEW = 0.65
"""Exponent of the items' popularity by rank."""
INTEREST_SKEW, PRODUCT_SKEW = 0.8, 2.3
"""Exponents of the shares of the interests, and of the products within an interest, by rank; items follow them."""
REPEAT, REPEAT_LAST = 0.006, 0.3
"""Probability that an event repeats an item of the user, and that this is the last one."""
RELATED, LAST = 0.48, 0.12
"""Probability that an event is related to an earlier one of the user, and that this is the last one, not any."""
COMPANION, SAME_PRODUCT = 0.45, 0.35
"""Probability that related means an item of the same set, or of the same product; else any of the interest."""
SET_SIZE = 4
LIKES = 0.7
"""Probability that the user's taste decides about the style."""

# Ours: the source has reviews in an order without dates

LATE_SHARE, LATE_DAYS = 0.4, 120
"""Share of the items that are launched late, and the number of days before the end in which this happens."""
PROMOTION, PROMOTED_DAYS = 5.0, 30
"""Factor on the popularity of an item in the first days after its launch."""
WITHOUT_TEXT, WITHOUT_IMAGE = 0.06, 0.15
KIND_GIVEN_USER = (((0.85, 0.10, 0.05), (0.65, 0.20, 0.15)), ((0.55, 0.20, 0.25), (0.35, 0.25, 0.40)))
"""Probability of view, cart and purchase, by browser or buyer and by another style or the user's own."""
DWELL, DWELL_OWN_STYLE = 30.0, 2.0
"""Median seconds on an item's page, and the factor on items of the user's style."""
PACE_SIGMA, DWELL_SIGMA = 0.5, 0.4
"""Standard deviation of the log of the dwell times between users and between events of a user."""

STREAMS = ("catalogue", "texts", "images", "users", "moves", "columns")
"""Independent random streams, in the order in which they are derived from the seed."""


@dataclass(frozen=True)
class Items:
    """Latent variables of the catalogue, one entry per item."""

    interest: Ints
    product: Ints
    style: Ints
    set: Ints
    """Number of the set of items that go together."""
    popularity: Doubles
    launch: Doubles
    """Unix seconds."""


@dataclass(frozen=True)
class Users:
    """Traits of the users, one entry per user, and the times of their events."""

    taste: Ints
    """The preferred style."""
    buyer: Ints
    """0 browser, 1 buyer."""
    pace: Doubles
    """Factor on dwell times."""
    times: list[Ints]
    """Unix seconds of the user's events, ascending."""


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
        Number of users, with about seven events each.
    items : int
        Number of items, at least 100.

    Returns
    -------
    dict
        Version, counts and hash of what was written.

    Raises
    ------
    ConfigError
        Too few users or items.
    DataError
        The folder holds other files.
    """
    require_at_least(0, seed=seed)
    require_at_least(1, users=users)
    require_at_least(100, items=items)
    out = Path(out)
    refuse_unmanaged(out, SHOP_FILE, "generated shop")
    log.info(f"generating {users:,} users over {items:,} items")
    interactions, table, latent = make_tables(seed, users, items)
    shop = {
        "version": VERSION,
        "seed": seed,
        "users": users,
        "items": items,
        "events": len(interactions),
        "without_text": table["title"].null_count,
        "without_image": table["image"].null_count,
        "late_items": int((latent.launch > 0).sum()),
        "tables_sha256": fingerprint(interactions, table),
    }
    with atomic_write_dir(out, SHOP_FILE, "generated shop") as folder:
        pq.write_table(interactions, folder / "interactions.parquet")
        pq.write_table(table, folder / "items.parquet")
        _draw_all(latent, table, folder, streams(seed)["images"])
        write_json(folder / SHOP_FILE, shop)
    return {"data": str(out), **shop}


def streams(seed: int) -> dict[str, np.random.Generator]:
    """Return one generator per stream, all derived from the seed."""
    return {
        name: np.random.Generator(np.random.PCG64(child))
        for name, child in zip(STREAMS, np.random.SeedSequence(seed).spawn(len(STREAMS)), strict=True)
    }


def make_tables(seed: int, users: int, items: int) -> tuple[pa.Table, pa.Table, Items]:
    """Return interactions, items and the latent variables of the items."""
    rng = streams(seed)
    latent = make_items(items, rng["catalogue"])
    events = make_events(latent, make_users(users, rng["users"]), rng["moves"], rng["columns"])
    return _event_table(events, latent), _item_table(latent, rng["texts"]), latent


def fingerprint(*tables: pa.Table) -> str:
    """Return the SHA-256 of the tables' column names and values as text.

    Examples
    --------
    >>> fingerprint(pa.table({"price": [9.5, None]}))[:8]
    '8bf56cb1'
    """
    digest = hashlib.sha256()
    for table in tables:
        for name in table.column_names:
            digest.update("\n".join([name, *map(repr, table[name].to_pylist()), "\n"]).encode())
    return digest.hexdigest()


def make_items(n_items: int, rng: np.random.Generator) -> Items:
    """Draw the latent catalogue.

    Every (interest, product) pair has an item; the others follow the shares of the interests and products. Sets are
    made of random items of one interest.
    """
    interest_share = _shares(len(INTERESTS), INTEREST_SKEW)[_permutation(len(INTERESTS), rng)]
    product_share = np.stack([_shares(PRODUCTS, PRODUCT_SKEW)[_permutation(PRODUCTS, rng)] for _ in INTERESTS])
    pair_share = (interest_share[:, None] * product_share).ravel()  # [interest * product]
    n_pairs = len(pair_share)
    drawn = [pick(pair_share, chance) for chance in rng.random(max(0, n_items - n_pairs))]
    pairs = np.concatenate([np.arange(n_pairs), np.array(drawn, np.int64)])[_permutation(n_items, rng)]
    interest = pairs // PRODUCTS
    style = np.floor(rng.random(n_items) * len(STYLES)).astype(np.int64)
    popularity = (_permutation(n_items, rng) + 1.0) ** -POPULARITY_SKEW
    place = np.argsort(interest + rng.random(n_items))  # items of an interest in random order
    within = np.arange(n_items) - np.searchsorted(interest[place], interest[place])
    sets = np.empty(n_items, np.int64)
    sets[place] = interest[place] * n_items + within // SET_SIZE
    late = rng.random(n_items) < LATE_SHARE
    launch = np.where(late, END - LATE_DAYS * DAY * rng.random(n_items) ** 2 - DAY, 0.0)
    return Items(interest, pairs % PRODUCTS, style, sets, popularity, launch)


def make_users(n_users: int, rng: np.random.Generator) -> Users:
    """Draw the users: lengths of their sessions, times and traits."""
    taste = np.floor(rng.random(n_users) * len(STYLES)).astype(np.int64)
    buyer = (rng.random(n_users) < 0.5).astype(np.int64)
    pace = _log_normal(1.0, PACE_SIGMA, rng.random(n_users))
    shortest = SHORTEST - 1
    lengths = shortest + np.rint(_log_normal(math.exp(LENGTH_MU), LENGTH_SIGMA, rng.random(n_users)))
    times = [_event_times(int(length), rng) for length in np.clip(lengths, SHORTEST, LONGEST)]
    return Users(taste, buyer, pace, times)


def make_events(items: Items, users: Users, move_rng: np.random.Generator, column_rng: np.random.Generator) -> Events:
    """Simulate all users; events are sorted by time.

    Parameters
    ----------
    items : Items
    users : Users
    move_rng : numpy Generator
        Stream that chooses the items.
    column_rng : numpy Generator
        Stream of the event columns.
    """
    groups = _Groups(_members(items.set), _members(items.interest))
    n_users = len(users.times)
    chosen = [
        _session(items, groups, users.times[user], int(users.taste[user]), move_rng)
        for user in track(range(n_users), "users")
    ]
    user = np.repeat(np.arange(n_users), [len(session) for session in chosen])
    item, time = np.concatenate(chosen), np.concatenate(users.times)
    kind, dwell = event_columns(users, user, items.style[item], column_rng)
    order = np.lexsort([user, time])
    return Events(user[order], item[order], time[order], kind[order], dwell[order])


def event_columns(users: Users, user: Ints, style: Ints, rng: np.random.Generator) -> tuple[Ints, Doubles]:
    """Draw event types and dwell times from what the user is like and from the item of the event alone.

    Parameters
    ----------
    users : Users
    user, style : int array [event]
        User of each event, and style of its item.
    rng : numpy Generator
        A stream that nothing else draws from.
    """
    own = (style == users.taste[user]).astype(np.int64)
    bounds = np.cumsum(np.array(KIND_GIVEN_USER), axis=-1)[users.buyer[user], own]  # [event, kind]
    kind = (rng.random(len(user))[:, None] > bounds[:, :-1]).sum(1)
    dwell = users.pace[user] * DWELL_OWN_STYLE**own * _log_normal(DWELL, DWELL_SIGMA, rng.random(len(user)))
    return kind.astype(np.int64), np.round(dwell, 1)


def pick(weights: Doubles, chance: float) -> int:
    """Return the index that a uniform number in [0, 1) falls on.

    Examples
    --------
    >>> pick(np.array([1.0, 0.0, 3.0]), 0.2), pick(np.array([1.0, 0.0, 3.0]), 0.25)
    (0, 2)
    """
    total = np.cumsum(weights)
    return min(int(np.searchsorted(total, chance * total[-1], side="right")), len(weights) - 1)


@dataclass(frozen=True)
class _Groups:
    """Items by set and by interest."""

    sets: dict[int, Ints]
    interests: dict[int, Ints]


def _members(group: Ints) -> dict[int, Ints]:
    order = np.argsort(group, kind="stable")
    keys, starts = np.unique(group[order], return_index=True)
    return dict(zip(keys.tolist(), np.split(order, starts[1:]), strict=True))


def _session(items: Items, groups: _Groups, times: Ints, taste: int, rng: np.random.Generator) -> Ints:
    """Draw the items of a user."""
    chosen: list[int] = []
    fresh = np.ones(len(items.interest), bool)  # what the user has not had
    for time in times:
        item = None
        if not chosen or rng.random() >= REPEAT:
            style = taste if rng.random() < LIKES else None
            item = _fresh_item(items, _pools(items, groups, chosen, rng), fresh, time, style, rng)
        if item is None:  # a repetition, or nothing that is launched is left
            item = chosen[-1] if rng.random() < REPEAT_LAST else _any_of(chosen, rng)
        chosen.append(item)
        fresh[item] = False
    return np.array(chosen, np.int64)


def _any_of(chosen: Sequence[int], rng: np.random.Generator) -> int:
    return chosen[int(rng.random() * len(chosen))]


def _pools(items: Items, groups: _Groups, chosen: Sequence[int], rng: np.random.Generator) -> list[Ints]:
    """Return the items among which the next one is, without the whole catalogue, which is the last resort.

    Where none of a pool can be chosen, the following one counts.
    """
    if not chosen or rng.random() >= RELATED:
        return []
    model = chosen[-1] if rng.random() < LAST else _any_of(chosen, rng)
    interest, relation = groups.interests[int(items.interest[model])], rng.random()
    if relation < COMPANION:
        return [groups.sets[int(items.set[model])], interest]
    if relation < COMPANION + SAME_PRODUCT:
        return [interest[items.product[interest] == items.product[model]], interest]
    return [interest]


def _fresh_item(
    items: Items, pools: Sequence[Ints], fresh: Bools, time: float, style: int | None, rng: np.random.Generator
) -> int | None:
    """Draw an item that is launched and that the user has not had; None if there is none."""
    for pool in (*pools, np.arange(len(fresh))):
        launch = items.launch[pool]
        new = (launch > time - PROMOTED_DAYS * DAY) & (launch > 0)
        weights = items.popularity[pool] * np.where(new, PROMOTION, 1.0) * (fresh[pool] & (launch <= time))
        own = weights if style is None else weights * (items.style[pool] == style)
        weights = own if own.any() else weights
        if weights.any():
            return int(pool[pick(weights, rng.random())])
    return None


def _event_times(length: int, rng: np.random.Generator) -> Ints:
    last = END - min(-25 * DAY * math.log1p(-rng.random()), 200 * DAY)
    gaps = _log_normal(4 * DAY, 1.0, rng.random(length - 1))
    return np.sort(last - np.concatenate([[0.0], np.cumsum(gaps)])).astype(np.int64)


def _shares(count: int, skew: float) -> Doubles:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -skew
    return weights / weights.sum()


def _permutation(count: int, rng: np.random.Generator) -> Ints:
    return np.argsort(rng.random(count), kind="stable")


def _log_normal(median: float, sigma: float, chances: Doubles) -> Doubles:
    normal = NormalDist()
    return median * np.exp(sigma * np.array([normal.inv_cdf(max(chance, 1e-12)) for chance in chances]))


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
    usual = 20.0 * (PRODUCTS + 1 - items.product)
    prices = np.round(_log_normal(1.0, 0.4, rng.random(n_items)) * usual, 2)
    titles, descriptions, departments, brands = [], [], [], []
    for interest_index, product in zip(items.interest, items.product, strict=True):
        interest = INTERESTS[interest_index]
        brands.append(BRANDS[(interest_index + int(rng.random() * 4)) % len(BRANDS)])
        titles.append(_title(interest.words, interest.products[product], brands[-1], rng))
        descriptions.append(_description(interest.words, interest.products[product], rng))
        departments.append(interest.department)
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


def _sample(words: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [words[place] for place in _permutation(len(words), rng)[:count]]


def _title(words: Sequence[str], product: str, brand: str, rng: np.random.Generator) -> str:
    first, second = _sample(words, 2, rng)
    return f"{brand} {first.capitalize()} {second.capitalize()} {product.title()}"


def _description(words: Sequence[str], product: str, rng: np.random.Generator) -> str:
    chosen = _sample([*_sample(words, 4, rng), *_sample(FILLERS, 6, rng)], 10, rng)
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
