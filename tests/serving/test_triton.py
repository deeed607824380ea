"""Recommendations served by a real Triton on free loopback ports."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, ServingError
from missrec_t4r.export.export import export
from missrec_t4r.export.parity import compare_served
from missrec_t4r.retrieval.ranker import Ranker, Ranking
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.serving.client.client import MISSRecClient, recommend
from missrec_t4r.serving.client.transports import translate_errors
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests.serving import shop
from tests.serving.conftest import serving

pytestmark = pytest.mark.triton


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: LocalTriton) -> MISSRecClient:
    url = server.grpc_url if request.param == "grpc" else server.http_url
    with MISSRecClient(url, request.param) as opened:
        yield opened


def offline(
    bundle: Path, sessions: list[list[str | int | None]], **options: object
) -> tuple[list[list[str | int]], Ranking]:
    loaded = load_bundle(bundle)
    rows = shop.padded(loaded.transform(*sessions))
    seen = shop.padded([loaded.transform.look_up(loaded.transform.to_wire(session)) for session in sessions])
    ranking = Ranker(loaded.model, loaded.catalogue).rank(rows, seen=seen, **options)
    return [loaded.catalogue.ids_of(row[:n]) for row, n in zip(ranking.rows, ranking.n_items)], ranking


def test_batches_of_ragged_sessions_equal_offline(client: MISSRecClient, bundle: Path, loaded: LoadedRun) -> None:
    sessions = shop.raw_sessions(loaded.catalogue, 220)
    ids, ranking = offline(bundle, sessions, top_k=7)
    answers = client.recommend(sessions, top_k=7)
    assert len(answers) == 220 > client.max_batch_size
    for index, answer in enumerate(answers):
        assert answer.item_ids == ids[index]
        np.testing.assert_allclose(answer.scores, ranking.scores[index], atol=1e-5)
        assert answer.unknown_items == ranking.n_unknown[index]
        assert answer.fallback == ranking.fallback[index]
    assert any(answer.fallback for answer in answers)
    assert any(answer.unknown_items for answer in answers)


def test_single_sessions_from_many_clients_are_batched_and_equal(server: LocalTriton, loaded: LoadedRun) -> None:
    histories = Sessions.from_lists([s[:-1] for s in Sessions.load(loaded.data / "test")])
    assert len(histories) >= 200
    before = statistics(server, "missrec_ranker")
    with MISSRecClient(server.grpc_url) as client:
        parity = compare_served(client, loaded.model, loaded.catalogue, histories)
    after = statistics(server, "missrec_ranker", before["inferences"] + len(histories))
    assert parity.equal, parity
    assert parity.sessions == len(histories)
    assert after["inferences"] - before["inferences"] == len(histories)
    assert after["executions"] - before["executions"] < len(histories)  # the dynamic batcher merged requests


def test_unknown_empty_and_missing_ids(client: MISSRecClient, bundle: Path) -> None:
    known = offline(bundle, [["ware-3-ü"]])[0][0]
    answers = client.recommend([["ware-3-ü"], ["ware-3-ü", "gone", None, ""], ["gone"], []])
    assert [answer.item_ids for answer in answers[:2]] == [known, known]
    assert [answer.unknown_items for answer in answers] == [0, 3, 1, 0]
    assert [answer.fallback for answer in answers] == [False, False, True, True]
    assert answers[2].item_ids == answers[3].item_ids
    assert answers[2].scores[0] == 1.0


def test_seen_items_are_left_out_even_beyond_the_models_window(client: MISSRecClient, bundle: Path) -> None:
    session = [f"ware-{i}-ü" for i in range(20)]  # the model sees the last eight
    answer = client.recommend([session], top_k=100, exclude_seen=True)[0]
    assert len(answer.item_ids) == 10
    assert not set(answer.item_ids) & set(session)
    assert answer.item_ids == offline(bundle, [session], top_k=100, exclude_seen=True)[0][0]
    assert len(client.recommend([session], top_k=100)[0].item_ids) == shop.N_ITEMS


def test_optional_inputs_may_be_left_out(server: LocalTriton, bundle: Path) -> None:
    client = triton_grpc.InferenceServerClient(server.grpc_url)
    arrays = {"item_ids": np.array([[b"ware-3-\xc3\xbc"]], object), "length": np.array([[1]], np.int32)}
    inputs = []
    for name, array in arrays.items():
        tensor = triton_grpc.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "INT32")
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer("missrec", inputs)
    served = [raw.decode() for raw in result.as_numpy("item_id")[0]]
    assert served == offline(bundle, [["ware-3-ü"]], top_k=10)[0][0]
    client.close()


def test_plain_json_over_http_works_without_any_library(server: LocalTriton, bundle: Path) -> None:
    body = {
        "inputs": [
            {"name": "item_ids", "datatype": "BYTES", "shape": [1, 2], "data": ["ware-3-ü", "gone"]},
            {"name": "length", "datatype": "INT32", "shape": [1, 1], "data": [2]},
            {"name": "top_k", "datatype": "INT32", "shape": [1, 1], "data": [3]},
        ]
    }
    connection = http.client.HTTPConnection(server.http_url, timeout=10)
    connection.request("POST", "/v2/models/missrec/infer", json.dumps(body))
    answer = json.loads(connection.getresponse().read())
    connection.close()
    outputs = {output["name"]: output["data"] for output in answer["outputs"]}
    assert outputs["item_id"] == offline(bundle, [["ware-3-ü"]], top_k=3)[0][0]
    assert outputs["n_unknown"] == [1]


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"length": np.array([[5]], np.int32)}, "0 to 1"),
        ({"top_k": np.array([[0]], np.int32)}, "top_k is 0"),
        ({"top_k": np.array([[3]], np.int64)}, "top_k"),
        ({"item_ids": np.array([[3]], np.int64)}, "item_ids"),
        ({"length": np.array([[1], [1]], np.int32)}, "batch size does not match"),
    ],
)
def test_a_malformed_request_is_refused_and_the_next_one_answered(
    server: LocalTriton, inputs: dict[str, np.ndarray], words: str
) -> None:
    with MISSRecClient(server.grpc_url) as client:
        good = {"item_ids": np.array([[b"ware-3-\xc3\xbc"]], object), "length": np.array([[1]], np.int32)}
        expected = client.recommend([["ware-3-ü"]])
        with pytest.raises(ServingError, match=words) as refused, translate_errors(client.url, "missrec", 10):
            client._transport.infer("missrec", good | inputs, ("item_id",))
        assert refused.value.__cause__.status() == "StatusCode.INVALID_ARGUMENT"  # type: ignore[union-attr]  # tritonclient's
        assert client.recommend([["ware-3-ü"]]) == expected


def test_ids_of_the_wrong_type_are_refused_with_the_session(client: MISSRecClient) -> None:
    with pytest.raises(DataError, match="session 1: item id 17 is of type int; expected: strings"):
        client.recommend([["ware-3-ü"], [17]])


def test_a_model_that_is_not_there_is_named(server: LocalTriton) -> None:
    for protocol, url in (("grpc", server.grpc_url), ("http", server.http_url)):
        words = "model 'nothing' is not ready"
        with MISSRecClient(url, protocol, model="nothing") as client, pytest.raises(ServingError, match=words):
            client.recommend([["a"]])


def test_no_sessions_no_answers(client: MISSRecClient) -> None:
    assert client.recommend([]) == []


def test_top_k_below_one_is_refused(client: MISSRecClient) -> None:
    with pytest.raises(ServingError, match="top_k is 0; expected: a whole number of at least 1"):
        client.recommend([["ware-3-ü"]], top_k=0)


def test_the_command_lines_answer_has_titles(server: LocalTriton, bundle: Path) -> None:
    answer = recommend(["ware-3-ü", "gone"], url=server.http_url, protocol="http", top_k=2, catalogue=bundle)
    assert answer["unknown_items"] == 1
    assert not answer["fallback"]
    assert len(answer["recommendations"]) == 2
    assert all(re.fullmatch(r"Ware \d+", item["title"]) for item in answer["recommendations"])
    assert json.loads(json.dumps(answer)) == answer


def test_the_command_line_tells_why_a_list_is_short(server: LocalTriton, caplog: pytest.LogCaptureFixture) -> None:
    recommend(["ware-3-ü", "gone"], url=server.grpc_url, top_k=3, allow=["ware-1-ü"])
    assert "1 of 2 ids unknown to the catalogue" in caplog.text
    words = "1 recommendations in place of --top-k 3: 1 items of the catalogue pass --exclude, --allow and the filters"
    assert words in caplog.text


def test_metrics_count_the_requests(server: LocalTriton) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.metrics_url) as page:
        assert 'nv_inference_request_success{model="missrec"' in page.read().decode()


def test_the_server_listens_on_the_loopback_alone_and_an_occupied_port_is_refused(
    server: LocalTriton, exported: Path
) -> None:
    with pytest.raises(ServingError, match=f"http port {server.ports['http']} cannot be used"):
        LocalTriton(exported / "repository", http_port=server.ports["http"]).__enter__()
    command = Path(f"/proc/{server.pid}/cmdline").read_text().split("\0")
    assert {f"--{endpoint}-address=127.0.0.1" for endpoint in ("http", "grpc", "metrics")} <= set(command)


def test_integer_ids_in_and_out_from_a_moved_repository(make_run: Callable[..., Path], tmp_path: Path) -> None:
    export(make_run(integers=True), tmp_path / "bundle", triton=tmp_path / "first" / "repository")
    (tmp_path / "first").rename(tmp_path / "second")
    catalogue = load_bundle(tmp_path / "bundle").catalogue
    sessions = shop.raw_sessions(catalogue, 40)
    ids, ranking = offline(tmp_path / "bundle", sessions, top_k=5)
    for server in serving(tmp_path / "second" / "repository"):
        for protocol, url in (("grpc", server.grpc_url), ("http", server.http_url)):
            with MISSRecClient(url, protocol) as client:
                assert client.id_type == "int64"
                answers = client.recommend(sessions, top_k=5)
                assert [answer.item_ids for answer in answers] == ids
                assert all(type(item) is int for answer in answers for item in answer.item_ids)
                np.testing.assert_allclose(
                    np.concatenate([answer.scores for answer in answers]), ranking.scores.reshape(-1), atol=1e-5
                )
                with pytest.raises(DataError, match="expected: integers"):
                    client.recommend([["12"]])
        assert recommend([str(ids[0][0])], url=server.grpc_url, top_k=1)["unknown_items"] == 0
        with pytest.raises(DataError, match="item id 'x'; expected: an integer"):
            recommend(["x"], url=server.grpc_url)


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_damaged_bundle_keeps_the_server_from_starting(exported: Path, tmp_path: Path, server: LocalTriton) -> None:
    copy = Path(shutil.copytree(exported / "repository", tmp_path / "repository"))
    file = copy / "missrec_ranker" / "1" / "bundle" / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    broken = LocalTriton(copy, log_file=tmp_path / "triton.log")
    with pytest.raises(ServingError, match=r"BundleError: \S+weights\.safetensors is damaged"):
        broken.__enter__()
    assert not accepts(broken.ports["http"])


def test_serve_stops_cleanly_on_sigterm(exported: Path, server: LocalTriton) -> None:
    code = """
import json, sys
from missrec_t4r.progress import reporting
from missrec_t4r.serving.triton.local_server import serve
with reporting():
    print(json.dumps(serve(sys.argv[1], http_port=0, grpc_port=0, metrics_port=0)))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(exported / "repository")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "300"},
    )
    assert process.stderr
    said = ""
    for line in process.stderr:
        said += line
        if "Ctrl-C stops" in line:
            break
    url = re.search(r"HTTP (127\.0\.0\.1:\d+)", said)
    assert url, said + process.stderr.read()
    port = int(url[1].rpartition(":")[2])
    assert accepts(port)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["ports"]["http"] == port
    deadline = time.monotonic() + 60
    while accepts(port) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not accepts(port)


def test_threads_may_share_a_grpc_client(server: LocalTriton, bundle: Path, loaded: LoadedRun) -> None:
    sessions = shop.raw_sessions(loaded.catalogue, 64, seed=9)
    ids = offline(bundle, sessions, top_k=4)[0]
    with MISSRecClient(server.grpc_url) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda session: client.recommend([session], top_k=4)[0], sessions))
    assert [answer.item_ids for answer in answers] == ids


def statistics(server: LocalTriton, model: str, inferences: int = 0) -> dict[str, int]:
    """Return Triton's counts once there are as many inferences and they stand still: it counts after it answers."""
    counts = [(-1, -1)]
    until = time.monotonic() + 60
    with triton_grpc.InferenceServerClient(server.grpc_url) as client:
        while counts[-1][0] < inferences or len(counts) < 3 or counts[-1] != counts[-2]:
            assert time.monotonic() < until, counts[-1]
            time.sleep(0.3)
            (stats,) = client.get_inference_statistics(model).model_stats
            counts.append((stats.inference_count, stats.execution_count))
    return dict(zip(("inferences", "executions"), counts[-1]))
