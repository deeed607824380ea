"""A nightly job: add the new events and items to a data folder, encode the new items, check the data.

    python workflows/nightly.py --data work/data --interactions events/2026-11-21.parquet --items items.parquet
           --report work/report --gate gate.yaml

The first run is given all events and builds the folder (`--engine disk`, which keeps what an update needs). Later runs
add what is new: item rows never move, so the previous model still fits the folder. A file that was added before is
skipped, so the job may run twice. The exit code is 3 where the gate refuses the data: train and deploy nothing then.
docs/howto/nightly.md continues with training and deployment.
"""

import argparse
import json
from pathlib import Path

from missrec_t4r.etl.engine.append import update
from missrec_t4r.etl.features.pipeline import features
from missrec_t4r.etl.pipeline import etl
from missrec_t4r.etl.quality.report import report
from missrec_t4r.progress import run_as_command


def main() -> None:
    """Update, encode, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder: written by the first run, then updated")
    parser.add_argument("--interactions", nargs="+", required=True, help="new events: parquet, csv or JSON lines")
    parser.add_argument("--items", type=Path, required=True, help="item table; items that are known are left out")
    parser.add_argument("--text-columns", default="title,description", help="columns of the item table to encode")
    parser.add_argument("--report", type=Path, required=True, help="folder of the data report")
    parser.add_argument("--gate", type=Path, help="YAML of bounds on the report")
    parser.add_argument(
        "--delta", action="store_true", help="write the sessions of affected users to a delta file (faster)"
    )
    options = parser.parse_args()

    data, columns = options.data, options.text_columns.split(",")
    if (data / "etl.json").is_file():
        result = update(options.interactions, data, items=options.items, delta=options.delta)
        like = data  # the encoder and its fitted state stay, so old and new vectors share one space
    else:
        result = etl(options.interactions, options.items, data, engine="disk")
        like = None
    texts = features(data, text_columns=columns, like=like)
    checked = report(data, options.report, gate=options.gate)
    print(json.dumps({**result, "features": texts, "report": checked}, default=str))


if __name__ == "__main__":
    run_as_command(main)
