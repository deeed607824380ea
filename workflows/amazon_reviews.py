"""Amazon reviews of 2018 or 2023: reviews and metadata of a category in, a data folder with text vectors out.

    python workflows/amazon_reviews.py --edition 2023 --out work/beauty
           --reviews All_Beauty.jsonl.gz --metadata meta_All_Beauty.jsonl.gz

Writes OUT/raw (interactions.parquet, items.parquet: as the published benchmarks prepare them) and OUT/data, the data
folder for `missrec train`. Beside the items the sessions hold the stars of a review and the time since the user's
previous one, after log(1 + x) and standardised. A request carries stars and seconds as they are: serving applies the
same operators.
"""

import argparse
import json
from pathlib import Path

import missrec_t4r.etl  # noqa: F401  # before Merlin: it sets what Merlin needs

# isort: split
from merlin.schema import Tags
from nvtabular import Workflow, ops

from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.nvt.event_ops import TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby
from missrec_t4r.etl.nvt.workflow_file import EventColumns
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.amazon import import_amazon
from missrec_t4r.progress import run_as_command

LIST = [Tags.LIST, Tags.SEQUENCE]


def session_workflow(columns: EventColumns) -> Workflow:
    """Return the workflow from reviews to sessions."""
    reviews = ["user_id", "item_id", "timestamp", "rating"] >> TimeFeatures("user_id", "timestamp", ["gap"])
    items = reviews["item_id"] >> ops.Categorify(
        vocabs={"item_id": columns.vocabularies["item_id"]}, out_path=columns.storage
    )
    gap = reviews["gap"] >> ops.LogOp() >> ops.Normalize()

    sessions = (items + reviews["user_id", "timestamp", "rating"] + gap) >> SessionGroupby(
        groupby_cols=["user_id"],
        sort_cols=["timestamp"],
        aggs={"item_id": ["list"], "timestamp": ["list"], "rating": ["list"], "gap": ["list"]},
        name_sep="-",
        selected_keys=True,
    )
    user = sessions["user_id"] >> ops.AddMetadata(tags=[Tags.USER_ID, Tags.USER])
    item = sessions["item_id-list"] >> ops.AddMetadata(tags=[Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, *LIST])
    time = sessions["timestamp-list"] >> ops.AddMetadata(tags=[Tags.TIME, *LIST])
    numbers = sessions["rating-list", "gap-list"] >> ops.AddMetadata(tags=[Tags.CONTINUOUS, *LIST])
    return Workflow(user + item + time + numbers)


def main() -> None:
    """Import, build the sessions, encode the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edition", choices=["2018", "2023"], default="2023", help="layout of the files")
    parser.add_argument("--reviews", type=Path, required=True, help="JSON lines, plain or gzip")
    parser.add_argument("--metadata", type=Path, required=True, help="JSON lines, plain or gzip")
    parser.add_argument("--out", type=Path, required=True, help="folder to write raw/ and data/ in")
    parser.add_argument("--k-core", type=int, default=5, help="leave out users and items with fewer reviews")
    parser.add_argument("--text-encoder", default="classical", help="classical, or folder or name of a sentence model")
    options = parser.parse_args()

    raw, data = options.out / "raw", options.out / "data"
    import_amazon(options.edition, options.reviews, options.metadata, raw, k_core=options.k_core)
    tables = (raw / "interactions.parquet", raw / "items.parquet")
    result = etl(*tables, data, workflow=__file__)
    words = [] if options.text_encoder == "classical" else ["title", "brand"]
    texts = features(data, text_columns=["text"], word_columns=words, text_encoder=options.text_encoder)
    print(json.dumps({**result, "features": texts}, default=str))


if __name__ == "__main__":
    run_as_command(main)
