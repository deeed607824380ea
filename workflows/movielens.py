"""MovieLens: an archive of GroupLens in, a data folder with text vectors out.

    python workflows/movielens.py --archive ml-1m.zip --out work/ml-1m

Writes OUT/raw (interactions.parquet, items.parquet) and OUT/data, the data folder for `missrec train`. Beside the films
the sessions hold the stars as a category, and hour and weekday of the rating.
"""

import argparse
import json
from pathlib import Path

import missrec_t4r.etl  # noqa: F401  # before Merlin: it sets what Merlin needs

# isort: split
import pandas as pd
from merlin.schema import Tags
from nvtabular import Workflow, ops

from missrec_t4r.etl.event_settings import CLOCK
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.nvt.event_ops import TimeFeatures
from missrec_t4r.etl.nvt.session_ops import SessionGroupby
from missrec_t4r.etl.nvt.workflow_file import EventColumns
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.sources.movielens import import_movielens
from missrec_t4r.progress import run_as_command

LIST = [Tags.LIST, Tags.SEQUENCE]
STARS = pd.Series([half / 2 for half in range(1, 11)])  # half a star to five: codes 3 to 12


def session_workflow(columns: EventColumns) -> Workflow:
    """Return the workflow from ratings to sessions."""
    ratings = ["user_id", "item_id", "timestamp", "rating"] >> TimeFeatures("user_id", "timestamp", ["hour", "weekday"])
    vocabularies = {"item_id": columns.vocabularies["item_id"], "rating": STARS, **CLOCK}
    codes = ratings[list(vocabularies)] >> ops.Categorify(vocabs=vocabularies, out_path=columns.storage)

    sessions = (codes + ratings["user_id", "timestamp"]) >> SessionGroupby(
        groupby_cols=["user_id"],
        sort_cols=["timestamp"],
        aggs={name: ["list"] for name in ["timestamp", *vocabularies]},
        name_sep="-",
        selected_keys=True,
    )
    user = sessions["user_id"] >> ops.AddMetadata(tags=[Tags.USER_ID, Tags.USER])
    film = sessions["item_id-list"] >> ops.AddMetadata(tags=[Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, *LIST])
    time = sessions["timestamp-list"] >> ops.AddMetadata(tags=[Tags.TIME, *LIST])
    event = sessions["rating-list", "hour-list", "weekday-list"] >> ops.AddMetadata(tags=[Tags.CATEGORICAL, *LIST])
    return Workflow(user + film + time + event)


def main() -> None:
    """Import, build the sessions, encode the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, required=True, help="ml-100k.zip, ml-1m.zip, ml-25m.zip or its folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write raw/ and data/ in")
    parser.add_argument("--min-item-count", type=int, default=5, help="leave out films with fewer ratings")
    parser.add_argument("--text-encoder", default="classical", help="classical, or folder or name of a sentence model")
    options = parser.parse_args()

    raw, data = options.out / "raw", options.out / "data"
    import_movielens(options.archive, raw, min_item_count=options.min_item_count)
    tables = (raw / "interactions.parquet", raw / "items.parquet")
    result = etl(*tables, data, workflow=__file__)
    texts = features(data, text_columns=["text"], text_encoder=options.text_encoder)
    print(json.dumps({**result, "features": texts}, default=str))


if __name__ == "__main__":
    run_as_command(main)
