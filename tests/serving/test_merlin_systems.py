"""The classic Merlin ensemble on a real server returns the native ensemble's top-k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.errors import ConfigError
from missrec_t4r.export.export import export
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.transports import open_transport
from tests.serving import shop
from tests.serving.conftest import serving

pytestmark = pytest.mark.triton


def test_the_classic_ensemble_answers_as_the_native_one(make_run: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("merlin.systems", reason="merlin-systems is optional")
    import pandas as pd
    import pyarrow as pa

    from missrec_t4r.etl.nvt.workflows import build_request_workflow, fit
    from missrec_t4r.export.merlin_systems import EXECUTOR, export_merlin

    export(make_run(integers=True), tmp_path / "bundle")
    catalogue = load_bundle(tmp_path / "bundle").catalogue
    ids = catalogue.ids_of(np.arange(3, catalogue.n_rows))
    workflow = build_request_workflow(pa.array(ids), tmp_path / "vocabulary", max_sequence_length=shop.MAX_LENGTH)
    fit(workflow, pd.DataFrame({"item_id": [ids]}))
    export_merlin(tmp_path / "bundle", workflow, tmp_path / "classic", top_k=6)

    chance = np.random.default_rng(2)
    sessions = [chance.choice([*ids, 77777], chance.integers(1, 20)).tolist() for _ in range(30)]
    with MISSRecClient.of_bundle(tmp_path / "bundle") as native:
        expected = native.recommend(sessions, 6)
    tensors = {
        "item_id__values": np.concatenate([np.array(session, np.int64) for session in sessions]),
        "item_id__offsets": np.cumsum([0, *map(len, sessions)]).astype(np.int32),
    }
    for server in serving(tmp_path / "classic"):
        transport = open_transport(server.grpc_url, "grpc", 60)
        answer = transport.infer(EXECUTOR, tensors, ("item_id", "score"))
        transport.close()
    assert answer["item_id"].tolist() == [one.item_ids for one in expected]
    np.testing.assert_allclose(answer["score"], [one.scores for one in expected], atol=1e-5)


def test_string_ids_are_refused_in_words(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("merlin.systems", reason="merlin-systems is optional")
    from missrec_t4r.export.merlin_systems import export_merlin

    with pytest.raises(ConfigError, match="integer ids"):
        export_merlin(bundle, None, tmp_path / "classic")
