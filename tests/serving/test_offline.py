"""Batch scoring, similar items and vectors equal the results of a server."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r import commands
from missrec_t4r.bundle import bundle as bundles
from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.export.export import export
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.schema import FIRST_ITEM_ROW
from missrec_t4r.serving.batch import parts as in_parts
from missrec_t4r.serving.batch.export_vectors import vectors
from missrec_t4r.serving.batch.parquet_io import SessionFiles
from missrec_t4r.serving.batch.score import score
from missrec_t4r.serving.batch.similar import SimilarItems, similar
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests import processes
from tests.meanwhile import beginning_inside
from tests.serving import shop


def session_file(file: Path, sessions: list[list[str | int | None]], kind: pa.DataType | None = None) -> Path:
    users = pa.array([f"user-{i}" for i in range(len(sessions))], pa.string())
    lists = pa.array(sessions, pa.list_(kind or pa.string()))
    pq.write_table(pa.table({"user_id": users, "items": lists, "city": users}), file, row_group_size=50)
    return file


@pytest.mark.triton
@pytest.mark.parametrize("source", ["bundle", "run"])
def test_scored_files_hold_the_servers_answers(
    server: LocalTriton, bundle: Path, run: Path, loaded: LoadedRun, tmp_path: Path, source: str
) -> None:
    sessions = shop.raw_sessions(loaded.catalogue, 1100 if source == "bundle" else 60, seed=8)
    file = session_file(tmp_path / "sessions.parquet", sessions)
    given = {"bundle": bundle} if source == "bundle" else {"run": run}
    result = commands.score(file, tmp_path / "out.parquet", **given, top_k=5, exclude_seen=True)
    with MISSRecClient(server.grpc_url) as client:
        expected = client.recommend(sessions, 5, exclude_seen=True)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["user_id", "city", "item_id", "score", "unknown_items", "fallback"]
    assert table["user_id"].to_pylist() == [f"user-{i}" for i in range(len(sessions))]
    assert table["item_id"].to_pylist() == [answer.item_ids for answer in expected]
    assert table["fallback"].to_pylist() == [answer.fallback for answer in expected]
    assert table["unknown_items"].to_pylist() == [answer.unknown_items for answer in expected]
    for scores, answer in zip(table["score"].to_pylist(), expected, strict=True):
        np.testing.assert_allclose(scores, answer.scores, atol=1e-5)
    assert result["sessions"] == result["rows"] == len(sessions)
    assert result["fallbacks"] == sum(answer.fallback for answer in expected) > 0


def test_the_long_layout_has_a_row_per_item(bundle: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    sessions = shop.raw_sessions(loaded.catalogue, 70, seed=3)
    file = session_file(tmp_path / "sessions.parquet", sessions)
    score(file, tmp_path / "lists.parquet", bundle=bundle, top_k=40, exclude_seen=True)
    score(file, tmp_path / "long.parquet", bundle=bundle, top_k=40, exclude_seen=True, layout="long")
    lists, long = (pq.read_table(tmp_path / f"{name}.parquet").to_pylist() for name in ("lists", "long"))
    flat = [
        (row["user_id"], rank, item, value)
        for row in lists
        for rank, (item, value) in enumerate(zip(row["item_id"], row["score"], strict=True), start=1)
    ]
    assert [(row["user_id"], row["rank"], row["item_id"], row["score"]) for row in long] == flat
    assert {row["rank"] for row in long} >= {1, 20}


def test_rules_and_exclusions_of_each_session_come_from_columns(
    bundle: Path, loaded: LoadedRun, tmp_path: Path
) -> None:
    sessions = shop.raw_sessions(loaded.catalogue, 30, seed=5)
    ids = loaded.catalogue.items["item_id"].to_pylist()
    texts = ['{"where": {"item_id": ' + json.dumps(ids[:5]) + "}}", "", None] * 10
    banned = [ids[:1], [], None] * 10
    file = session_file(tmp_path / "sessions.parquet", sessions)
    table = pq.read_table(file).append_column("rules", pa.array(texts, pa.string()))
    pq.write_table(table.append_column("not", pa.array(banned, pa.list_(pa.string()))), file)
    everywhere = {"where": {"train_count": {"min": 1}}}
    options = {"top_k": 9, "rules": everywhere, "exclude": [ids[1]]}
    score(file, tmp_path / "out.parquet", bundle=bundle, rules_column="rules", exclude_column="not", **options)
    own = {"where": {"train_count": {"min": 1}, "item_id": ids[:5]}}
    with MISSRecClient.of_bundle(bundle) as client:
        expected = client.recommend(
            sessions,
            9,
            rules=[own if text else everywhere for text in texts],
            exclude=[[ids[1], *(one or [])] for one in banned],
        )
    answers = pq.read_table(tmp_path / "out.parquet")["item_id"].to_pylist()
    assert answers == [answer.item_ids for answer in expected]
    assert all(set(answer) <= set(ids[2:5]) for answer in answers[::3])
    pq.write_table(pq.read_table(file).set_column(3, "rules", pa.array([*texts[:29], "[1]"])), file)
    with pytest.raises(DataError, match=r"'rules' of session 29 is '\[1\]'; expected: a JSON object"):
        score(file, tmp_path / "bad.parquet", bundle=bundle, rules_column="rules")
    with pytest.raises(DataError, match="no column 'rule'; expected: text"):
        score(file, tmp_path / "bad.parquet", bundle=bundle, rules_column="rule")
    assert not (tmp_path / "bad.parquet").exists()


def test_integer_catalogues_and_empty_files(make_run: Callable[..., Path], tmp_path: Path) -> None:
    export(make_run(integers=True), tmp_path / "bundle")
    known = load_bundle(tmp_path / "bundle").catalogue.ids_of(np.array([3, 4]))
    file = session_file(tmp_path / "some.parquet", [known, [], None], pa.int32())
    score(file, tmp_path / "out.parquet", bundle=tmp_path / "bundle", top_k=2)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["fallback"].to_pylist() == [False, True, True]
    assert table.schema.field("item_id").type.value_type == pa.int64()
    none = session_file(tmp_path / "none.parquet", [], pa.int32())
    assert score(none, tmp_path / "empty.parquet", bundle=tmp_path / "bundle")["rows"] == 0
    assert pq.read_table(tmp_path / "empty.parquet").schema == table.schema
    assert vectors(tmp_path / "vectors", bundle=tmp_path / "bundle", sessions=none)["sessions"] == 0
    assert np.load(tmp_path / "vectors" / "sessions.npy").shape[0] == 0
    strings = session_file(tmp_path / "strings.parquet", [["a"]])
    with pytest.raises(DataError, match="holds string; expected: int64"):
        score(strings, tmp_path / "never.parquet", bundle=tmp_path / "bundle")
    assert not (tmp_path / "never.parquet").exists()


def test_what_cannot_be_read_is_refused_in_words(bundle: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"items": ["a,b"]}), tmp_path / "flat.parquet")
    with pytest.raises(DataError, match="has no list column; expected: a list column 'items'"):
        score(tmp_path / "flat.parquet", tmp_path / "out.parquet", bundle=bundle)
    with pytest.raises(DataError, match="nothing does not exist; expected: a parquet file"):
        score(tmp_path / "nothing", tmp_path / "out.parquet", bundle=bundle)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no parquet"):
        score(tmp_path / "empty", tmp_path / "out.parquet", bundle=bundle)
    (tmp_path / "users.csv").write_text("user,item\nann,lamp\n")
    with pytest.raises(DataError, match=r"users\.csv cannot be read as parquet .* group the events by user"):
        score(tmp_path / "users.csv", tmp_path / "out.parquet", bundle=bundle)
    with pytest.raises(ConfigError, match="--layout 'wide'; expected: lists or long"):
        score(tmp_path / "flat.parquet", tmp_path / "out.parquet", bundle=bundle, layout="wide")
    folder = tmp_path / "folder"
    folder.mkdir()
    first = session_file(folder / "1.parquet", [["ware-3-ü"]])
    pq.write_table(pq.read_table(first).drop_columns(["city"]), folder / "2.parquet")
    with pytest.raises(DataError, match=r"2\.parquet has no column city; expected: the columns of .*1\.parquet"):
        score(folder, tmp_path / "out.parquet", bundle=bundle)
    (folder / "2.parquet").write_bytes(first.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"2\.parquet cannot be read as parquet"):
        score(folder, tmp_path / "out.parquet", bundle=bundle)
    for given in ({}, {"bundle": bundle, "run": bundle}):
        with pytest.raises(ConfigError, match="one of the two"):
            commands.score(tmp_path / "flat.parquet", tmp_path / "out.parquet", **given)


def test_a_folder_as_output_is_refused_before_anything_is_computed(bundle: Path, tmp_path: Path) -> None:
    file = session_file(tmp_path / "some.parquet", [["ware-3-ü"]])
    (tmp_path / "out").mkdir()
    for write in (
        lambda: score(file, tmp_path / "out", bundle=bundle),
        lambda: similar(out=tmp_path / "out", bundle=bundle),
    ):
        with pytest.raises(DataError, match="out is a folder; expected: the name of a file to write"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "some.parquet"]


def test_the_result_never_replaces_or_joins_the_sessions(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    file = session_file(folder / "1.parquet", [["ware-3-ü"]])
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"1\.parquet holds the sessions; expected: another file"):
        score(file, folder / ".." / "sessions" / "1.parquet", bundle=bundle)
    with pytest.raises(DataError, match=r"out\.parquet is in the folder of the sessions, where the next run"):
        score(folder, folder / "out.parquet", bundle=bundle)
    assert file.read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["1.parquet"]
    score(file, folder / "out.parquet", bundle=bundle)  # the sessions are this one file


def test_columns_that_are_not_used_are_told(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "sessions.parquet"
    lists = pa.array([["ware-3-ü"]])
    pq.write_table(pa.table({"items": lists, "stars": [4], "gap": pa.array([[1.0]]), "score": [2], "rank": [1]}), file)
    used = SessionFiles(file, "items", "string", ["stars", "gap", "hour"])
    assert used.event_columns == {"gap": "gap"}
    assert "the event features stars, hour count as missing" in caplog.text
    caplog.clear()
    score(file, tmp_path / "out.parquet", bundle=bundle)
    assert "columns score of" in caplog.text
    assert pq.read_table(tmp_path / "out.parquet")["rank"].to_pylist() == [1]
    pq.write_table(pa.table({"items": lists, "usable": ["no"]}), file)
    vectors(tmp_path / "again", bundle=bundle, sessions=file)
    assert "columns usable of" in caplog.text
    assert pq.read_table(tmp_path / "again" / "sessions.parquet").to_pydict() == {"usable": [True]}


def test_a_warning_tells_that_most_sessions_hold_no_known_item(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for names, warned in ([["x"], ["y"], ["ware-3-ü"]], True), ([["x"], ["ware-3-ü"]], False):
        caplog.clear()
        score(session_file(tmp_path / "few.parquet", names), tmp_path / "out.parquet", bundle=bundle)
        assert ("2 of 3 sessions hold no item of the catalogue" in caplog.text) is warned
        caplog.clear()
        vectors(tmp_path / "vectors", bundle=bundle, sessions=tmp_path / "few.parquet")
        assert ("2 of 3 sessions hold no item of the catalogue and have a vector of zeros" in caplog.text) is warned


KILLED = """
import os, signal, sys
from missrec_t4r.serving.batch import parts
from missrec_t4r.serving.batch.score import score

def dies(file, content, write=parts.write_json):
    if file.name == "000001.counts.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, content)

parts.write_json = dies
score(*sys.argv[2:], bundle=sys.argv[1])
"""


def test_a_killed_job_leaves_the_last_complete_result_and_goes_on(
    bundle: Path, loaded: LoadedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out.parquet"
    few = session_file(tmp_path / "few.parquet", shop.raw_sessions(loaded.catalogue, 5))
    score(few, out, bundle=bundle)
    before = out.read_bytes()
    many = session_file(tmp_path / "many.parquet", shop.raw_sessions(loaded.catalogue, 200) * 26)
    assert processes.run(["-c", KILLED, bundle, many, out]).returncode == -signal.SIGKILL
    parts = tmp_path / ".out.parquet.parts"
    assert [file.name for file in parts.glob("*.counts.json")] == ["000000.counts.json"]
    assert out.read_bytes() == before
    with caplog.at_level("INFO", logger="missrec_t4r"):
        result = score(many, out, bundle=bundle)
    assert "continuing after 1 finished parts" in caplog.text
    assert not parts.exists()
    score(many, tmp_path / "at once.parquet", bundle=bundle)
    assert result["sessions"] == result["rows"] == 5_200
    assert pq.read_table(out)["user_id"].to_pylist() == [f"user-{number}" for number in range(5_200)]
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "at once.parquet"))


def test_jobs_with_one_output_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "new" / "out.parquet"

    def job(name: str) -> tuple[int, dict[str, int]]:
        return in_parts.write_in_parts(out, name, range(2), lambda part: (pa.table({"job": [name]}), {"rows": part}))

    with beginning_inside("write_tables", in_parts, lambda: job("second"), monkeypatch, caplog):
        assert job("first") == (2, {"rows": 1})
    assert pq.read_table(out)["job"].to_pylist() == ["second", "second"]


def test_parts_of_another_job_are_not_used(bundle: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    file, out = (
        session_file(tmp_path / "some.parquet", shop.raw_sessions(loaded.catalogue, 40)),
        tmp_path / "out.parquet",
    )
    parts = tmp_path / ".out.parquet.parts"
    parts.mkdir()
    for key in ('{"key": "of another job"}', "{"):
        parts.mkdir(exist_ok=True)
        (parts / "made_from.json").write_text(key)
        (parts / "000000.counts.json").write_text('{"sessions": 7}')
        assert score(file, out, bundle=bundle)["sessions"] == 40
        assert pq.read_table(out).num_rows == 40


def test_every_user_of_a_data_folder(bundle: Path, run: Path, loaded: LoadedRun, tmp_path: Path) -> None:
    sessions = Sessions.load(loaded.data / "test", ()).known()
    ids = loaded.catalogue.ids_of(np.arange(FIRST_ITEM_ROW, loaded.catalogue.n_rows))
    users = [f"u{number}" for number in range(len(sessions))]
    data = tmp_path / "data"
    shutil.copytree(loaded.data, data)
    for split, length in (("train", -2), ("valid", -1), ("test", None)):
        rows = [session[:length] for session in sessions]
        columns = {"user_id": users, "item_id-list": rows}
        shutil.rmtree(data / split, ignore_errors=True)
        (data / split).mkdir()
        kept = slice(1, None) if split == "test" else slice(None)  # the first user has no test row
        pq.write_table(
            pa.table({name: values[kept] for name, values in columns.items()}), data / split / "part_0.parquet"
        )
    result = score(out=tmp_path / "all.parquet", data=data, bundle=bundle, top_k=3)
    assert result["sessions"] == len(users)
    by_user = {row["user_id"]: row for row in pq.read_table(tmp_path / "all.parquet").to_pylist()}
    whole = [[ids[row - FIRST_ITEM_ROW] for row in session] for session in sessions]
    file = session_file(tmp_path / "same.parquet", [whole[0][:-1], *whole[1:]])
    score(file, tmp_path / "same out.parquet", bundle=bundle, top_k=3)
    expected = pq.read_table(tmp_path / "same out.parquet").to_pylist()
    assert [by_user[user]["item_id"] for user in users] == [row["item_id"] for row in expected]
    assert score(None, tmp_path / "two.parquet", data=data, users=["u3", "u1"], run=run)["sessions"] == 2
    assert pq.read_table(tmp_path / "two.parquet")["user_id"].to_pylist() == ["u3", "u1"]
    with pytest.raises(DataError, match="has no user 'nobody'"):
        score(None, tmp_path / "two.parquet", data=data, users=["nobody"], bundle=bundle)
    with pytest.raises(ConfigError, match="--users without --data"):
        score(file, tmp_path / "two.parquet", users=["u1"], bundle=bundle)
    with pytest.raises(ConfigError, match="neither --sessions nor --data"):
        score(None, tmp_path / "two.parquet", bundle=bundle)


def test_a_deployment_folder_stands_for_the_bundle_that_it_serves(bundle: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "live", bundle=bundle)
    served = tmp_path / "live" / "missrec_ranker_v1" / "1" / "bundle"
    assert commands.verify(tmp_path / "live")["bundle"] == str(served)
    file = session_file(tmp_path / "sessions.parquet", [["ware-3-ü"], ["ware-9-ü"]])
    for source in (bundle, tmp_path / "live"):
        score(file, tmp_path / f"{source.name}.parquet", bundle=source, top_k=4)
    assert pq.read_table(tmp_path / "live.parquet") == pq.read_table(tmp_path / f"{bundle.name}.parquet")
    assert similar(["ware-3-ü"], bundle=tmp_path / "live") == similar(["ware-3-ü"], bundle=bundle)
    assert vectors(tmp_path / "vectors", bundle=tmp_path / "live")["items"] == shop.N_ITEMS


@pytest.mark.triton
def test_similar_items_are_what_the_server_answers_to_the_item_alone(
    server: LocalTriton, bundle: Path, loaded: LoadedRun, tmp_path: Path
) -> None:
    found = similar(["ware-3-ü", "ware-9-ü"], bundle=bundle, top_k=4)["similar"]
    with MISSRecClient(server.grpc_url) as client:
        answers = client.recommend([["ware-3-ü"], ["ware-9-ü"]], 4, exclude_seen=True)
    assert [[entry["item_id"] for entry in found[item]] for item in ("ware-3-ü", "ware-9-ü")] == [
        answer.item_ids for answer in answers
    ]
    assert all(entry["title"].startswith("Ware ") for entries in found.values() for entry in entries)
    result = similar(bundle=bundle, out=tmp_path / "all.parquet", top_k=4)
    table = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert result["items"] == shop.N_ITEMS
    assert len(table) == 4 * shop.N_ITEMS
    of_three = [row["similar_item_id"] for row in table if row["item_id"] == "ware-3-ü"]
    assert of_three == answers[0].item_ids
    assert similar(["ware-3-ü", "ware-9-ü", "ware-3-ü"], bundle=bundle, top_k=4)["similar"] == found
    with pytest.raises(DataError, match="unknown items: gone"):
        similar(["gone"], bundle=bundle)
    with pytest.raises(ConfigError, match="neither --items nor --out"):
        similar(bundle=bundle)


@pytest.mark.parametrize("by", ["session", "content"])
def test_similar_items_load_the_bundle_once(bundle: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    built = []
    monkeypatch.setattr(bundles, "build_missrec", lambda *parts: built.append(1) or build_missrec(*parts))
    similar_to_array = similar(np.array(["ware-3-ü", "ware-9-ü"]), bundle=bundle, top_k=4, by=by)["similar"]
    assert len(built) == 1
    found = SimilarItems(bundle)
    assert found.of(["ware-3-ü"], 4, by) == found.of(["ware-3-ü"], 4, by)
    assert similar_to_array == found.of(["ware-3-ü", "ware-9-ü"], 4, by)
    assert len(built) == 2


def test_similar_content_is_the_mean_cosine_of_shared_modalities(bundle: Path) -> None:
    loaded = load_bundle(bundle)
    with torch.inference_mode():
        tokens = loaded.model.candidates()
    vectors_of, mask = tokens.modality.double().numpy(), tokens.mask.numpy()
    entries = similar(["ware-3-ü"], bundle=bundle, top_k=100, by="content")["similar"]["ware-3-ü"]
    assert len(entries) == shop.N_ITEMS - 1
    row = int(loaded.catalogue.rows_of(["ware-3-ü"])[0])
    expected = {}
    for other in range(FIRST_ITEM_ROW, loaded.catalogue.n_rows):
        shared = mask[:, row] & mask[:, other]
        expected[other] = (vectors_of[shared, row] * vectors_of[shared, other]).sum() / shared.sum()
    others = loaded.catalogue.rows_of([entry["item_id"] for entry in entries])
    np.testing.assert_allclose([entry["score"] for entry in entries], [expected[o] for o in others], atol=1e-5)
    assert [entry["score"] for entry in entries] == sorted((entry["score"] for entry in entries), reverse=True)


def test_vectors_in_an_inner_product_index_give_the_served_order(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """With static fusion and nothing added to the score, an index of items.npy answers as the server does."""
    export(make_run(candidate_fusion="static", history_bias=False, n_neighbours=0), tmp_path / "bundle")
    catalogue = load_bundle(tmp_path / "bundle").catalogue
    sessions = shop.raw_sessions(catalogue, 90, seed=2)
    file = session_file(tmp_path / "sessions.parquet", sessions)
    result = vectors(tmp_path / "vectors", bundle=tmp_path / "bundle", sessions=file)
    score(file, tmp_path / "out.parquet", bundle=tmp_path / "bundle", top_k=6)
    items, users = (np.load(tmp_path / "vectors" / f"{name}.npy") for name in ("items", "sessions"))
    ids = np.array(pq.read_table(tmp_path / "vectors" / "items.parquet")["item_id"].to_pylist())
    rows = pq.read_table(tmp_path / "vectors" / "sessions.parquet").to_pylist()
    assert (result["items"], result["sessions"], result["width"]) == (shop.N_ITEMS, 90, users.shape[1])
    answered = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert {row["usable"] for row in rows} == {True, False}
    for user, row, answer in zip(users, rows, answered, strict=True):
        assert row["user_id"] == answer["user_id"]
        assert row["usable"] is not answer["fallback"]
        if row["usable"]:
            order = np.argsort(-(items @ user), kind="stable")[:6]
            assert ids[order].tolist() == answer["item_id"]
            np.testing.assert_allclose((items @ user)[order], answer["score"], atol=1e-5)


def test_vectors_json_holds_what_the_dynamic_score_needs(bundle: Path, tmp_path: Path) -> None:
    """docs/howto/vectors.md: the score of every item from the exported files alone."""
    loaded = load_bundle(bundle)
    sessions = list(shop.raw_sessions(loaded.catalogue, 40, seed=6))
    file = session_file(tmp_path / "sessions.parquet", sessions)
    vectors(tmp_path / "vectors", bundle=bundle, sessions=file)
    settings = json.loads((tmp_path / "vectors" / "vectors.json").read_text())
    tokens = [np.load(tmp_path / "vectors" / f"modality-{name}.npy") for name in settings["modalities"]]
    users = np.load(tmp_path / "vectors" / "sessions.npy")
    with torch.inference_mode():
        model = loaded.model
        expected = model.fusion(torch.from_numpy(users), model.candidates()).numpy()[:, FIRST_ITEM_ROW:]
    votes = np.stack([users @ token.T for token in tokens])
    present = np.stack([np.broadcast_to(token.any(1), votes.shape[1:]) for token in tokens])
    weights = np.exp((settings["phi"] or 0.0) * votes) * present
    fused = (weights * votes).sum(0) / weights.sum(0)
    ids = np.load(tmp_path / "vectors" / "ids.npy")
    assert settings["id_embeddings"]
    assert settings["score_terms"].keys() == {"item_knn", "content_knn", "cold_start", "rare_items"}
    howto = (Path(__file__).parents[2] / "docs/howto/vectors.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in howto for name in ("score_terms", *settings["score_terms"]))
    fused = np.where(ids.any(1), (users @ ids.T + 2 * fused) / 3, fused)
    np.testing.assert_allclose(fused, expected, atol=1e-5)
