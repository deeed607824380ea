"""The classic Merlin ensemble on a real server returns the native ensemble's top-k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.errors import BundleError
from missrec_t4r.export.export import export
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.transports import TritonTransport
from tests.serving import shop
from tests.serving.conftest import serving

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "strings"])
def test_the_classic_ensemble_answers_as_the_native_one(
    make_run: Callable[..., Path], tmp_path: Path, integers: bool
) -> None:
    """Raw ids in, raw ids out; the strings are not ASCII alone, and some ids are unknown."""
    pytest.importorskip("merlin.systems", reason="merlin-systems is optional")
    import pandas as pd
    import pyarrow as pa

    from missrec_t4r.etl.nvt.workflows import build_request_workflow, fit
    from missrec_t4r.export.merlin_systems import EXECUTOR, export_merlin

    export(make_run(integers=integers), tmp_path / "bundle")
    catalogue = load_bundle(tmp_path / "bundle").catalogue
    ids = catalogue.ids_of(np.arange(3, catalogue.n_rows))
    workflow = build_request_workflow(pa.array(ids), tmp_path / "vocabulary", max_sequence_length=shop.MAX_LENGTH)
    fit(workflow, pd.DataFrame({"item_id": [ids]}))
    export_merlin(tmp_path / "bundle", workflow, tmp_path / "classic", top_k=6)

    chance = np.random.default_rng(2)
    known = [*ids, 77777 if integers else "unbekannt-ß"]
    sessions = [[known[i] for i in chance.integers(0, len(known), chance.integers(1, 20))] for _ in range(30)]
    with MISSRecClient.of_bundle(tmp_path / "bundle") as native:
        expected = native.recommend(sessions, 6)
    raw = [item if integers else str(item).encode() for session in sessions for item in session]
    tensors = {
        "item_id__values": np.array(raw, np.int64 if integers else object),
        "item_id__offsets": np.cumsum([0, *map(len, sessions)]).astype(np.int32),
    }
    for server in serving(tmp_path / "classic"):
        transport = TritonTransport(server.grpc_url, "grpc", 60)
        answer = transport.infer(EXECUTOR, tensors, ("item_id", "score"))
        transport.close()
    found = [[item if integers else item.decode() for item in row] for row in answer["item_id"].tolist()]
    assert found == [one.item_ids for one in expected]
    np.testing.assert_allclose(answer["score"], [one.scores for one in expected], atol=1e-5)


def test_more_recommendations_than_items_are_refused(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("merlin.systems", reason="merlin-systems is optional")
    from missrec_t4r.export.merlin_systems import export_merlin

    for top_k in (0, 31):
        with pytest.raises(BundleError, match=f"top_k {top_k} of a catalogue of 30 items"):
            export_merlin(exported / "bundle", None, tmp_path / "classic", top_k=top_k)
    assert not (tmp_path / "classic").exists()
