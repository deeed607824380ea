"""The ten lines of docs/howto/python.md on the tables of a folder, from its command line: what it saw, as JSON."""

import json
import sys
from pathlib import Path

import pandas as pd

import missrec_t4r as mr
from missrec_t4r.errors import MISSRecError

COLUMNS = {"user": "kunde", "item": "artikel", "time": "zeit"}


def main(raw: Path, out: Path) -> None:
    """Build two shops, one with texts and pictures and one of ids alone, and use a model of each."""
    events, items = pd.read_parquet(raw / "events.parquet"), pd.read_parquet(raw / "items.parquet")
    shop = mr.Shop.from_frames(
        events, items, **COLUMNS, text=["title"], image="picture", images=raw, folder=out / "shop"
    )
    model = mr.Recommender("tiny", train__epochs=1).fit(shop)
    seen = {"modalities": sorted(shop.catalogue.modalities), "metrics": model.evaluate(shop).to_frame().shape}
    seen["of_users"] = model.recommend(users=["u1", "u2"], k=5, where={"in_stock": True}).to_dict("list")
    seen["similar"] = model.similar("P01", 3)["item"].tolist()
    model.save(out / "bundle")
    loaded = mr.Recommender.load(out / "bundle", shop=shop)
    sessions = [["P01", "P07"]]
    seen["of_sessions"] = [one.recommend(sessions=sessions)["item"].tolist() for one in (model, loaded)]
    new = {"artikel": ["N1"], "title": ["lamp number 5"], "picture": [None], "in_stock": [True]}
    seen["added"] = loaded.add_items(pd.DataFrame(new))
    seen["all"] = loaded.recommend(sessions=sessions, k=100)["item"].tolist()
    try:
        with model.serve() as server:
            seen["served"] = server.grpc_url
    except MISSRecError as error:
        seen["served"] = str(error)
    ids = mr.Shop.from_frames(events, **COLUMNS, folder=out / "ids")
    seen["of_ids"] = mr.Recommender("tiny", train__epochs=1).fit(ids).recommend(users=["u1"], k=3)["item"].tolist()
    print(json.dumps(seen, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[-2]), Path(sys.argv[-1]))
