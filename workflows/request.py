"""The request workflow: raw item ids of a session -> rows of the catalogue, the last ones only.

    python workflows/request.py --data work/data --items P00017,P00042

`missrec etl` fits this workflow beside that of the sessions, and the served model applies what is compiled from it
(`session_transform.json`), so that a request is encoded as the training data were. This script shows both on one
session; `missrec export` requires that they agree.
"""

import argparse
import json
import tempfile
from pathlib import Path

import missrec_t4r.etl  # noqa: F401  # before Merlin: it sets what Merlin needs

# isort: split
import pandas as pd
from merlin.io import Dataset
from merlin.schema import Tags
from nvtabular import Workflow, ops

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.etl.nvt.request_transform import compile_session_transform
from missrec_t4r.etl.nvt.session_ops import SessionSlice
from missrec_t4r.progress import run_as_command
from missrec_t4r.serving.client.protocol import typed_id


def request_workflow(item_ids: pd.Series, storage: str, max_sequence_length: int = 50) -> Workflow:
    """Return the workflow of a request, not yet fitted: the list column ``item_id`` of raw ids -> rows.

    Every id is looked up before the session is cut, so unknown ids (row 2) take part in the cut.
    """
    rows = ["item_id"] >> ops.Categorify(vocabs={"item_id": item_ids}, out_path=storage)
    last = rows >> SessionSlice(-max_sequence_length)
    return Workflow(last >> ops.AddMetadata(tags=[Tags.ITEM_ID, Tags.ITEM, Tags.CATEGORICAL, Tags.LIST, Tags.SEQUENCE]))


def main() -> None:
    """Encode one session with the workflow of a data folder's catalogue, and print what is compiled from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="data folder of missrec etl")
    parser.add_argument("--items", required=True, help="raw item ids of a session, oldest first, separated by commas")
    parser.add_argument("--max-sequence-length", type=int, default=50, help="last items of a session to keep")
    options = parser.parse_args()

    catalogue = Catalogue.load(options.data / "catalogue")
    item_ids = catalogue.items["item_id"].to_pandas()
    session = [typed_id(item, catalogue.id_type) for item in options.items.split(",")]
    requests = pd.DataFrame({"item_id": [session]})
    with tempfile.TemporaryDirectory() as storage:
        workflow = request_workflow(item_ids, storage, options.max_sequence_length).fit(Dataset(requests))
        rows = workflow.transform(Dataset(requests)).to_ddf().compute()["item_id"]
        print(json.dumps({"rows": [int(row) for row in rows[0]], "transform": compile_session_transform(workflow)}))


if __name__ == "__main__":
    run_as_command(main)
