"""Statistics of a folder of real data that the generated shop is set from, beside those of a shop of the same size.

    python -m benchmarks.quality.shop_statistics --data path/to/amazon_scientific

The folder holds `interactions.parquet` and `items.parquet`; ``categories`` of an item is a path separated by commas,
whose second level is compared with the shop's interest, the third with its product, and ``brand`` with its style. The
result holds statistics alone, no part of the data. It is the origin of the parameters under "Measured" in
`missrec_t4r/etl/sources/synthetic/shop.py`; no model is involved.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import report, require_files, run_as_command
from missrec_t4r.etl.sources.synthetic.shop import make_tables


def statistics(events: pd.DataFrame) -> dict[str, Any]:
    """Return the statistics of events with the columns user, item, interest, product, taste, in the order of time.

    ``product`` names the interest as well; ``taste`` is missing where it is unknown.
    """
    lengths, counts = events.groupby("user").size(), events.item.value_counts().to_numpy()
    shifted = np.log(lengths - 4.0)
    repeats = events.duplicated(["user", "item"])
    return {
        "users": len(lengths),
        "items": len(counts),
        "events": len(events),
        "events_per_user": {
            "mean": lengths.mean(),
            "quantiles_0_25_50_75_90_99_100": lengths.quantile([0, 0.25, 0.5, 0.75, 0.9, 0.99, 1]).tolist(),
            "log_of_4_less": {"mean": shifted.mean(), "std": shifted.std()},
        },
        "popularity": {f"share_of_top_{share:g}": _top(counts, share) for share in (0.01, 0.1, 0.2, 0.5)},
        "popularity_exponent": 1 + np.log10(_top(counts, 0.1)),
        "repeats": {
            "events": repeats.mean(),
            "last_events": repeats[~events.duplicated("user", keep="last")].mean(),
            "of_the_item_before": _pairs(events, 1, "item").mean(),
        },
        "interest": _stays(events, "interest"),
        "product": _stays(events, "product"),
        "returns_among_other_interests": _returns(events),
        "taste_within_interest": _taste(events),
        "moves": _moves(events),
    }


def real_events(folder: Path) -> pd.DataFrame:
    """Read a folder of real data."""
    require_files(folder, ("interactions.parquet", "items.parquet"), "a folder of real data", "see --data")
    items = pd.read_parquet(folder / "items.parquet").set_index("item_id")
    events = pd.read_parquet(folder / "interactions.parquet").sort_values(["user_id", "timestamp"], kind="stable")
    of_item = items.loc[events.item_id]
    paths = of_item.categories.str.split(",")
    columns = {"user": events.user_id, "item": events.item_id, "taste": of_item.brand.replace("", None)}
    levels = {"interest": paths.str[:2].str.join("/"), "product": paths.str[:3].str.join("/")}
    return pd.DataFrame({name: values.to_numpy() for name, values in {**columns, **levels}.items()})


def shop_events(seed: int, users: int, items: int) -> pd.DataFrame:
    """Generate a shop; its interest, product and style are the latent ones."""
    table, _, latent = make_tables(seed, users, items)
    events = table.to_pandas().sort_values(["user_id", "timestamp"], kind="stable")
    item = events.item_id.str[1:].astype(int).to_numpy()
    columns = {
        "user": events.user_id.to_numpy(),
        "item": item,
        "interest": latent.interest[item],
        "product": latent.interest[item] * 10 + latent.product[item],
        "taste": latent.style[item],
    }
    return pd.DataFrame(columns)


def _top(counts: Any, share: float) -> float:
    return float(counts[: round(share * len(counts))].sum() / counts.sum())


def _pairs(events: pd.DataFrame, lag: int, column: str) -> Any:
    """Return, for events of one user that are ``lag`` apart, whether their values are equal."""
    same_user = (events.user == events.user.shift(lag)).to_numpy()
    return (events[column] == events[column].shift(lag)).to_numpy()[same_user]


def _chance(values: pd.Series) -> float:
    return float((values.value_counts(normalize=True) ** 2).sum())


def _stays(events: pd.DataFrame, column: str) -> dict[str, Any]:
    return {
        "values": events[column].nunique(),
        "same_as_1_2_3_6_events_before": [_pairs(events, lag, column).mean() for lag in (1, 2, 3, 6)],
        "by_chance": _chance(events[column]),
    }


def _returns(events: pd.DataFrame) -> float:
    """Return the share of events of another interest than the last event's whose interest the user had before."""
    before = events.groupby("user").interest.shift()
    changed = before.notna() & (before != events.interest)
    return float(events.duplicated(["user", "interest"])[changed].mean())


def _taste(events: pd.DataFrame) -> dict[str, float]:
    """Return how often an event that stays in the interest, with another item, has the same brand or style."""
    known = events[events.taste.notna()]
    before = known.shift()
    moved = (known.user == before.user) & (known.interest == before.interest) & (known.item != before.item)
    stays = (known.taste == before.taste)[moved].mean()
    by_chance = known.groupby("interest").taste.agg(_chance)[known.interest[moved]].mean()
    return {"same": stays, "by_chance": by_chance, "above_chance": (stays - by_chance) / (1 - by_chance)}


def _moves(events: pd.DataFrame) -> dict[str, float]:
    """Return how many moves from item to item other users make too, and whether moves have a direction.

    ``asymmetry`` is the sum of ``|n(a, b) - n(b, a)|`` over pairs of products, as a share of all moves between them;
    beside it, what tossing a coin for the direction of every move gives.
    """
    same_user = (events.user == events.user.shift()).to_numpy()[1:]
    item, product = (events[name].astype("category").cat.codes.to_numpy(np.int64) for name in ("item", "product"))
    codes = (item[:-1] * (item.max() + 1) + item[1:])[same_user]
    counts = pd.Series(codes).map(pd.Series(codes).value_counts())
    first, second = product[:-1][same_user], product[1:][same_user]
    moved = pd.DataFrame({"low": np.minimum(first, second), "high": np.maximum(first, second), "up": first < second})
    both = moved[first != second].groupby(["low", "high"]).up.agg(["sum", "size"])
    tossed = np.random.default_rng(0).binomial(both["size"].to_numpy(), 0.5)
    return {
        "made_by_others_too": (counts > 1).mean(),
        "asymmetry": (2 * both["sum"] - both["size"]).abs().sum() / both["size"].sum(),
        "asymmetry_by_chance": float(np.abs(2 * tossed - both["size"].to_numpy()).sum() / both["size"].sum()),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return int(value) if isinstance(value, int) else round(float(value), 4)


def main() -> None:
    """Parse the options, compute both, write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with interactions.parquet and items.parquet")
    parser.add_argument("--shop-seed", type=int, default=7)
    options = parser.parse_args()
    real = statistics(real_events(options.data))
    shop = statistics(shop_events(options.shop_seed, real["users"], real["items"]))
    default = statistics(shop_events(options.shop_seed, 3000, 1200))
    report(
        "shop-statistics",
        {
            "real": {"data": options.data.resolve().name, **_rounded(real)},
            "shop_of_the_same_size": _rounded(shop),
            "shop_of_the_default_size": _rounded(default),
        },
    )


if __name__ == "__main__":
    run_as_command(main)
