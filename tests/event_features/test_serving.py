"""Event features from a run through the bundle to a real Triton: served as trained, with them and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.data.event_features import EventColumn, load_sessions
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, MISSRecError, ServingError
from missrec_t4r.export.export import export
from missrec_t4r.export.parity import compare_served, raw_event_features, raw_ids, sample_histories
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.retrieval import fused_encoder
from missrec_t4r.retrieval.fused_encoder import fuse_encoder
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun, load_run, save_run
from missrec_t4r.serving.batch.export_vectors import vectors
from missrec_t4r.serving.batch.score import score
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.event_features import EventFeatureReader
from missrec_t4r.serving.triton.backend import RankerBackend, SessionsBackend, execute
from tests.device.second_device import second_device
from tests.event_features import shop
from tests.event_features.triton_names import TRITON
from tests.serving.conftest import serving
from tests.settings import EVERY_PART

EVENT_TYPES = ["view", "cart", "buy"]
COLUMNS = (
    EventColumn("event_type", "categorical", 6, 8, values=tuple(EVENT_TYPES)),
    EventColumn("dwell", "continuous", 1, 8, log=True, mean=2.0, std=1.5),
    EventColumn("scene", "pretrained", shop.WIDTH, 8, std=2.0),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """A run whose weights are large enough for every part to matter."""
    folder = tmp_path_factory.mktemp("side")
    data = shop.write(folder / "data", sizes=(4, 4, 60))
    transform = {
        "format": 1,
        "item_id": {"column": "item_id", "type": "string", "null_row": 1, "unknown_row": 2, "first_row": 3},
        "max_sequence_length": 5,
        "features": {"event_type": {"kind": "categorical", "values": EVENT_TYPES}},
    }
    (data / "session_transform.json").write_text(json.dumps(transform))
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_head": 2, "d_feedforward": 8, "max_sequence_length": 5, "n_neighbours": 0}
    recipe = Recipe(name="tiny", model=MISSRecConfig(**(EVERY_PART | sizes)))  # type: ignore[arg-type]  # sizes are numbers
    model = build_missrec(recipe.model, shop.catalogue(), COLUMNS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.discover_interests(seed=1)
    save_run(folder / "run", model, recipe, data, {})
    return load_run(folder / "run")


@pytest.fixture(scope="module")
def histories(run: LoadedRun) -> Sessions:
    return sample_histories(load_sessions(run.data, "test", run.model.event_features.columns), 60)


@pytest.fixture(scope="module")
def exported(run: LoadedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    report = export(run.data.parent / "run", folder / "bundle", triton=folder / "repository")
    assert report["parity"]["equal"]
    return folder


@pytest.fixture(scope="module")
def client(exported: Path) -> Iterator[MISSRecClient]:
    for server in serving(exported / "repository"):
        with MISSRecClient(server.grpc_url) as opened:
            yield opened


@pytest.mark.parametrize("positions", [1000, 11])
def test_the_fused_encoder_adds_event_features_as_the_model_does(
    run: LoadedRun, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass, and in several that each take sessions of similar length."""
    encoder = fuse_encoder(run.model, run.model.item_encoder.catalogue())
    assert encoder is not None
    monkeypatch.setattr(fused_encoder, "_POSITIONS_AT_ONCE", positions)
    rng = np.random.default_rng(0)
    rows, lengths = rng.integers(3, run.catalogue.n_rows, (7, 5)), np.array([5, 1, 0, 3, 5, 2, 4])
    rows[np.arange(5) >= lengths[:, None]] = 0
    given = {
        "event_type": rng.integers(0, 6, rows.shape),
        "dwell": np.where(rng.random(rows.shape) < 0.3, np.nan, rng.exponential(9.0, rows.shape)),
        "scene": rng.normal(size=(*rows.shape, shop.WIDTH)).astype(np.float32),
    }
    seen = []
    for names in ((), ("dwell",), tuple(given)):
        values = {name: given[name] for name in names}
        expected = run.model(torch.from_numpy(rows), {name: torch.from_numpy(one) for name, one in values.items()})
        expected = expected.detach() * torch.from_numpy(lengths > 0).unsqueeze(1)
        seen.append(encoder(rows, values))
        torch.testing.assert_close(seen[-1], expected, atol=2e-6, rtol=0)
    assert not torch.allclose(seen[0], seen[-1], atol=0.01)


def test_the_bundle_carries_columns_and_weights(run: LoadedRun, exported: Path) -> None:
    loaded = load_bundle(exported / "bundle")
    assert loaded.model.event_features.columns == COLUMNS
    own, theirs = run.model.state_dict(), loaded.model.state_dict()
    assert [name for name in own if not torch.equal(own[name], theirs[name])] == []


@pytest.mark.triton
def test_a_real_triton_ranks_with_event_features(client: MISSRecClient, run: LoadedRun, histories: Sessions) -> None:
    parity = compare_served(client, run.model, run.catalogue, histories)
    assert parity.equal, parity
    sessions, event_features = raw_ids(run.catalogue, histories), raw_event_features(run.model, histories)
    assert set(event_features[0]) == {"event_type", "dwell", "scene"}
    mixed = [own if index % 2 else None for index, own in enumerate(event_features)]
    answers = client.recommend(sessions, 5, side=mixed)
    with_side, without = client.recommend(sessions, 5, side=event_features), client.recommend(sessions, 5)
    for index, answer in enumerate(answers):
        expected = (with_side if index % 2 else without)[index]
        np.testing.assert_allclose(answer.scores, expected.scores, atol=1e-5)
    changed = [one.scores != other.scores for one, other in zip(with_side, without, strict=True) if one.scores]
    assert sum(changed) > 50


@pytest.mark.triton
def test_requests_without_event_features_are_the_models_own_answers(
    client: MISSRecClient, run: LoadedRun, histories: Sessions
) -> None:
    items_alone = Sessions(histories.values, histories.offsets)
    assert compare_served(client, run.model, run.catalogue, items_alone).equal


@pytest.mark.triton
def test_a_wrong_request_is_refused_in_words(client: MISSRecClient) -> None:
    for event_features, words in (
        ({"colour": ["red", "red"]}, "event feature 'colour'; expected: event_type, dwell, scene"),
        ({"dwell": [1.0]}, "'dwell' with 1 values for 2 item ids"),
        ({"dwell": [1.0, "long"]}, "one continuous value per event"),
        ({"scene": [[1.0, 2.0], None]}, "vectors have 4 numbers"),
    ):
        with pytest.raises(ServingError, match=words):
            client.recommend([["i1", "i2"]], side=[event_features])
    with pytest.raises(DataError, match="event features of 2 sessions for 1"):
        client.recommend([["i1"]], side=[None, None])
    assert client.recommend([["i1", "i2"]], 3, side=[{"dwell": [None, 4.0], "event_type": ["gift", None]}])[0].item_ids


def test_reader_and_ranker_align_with_the_last_rows(exported: Path) -> None:
    loaded = load_bundle(exported / "bundle")
    reader, ranker = EventFeatureReader(loaded.model.event_features.columns), Ranker(loaded.model, loaded.catalogue)
    features = reader.read(b'{"dwell": [9, 8, 7, 6, 5, 4, 3]}', 7)
    rows = np.array([[5, 2, 7, 8, 9]])  # the last five of seven ids, one of them unknown
    stacked = reader.stacked([features], rows)
    assert stacked["dwell"].tolist() == [[7, 6, 5, 4, 3]]
    direct = ranker.rank(np.array([[5, 7, 8, 9]]), event_features={"dwell": np.array([[7, 5, 4, 3]], np.float32)})
    assert ranker.rank(rows, event_features=stacked).scores.tolist() == direct.scores.tolist()
    model = load_bundle(exported / "bundle").model
    with second_device() as waits:
        on_gpu = Ranker(model, loaded.catalogue, device="cuda:0")
        before = len(waits)
        found = on_gpu.rank(rows, event_features=stacked)
    assert len(waits) == before + 1
    assert found.rows.tolist() == direct.rows.tolist()
    np.testing.assert_allclose(found.scores, direct.scores, atol=1e-5)


def _one(**changed: object) -> dict[str, np.ndarray]:
    """A request of two items for the ranker."""
    rows = np.array([[5, 9]])
    return {"rows": rows, "seen": rows, "top_k": np.array([[4]], np.int32)} | changed  # type: ignore[operator]


def _text(content: bytes) -> np.ndarray:
    return np.array([[content]], object)


HOSTILE = {
    "30,000 brackets": _one(side=_text(b"[" * 30_000)),
    "30,000 brackets in a column": _one(side=_text(b'{"dwell": ' + b"[" * 30_000)),
    "900 lists in each other": _one(side=_text(b'{"dwell": [' + b"[" * 900 + b"]" * 900 + b", 1]}")),
    "400 digits": _one(side=_text(b'{"dwell": [1' + b"0" * 400 + b", 1]}")),
    "400 digits in a vector": _one(side=_text(b'{"scene": [[1' + b"0" * 400 + b", 1, 1, 1], null]}")),
    "5,000 digits": _one(side=_text(b'{"dwell": [1' + b"0" * 5000 + b", 1]}")),
    "an object for a number": _one(side=_text(b'{"dwell": [{}, 1]}')),
    "a list for a category": _one(side=_text(b'{"event_type": [["buy"], "buy"]}')),
    "ragged vectors": _one(side=_text(b'{"scene": [[1, 2], [1, 2, 3, 4]]}')),
    "side of numbers": _one(side=np.array([[3]])),
    "side of another batch": _one(side=np.array([[b""], [b""]], object)),
    "rules of 400 digits": _one(rules=_text(b'{"where": {"train_count": {"max": 1' + b"0" * 400 + b"}}}")),
    "rules of 30,000 brackets": _one(rules=_text(b"[" * 30_000)),
    "rules of infinity": _one(rules=_text(b'{"where": {"train_count": Infinity}}')),
    "rules of numbers": _one(rules=np.array([[3]])),
    "no rows": {"seen": np.array([[5]])},
    "rows of numbers and nothing else": _one(rows=np.array([5, 9])),
    "ragged rows": _one(rows=np.array([[[5], [9, 3]]], object)),
    "rows of floats": _one(rows=np.array([[5.0, np.nan]])),
    "rows beyond the catalogue": _one(rows=np.array([[2**62]])),
    "seen of another batch": _one(seen=np.array([[5], [9]])),
    "seen of texts": _one(seen=np.array([[b"i1"]], object)),
    "top_k of NaN": _one(top_k=np.array([[np.nan]])),
    "top_k of another batch": _one(top_k=np.array([[1], [2]])),
    "exclude_seen of texts": _one(exclude_seen=np.array([[b"yes"]], object)),
    "excludes of numbers": _one(exclude=np.array([[3.5]])),
    "excludes of lists": _one(exclude=np.array([[[], {}]], object)[:, :1]),
    "allow of another batch": _one(allow=np.array([[b"i1"], [b"i2"]], object)),
    "no session": _one(
        rows=np.zeros((0, 2), np.int64), seen=np.zeros((0, 2), np.int64), top_k=np.zeros((0, 1), np.int32)
    ),
}


def test_no_hostile_request_fails_its_neighbours(exported: Path) -> None:
    ranker = RankerBackend(exported / "bundle")
    good = [
        _one(side=_text(b'{"dwell": [3, null], "event_type": ["buy", "view"]}')),
        _one(rules=_text(b'{"where": {"train_count": {"min": 1}}}'), reasons=np.array([[True]])),
        _one(exclude=np.array([[b"i7", b""]], object), top_k=np.array([[9]])),
        _one(),
    ]
    alone = [ranker.infer([request])[0] for request in good]
    requests = [part for index, bad in enumerate(HOSTILE.values()) for part in (bad, good[index % len(good)])]
    for batch in (requests, requests[::-1]):
        answers = ranker.infer(batch)
        for request, answer in zip(batch, answers, strict=True):
            at = next((index for index, one in enumerate(good) if one is request), None)
            if at is None:
                kind = next(name for name, one in HOSTILE.items() if one is request)
                assert isinstance(answer, MISSRecError), kind
                assert str(answer).endswith("."), kind
                continue
            expected = alone[at]
            assert not isinstance(answer, MISSRecError)
            assert not isinstance(expected, MISSRecError)
            assert answer["item_id"].tolist() == expected["item_id"].tolist()
            assert answer["reason_item"].tolist() == expected["reason_item"].tolist()
            np.testing.assert_allclose(answer["score"], expected["score"], atol=1e-5)


def test_numbers_that_are_none_count_as_absent_and_harm_nobody(exported: Path) -> None:
    ranker = RankerBackend(exported / "bundle")
    absent = [b'{"dwell": [null, 4]}', b'{"dwell": [NaN, 4]}', b'{"dwell": [Infinity, 4]}', b'{"dwell": [1e999, 4]}']
    answers = ranker.infer([_one(side=_text(text)) for text in absent])
    for answer in answers:
        assert not isinstance(answer, MISSRecError)
        assert answer["item_id"].tolist() == answers[0]["item_id"].tolist()  # type: ignore[index]  an answer


def test_what_only_shows_when_ranking_is_one_requests_error(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker = RankerBackend(exported / "bundle")
    rank = ranker.ranker.rank

    def fails(rows: np.ndarray, **options: object) -> object:
        if (rows == 7).any():
            raise RuntimeError("out of memory")
        return rank(rows, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ranker.ranker, "rank", fails)
    first, second, third = ranker.infer([_one(), _one(rows=np.array([[7]])), _one()])
    assert "RuntimeError: out of memory" in str(second)
    assert first["item_id"].tolist() == third["item_id"].tolist()  # type: ignore[index]  answers, not errors


class _Tensor:
    """A tensor as Triton's, possibly with damaged bytes."""

    def __init__(self, array: np.ndarray | None) -> None:
        self.array = array

    def as_numpy(self) -> np.ndarray:
        if self.array is None:
            raise RuntimeError("damaged tensor")
        return self.array


def test_a_damaged_tensor_is_one_requests_error(exported: Path) -> None:
    def tensor_of(request: dict[str, np.ndarray | None], name: str) -> _Tensor | None:
        return _Tensor(request[name]) if name in request else None

    triton = SimpleNamespace(**{**vars(TRITON), "get_input_tensor_by_name": tensor_of})
    requests = [_one(), _one() | {"rows": None}, _one(side=_text(b'{"\\ud800": [1]}')), _one()]
    seen: list[int] = []
    ranker = RankerBackend(exported / "bundle")
    first, damaged, odd, last = execute(
        ranker, requests, triton, lambda requests, responses: seen.extend(map(len, (requests, responses)))
    )
    assert first[0]["item_id"].tolist() == last[0]["item_id"].tolist()
    assert "RuntimeError: damaged tensor" in damaged[1]
    assert "event feature" in odd[1]
    assert seen == [4, 4]


def test_no_hostile_session_fails_its_neighbours(exported: Path) -> None:
    sessions = SessionsBackend(exported / "bundle")
    ids = np.array([[b"i2", b"i6"]], object)
    good = {"item_ids": ids, "length": np.array([[2]])}
    bad = [
        {"item_ids": ids},
        {"length": np.array([[2]])},
        good | {"item_ids": ids[0]},
        good | {"item_ids": np.array([[1.5, np.nan]])},
        good | {"item_ids": np.array([[[], {}]], object)[..., None][:, :, 0]},
        good | {"length": np.array([[np.nan]])},
        good | {"length": np.array([[2], [2]])},
        good | {"length": np.array([[b"2"]], object)},
        good | {"length": np.array([[2**62]])},
    ]
    answers = sessions.infer([request for one in bad for request in (one, good)])
    assert all(isinstance(answer, MISSRecError) for answer in answers[::2])
    assert all(answer["rows"].tolist() == [[5, 9]] for answer in answers[1::2])  # type: ignore[index]  answers


def test_what_is_decoded_is_encoded_again() -> None:
    values = {
        "event_type": np.array([3, 5, 0, 2]),
        "dwell": np.array([1.5, np.nan, 0.1, 7.0], np.float32),
        "scene": np.array([[1, 0, 0.1, 2], [0, 0, 0, 0], [3, 4, 5, 6], [1, 1, 1, 1]], np.float32),
    }
    for column in COLUMNS:
        through_json = json.loads(json.dumps(column.decode(values[column.name])))
        np.testing.assert_array_equal(column.encode(through_json), values[column.name])
    codes = EventColumn("adopted", "categorical", 9)
    assert codes.encode(codes.decode(np.array([4, 0, 8]))).tolist() == [4, 0, 8]


def test_a_file_of_sessions_may_carry_them(exported: Path, run: LoadedRun, histories: Sessions, tmp_path: Path) -> None:
    sessions, event_features = raw_ids(run.catalogue, histories), raw_event_features(run.model, histories)
    columns = {f"{name}-list": [own[name] for own in event_features] for name in ("dwell", "scene")}
    columns["event_type"] = [own["event_type"] if line else None for line, own in enumerate(event_features)]
    pq.write_table(
        pa.table({"items": sessions, "user": range(len(event_features)), **columns}), tmp_path / "sessions.parquet"
    )
    score(tmp_path / "sessions.parquet", tmp_path / "scored.parquet", bundle=exported / "bundle", top_k=4)
    scored = pq.read_table(tmp_path / "scored.parquet")
    event_features[0] = {name: values for name, values in event_features[0].items() if name != "event_type"}
    with MISSRecClient.of_bundle(exported / "bundle") as local:
        answers = local.recommend(sessions, 4, side=event_features)
    for got, answer in zip(scored["score"].to_pylist(), answers, strict=True):
        np.testing.assert_allclose(got, answer.scores, atol=1e-6)

    vectors(tmp_path / "vectors", bundle=exported / "bundle", sessions=tmp_path / "sessions.parquet")
    given = histories.padded_features(range(len(histories)), 5)
    given["event_type"][0] = 0
    rows = torch.from_numpy(histories.padded(range(len(histories)), 5))
    with torch.no_grad():
        own = run.model(rows, {name: torch.from_numpy(values) for name, values in given.items()}).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "vectors" / "sessions.npy"), own, atol=1e-6)
