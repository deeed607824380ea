"""`missrec compare`: the same users for every system, differences by hand, lists of another system, the verdict."""

from __future__ import annotations

import base64
import io
import json
import re
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import missrec_t4r as mr
from benchmarks.quality.compared import compact
from missrec_t4r import commands
from missrec_t4r.cli.answer import summary
from missrec_t4r.cli.app import app
from missrec_t4r.comparison.beyond_accuracy import BeyondAccuracy
from missrec_t4r.comparison.page import page
from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError, GateError, SchemaError
from missrec_t4r.etl.features.thumbnails import thumbnails
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM
from missrec_t4r.evaluation.metrics import metrics, paired_differences
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.run_folder import load_run, save_run
from missrec_t4r.schema import FIRST_ITEM_ROW
from tests import shop

IDS = list("abcdef")
TITLES = ["Blue lamp", "Oak desk", "Chair", "Sofa <red>", "Rug", "Shelf"]
SPLITS = {
    "train": [[3, 4, 5], [3, 4], [4, 5, 5], [6, 3], [7]],
    "valid": [[3, 4, 5, 6], [3, 4, 5], [4, 5, 5, 3], [6, 3, 4], [7, 6]],
    "test": [[3, 4, 5, 6, 8], [3, 4, 5, 6], [4, 5, 5, 3, 4], [6, 3, 4, 7], [7, 3]],
}
"""Users u0 to u4; in the test split their targets are f, d, b (seen), e, a."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder of five users; items "a" to "f" in rows 3 to 8."""
    folder = tmp_path / "data"
    text = np.eye(9, 4, -3) + 0.1
    counts = shop.counts_of(SPLITS["train"], len(IDS))
    catalogue = shop.make_catalogue(
        IDS, {"text": shop.modality(text, without=[8])}, counts, {"title": TITLES, "kind": list("xxyyzz")}
    )
    catalogue.save(folder / "catalogue")
    for split, sessions in SPLITS.items():
        shop.write_split(folder / split, sessions, users="u")
    return folder


def write_run(folder: Path, data: Path, seed: int, trained: Sequence[Sessions] = ()) -> Path:
    """Write a run with random weights, which says that it was trained on these sessions."""
    torch.manual_seed(seed)
    recipe = Recipe(model=MISSRecConfig(d_model=8, n_head=2))
    catalogue = Catalogue.load(data / "catalogue")
    model = build_missrec(recipe.model, catalogue)
    model.discover_interests(seed=0)
    save_run(folder, model, recipe, data, {"best_epoch": 1, "epochs": 1}, catalogue, trained)
    return folder


def write_lists(file: Path, lists: dict[str, list[str]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user_id": [*lists], "item_id": [*lists.values()]}), file)
    return file


GOOD = {"u0": ["f"], "u1": ["d"], "u2": ["b"], "u3": ["e"], "u4": ["a"]}
BAD = {user: ["c"] for user in GOOD}


def test_lists_are_judged_as_they_are(data: Path, tmp_path: Path) -> None:
    lists = {
        "u0": ["a", "f", "gone"],  # excluded: the seen a leaves, f moves to place 1
        "u1": ["gone", "e", "d", "d"],  # an unknown item keeps its place: 3
        "u2": ["b"],  # in its own history: a miss where seen items are excluded
        "u3": [],
        "stranger": ["a"],
    }
    write_lists(tmp_path / "today.parquet", lists)
    result = mr.compare(["popularity", tmp_path / "today.parquet"], data=data)
    assert result["sessions"]["compared"] == 4  # u4 has no list
    assert result["sessions"]["left_out"] == 1
    counts = result["systems"]["today"]["counts"]
    assert counts == {
        "missing_users": 1, "additional_users": 1, "unknown_items": 2,
        "repeated_items_dropped": 1, "empty_lists": 1,
    }  # fmt: skip
    excluded, kept = (result["protocols"][name]["today"] for name in (EXCLUDED, KEPT_WITH_HISTORY_TERM))
    assert excluded["mrr@10"] == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert kept["mrr@10"] == pytest.approx((1 / 2 + 1 / 3 + 1 + 0) / 4)
    assert KEPT_STRICT not in result["protocols"], "nobody knows what today's lists know"
    popular = result["protocols"][KEPT_WITH_HISTORY_TERM]["popularity"]
    # counts a 3, b 3, c 3, d 1, e 1, f 0: ranks of f, d, b, e
    assert popular["mrr@10"] == pytest.approx((1 / 6 + 1 / 4 + 1 / 2 + 1 / 5) / 4)
    difference = result["differences"][KEPT_WITH_HISTORY_TERM]["today"]["mrr@10"]
    assert difference["difference"] == pytest.approx(kept["mrr@10"] - popular["mrr@10"])


def test_long_tables_are_read_by_rank_and_ids_by_their_text(data: Path, tmp_path: Path) -> None:
    rows = {"user": ["u0", "u1", "u0"], "item": ["a", "d", "f"], "rank": [2, 1, 1]}
    pq.write_table(pa.table(rows), tmp_path / "long.parquet")
    write_lists(tmp_path / "wide.parquet", {"u0": ["f", "a"], "u1": ["d"]})
    result = mr.compare([tmp_path / "wide.parquet", tmp_path / "long.parquet"], data=data)
    assert result["protocols"][EXCLUDED]["long"] == result["protocols"][EXCLUDED]["wide"]
    assert result["protocols"][EXCLUDED]["long"]["ndcg@10"] == 1


def test_lists_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    file = write_lists(tmp_path / "other.parquet", {"9": ["a"]})
    with pytest.raises(DataError, match="none of the 1 users .*'9' there, 'u0' here"):
        mr.compare(["popularity", file], data=data)
    pq.write_table(pa.table({"user_id": ["u0", "u0"], "item_id": [["a"], ["b"]]}), file)
    with pytest.raises(DataError, match="1 users with more than one list"):
        mr.compare(["popularity", file], data=data)
    pq.write_table(pa.table({"who": ["u0"], "number": [1]}), file)
    with pytest.raises(SchemaError, match="has the columns who, number; expected: user_id and item_id"):
        mr.compare(["popularity", file], data=data)


def test_a_system_compared_with_itself_shows_no_difference(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", data, 0)
    result = commands.compare([f"one={run}", f"two={run}"], tmp_path / "out", protocols=[EXCLUDED])
    assert result["verdict"]["decision"] == "no difference shown"
    for measured in result["differences"][EXCLUDED]["two"].values():
        assert (measured["difference"], measured["low"], measured["high"]) == (0, 0, 0)
    assert result["examples"] == []
    assert json.loads((tmp_path / "out/comparison.json").read_text())["verdict"] == result["verdict"]


def test_the_verdict_follows_the_interval_and_is_the_exit_code(data: Path, tmp_path: Path) -> None:
    good, bad = write_lists(tmp_path / "good.parquet", GOOD), write_lists(tmp_path / "bad.parquet", BAD)
    protocol = ["--protocols", KEPT_WITH_HISTORY_TERM, "--data", str(data)]
    asked = ["compare", f"today={bad}", f"new={good}", "--out", str(tmp_path / "ship"), *protocol]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["verdict"]["decision"] == "ship"
    asked = ["compare", f"today={good}", f"new={bad}", "--out", str(tmp_path / "refused"), *protocol]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 3, done.output
    assert json.loads(done.stdout.splitlines()[-1])["verdict"]["decision"] == "do not ship"
    assert "Do not ship new: NDCG@10 0.0000 against 1.0000 of today (-100.0%)" in done.stderr
    assert "Do not ship" in (tmp_path / "refused/comparison.html").read_text()


def test_a_gate_of_bounds_decides(data: Path, tmp_path: Path) -> None:
    good, bad = write_lists(tmp_path / "good.parquet", GOOD), write_lists(tmp_path / "bad.parquet", BAD)
    gate = tmp_path / "gate.yaml"
    gate.write_text("excluded.difference_low.ndcg@10: {min: 0}\nexcluded.coverage@10: {min: 0.9}\n")
    with pytest.raises(GateError, match=r"excluded.coverage@10 is 0.66.*bounds {'min': 0.9}") as refused:
        commands.compare([bad, good], tmp_path / "out", data=data, gate=gate)
    assert [check["passed"] for check in refused.value.result["verdict"]["gate"]] == [True, False]
    gate.write_text("excluded.coverage@10: {min: 0.5}\nslice.cold.excluded.ndcg@10: {min: 1}\n")
    assert commands.compare([bad, good], tmp_path / "out", data=data, gate=gate)["verdict"]["decision"] == "ship"
    gate.write_text("excluded.covrage@10: {min: 0.5}\n")
    with pytest.raises(ConfigError, match="a measure such as excluded.coverage@10"):
        commands.compare([bad, good], tmp_path / "out", data=data, gate=gate)


def test_seeds_are_averaged_and_baselines_stand_beside(data: Path, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed-{seed}", data, seed) for seed in (0, 1)]
    alone = [mr.compare({"popularity": "popularity", "run": run})["protocols"] for run in runs]
    result = mr.compare({"popularity": "popularity", "run": runs}, baselines=["item_knn", "network", "terms"])
    assert list(result["protocols"][EXCLUDED]) == ["popularity", "run", "item_knn", "network", "terms"]
    for protocol in (EXCLUDED, KEPT_STRICT, KEPT_WITH_HISTORY_TERM):
        values = [one[protocol]["run"]["ndcg@10"] for one in alone]
        assert result["protocols"][protocol]["run"]["ndcg@10"] == pytest.approx(np.mean(values))
    seeds = result["systems"]["run"]["seeds"]
    assert seeds["ndcg@10"] == pytest.approx([one[EXCLUDED]["run"]["ndcg@10"] for one in alone])
    renamed = mr.compare(
        {"run": runs, "net": "network", "too": "network", "most sold": "popularity", "again": "popularity"},
        protocols=[EXCLUDED],
    )
    found, before = renamed["protocols"][EXCLUDED], result["protocols"][EXCLUDED]
    assert list(found) == ["run", "net", "too", "most sold", "again"]
    assert found["net"] == found["too"] == before["network"]
    assert found["most sold"] == found["again"] == before["popularity"]
    assert renamed["systems"]["net"]["kind"] == "network of run"
    assert result["systems"]["run"]["bytes"] == (runs[0] / "weights.safetensors").stat().st_size


def test_a_run_on_another_folder_is_matched_by_user_and_target(data: Path, tmp_path: Path) -> None:
    """The other folder has the items in another order, one user with another target, and lacks a user."""
    other = tmp_path / "other"
    Catalogue.load(data / "catalogue").save(other / "catalogue")
    reversed_rows = {row: 11 - row for row in range(3, 9)}
    catalogue = shop.make_catalogue(
        IDS[::-1],
        {"text": shop.modality((np.eye(9, 4, -3) + 0.1), without=[8])},
        shop.counts_of(SPLITS["train"], len(IDS))[::-1],
    )
    catalogue.save(other / "catalogue")
    for split, sessions in SPLITS.items():
        theirs = [[reversed_rows[row] for row in session] for session in sessions]
        if split == "test":
            theirs = [theirs[0][:-1] + [reversed_rows[7]], *theirs[1:4]]
        shop.write_split(other / split, theirs, users="u")
    runs = [write_run(tmp_path / "here", data, 0), write_run(tmp_path / "there", other, 1)]
    result = mr.compare(runs, protocols=[EXCLUDED])
    assert result["sessions"]["compared"] == 3
    assert result["systems"]["there"]["counts"] == {
        "missing_users": 1, "sessions_with_another_target": 1, "additional_users": 0,
    }  # fmt: skip
    popular = [mr.compare(["popularity", run])["protocols"][EXCLUDED] for run in runs]
    assert all(one["popularity"]["ndcg@10"] is not None for one in popular)
    shown = [item["title"] for one in result["examples"] for item in one["systems"]["there"]["list"]]
    assert set(shown) <= set(TITLES)


def test_the_terminal_shows_the_first_protocol_with_coverage(data: Path, tmp_path: Path) -> None:
    result = mr.compare(["popularity", "item_knn"], tmp_path / "out", data=data, protocols=[EXCLUDED])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary("compare", result))
    words = console.export_text()
    covered = result["beyond_accuracy"][EXCLUDED]["item_knn"]["coverage@10"]
    assert f"{covered:.3f}" in words
    for expected in ("coverage@10", result["verdict"]["summary"], str(tmp_path / "out" / "comparison.html")):
        assert expected in words.replace("\n", "")


def test_the_page_tells_a_reader_without_figures(data: Path, tmp_path: Path) -> None:
    files = write_lists(tmp_path / "now.parquet", BAD), write_lists(tmp_path / "next.parquet", GOOD)
    result = mr.compare(files, data=data, slice_columns=["kind"])
    text = page(result)
    for words in ("Ship", "next against now", "Blue lamp", "Sofa &lt;red&gt;", "kind=x", "Better: next", "<svg"):
        assert words in text
    assert "<red>" not in text
    assert "http" not in text.replace('lang="en"', ""), "the page loads nothing"


def test_the_verdict_says_what_its_figures_mean(data: Path, tmp_path: Path) -> None:
    lists = {"now": BAD, "next": GOOD | {"u3": ["c"]}, "later": GOOD}
    systems = {name: write_lists(tmp_path / f"{name}.parquet", of) for name, of in lists.items()}
    result = mr.compare(systems, data=data, protocols=[EXCLUDED])
    assert result["outcomes"][EXCLUDED] == {"candidate_better": 3, "current_better": 0, "equal": 2, "neither_found": 2}
    assert result["verdict"]["explanation"] == [
        "The item that came next is among the first ten recommendations of next in 60.0 of 100 sessions, "
        "among those of now in 0.0.",
        "It stands higher with next in 3 sessions and with now in 0; in 2 there is no difference (in 2 of them neither "
        "has it among its first ten).",
        "Of all that are compared, later has the highest NDCG@10: 0.8000.",
    ]
    assert all(words in page(result) for words in result["verdict"]["explanation"])
    assert compact(result)["verdict"]["summary"] == result["verdict"]["summary"]  # what the benchmark keeps


def test_every_chart_names_every_system(data: Path, tmp_path: Path) -> None:
    file = write_lists(tmp_path / "lists.parquet", GOOD)
    names = [f"system of team {letter}, evening" for letter in "ABCDE"]
    text = page(mr.compare(dict.fromkeys(names, file), data=data, protocols=[EXCLUDED]))
    accuracy, difference, *_ = re.findall(r"<svg.*?</svg>", text)
    assert re.findall(r">(system of [^<]*)</text>", accuracy) == names
    assert re.findall(r">(system of [^<]*)</text>", difference) == names[1:]


def test_the_examples_show_pictures_once_each_and_small(data: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 4), np.uint8)
    for item in "abce":
        Image.fromarray(noise[:, :, :3]).save(pictures / f"{item}.png")
    Image.fromarray(noise).save(pictures / "d.png")  # half transparent
    (pictures / "f.png").write_bytes(b"no picture")
    given = [write_lists(tmp_path / "now.parquet", BAD), write_lists(tmp_path / "next.parquet", GOOD)]
    commands.compare(given, tmp_path / "out", data=data, images=pictures)
    text = (tmp_path / "out/comparison.html").read_text()
    embedded = re.findall(r"\.p\d+\{background-image:url\(data:image/jpeg;base64,([^)]*)\)\}", text)
    assert len(embedded) == 5, "each item that is shown and has a picture, once"
    for one in embedded:
        with Image.open(io.BytesIO(base64.b64decode(one))) as small:
            assert small.size == (37, 56)
    assert text.count('<i class="pic') > 5, "items that occur in several places show it in all"
    assert "base64" not in (tmp_path / "out/comparison.json").read_text()
    with pytest.raises(DataError, match="no folder .*gone"):
        commands.compare(given, tmp_path / "other", data=data, images=tmp_path / "gone")
    with pytest.raises(SchemaError, match="photo"):
        commands.compare(given, tmp_path / "other", data=data, image_column="photo")


def test_pictures_are_those_that_the_vectors_were_computed_from(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    columns = {"title": TITLES, "photo": [f"{item}.png" for item in IDS]}
    recorded = shop.modality(np.eye(9, 4, -3), column="photo", images=str(tmp_path / "pictures"))
    counts = catalogue.train_count[FIRST_ITEM_ROW:]
    catalogue = shop.make_catalogue(IDS, {**catalogue.modalities, "image": recorded}, counts, columns)
    assert thumbnails(catalogue, IDS) == {}
    assert "where they were, is not here; name it with --images" in caplog.text
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures/b.png")
    assert [*thumbnails(catalogue, IDS)] == ["b"]


def test_a_scorer_of_your_own_is_a_system(data: Path) -> None:
    def last_item_plus_one(histories: Sessions) -> Tensor:
        scores = torch.zeros(len(histories), 9)
        scores[:, :3] = -torch.inf
        for index, session in enumerate(histories):
            scores[index, min(int(session[-1]) + 1, 8)] = 1
        return scores

    result = mr.compare({"popularity": "popularity", "next": last_item_plus_one}, data=data)
    # last known items d, c, a, b, e: guesses e, d, b (seen), c, f; hit for the second and under kept for the third
    assert result["protocols"][KEPT_STRICT]["next"]["mrr@10"] > result["protocols"][KEPT_STRICT]["popularity"]["mrr@10"]


def test_a_slice_column_with_one_long_text_takes_no_room_for_every_item(data: Path) -> None:
    """Fixed-width text would take that of the longest value times the catalogue."""
    catalogue = Catalogue.load(data / "catalogue")
    texts = ["short", "short", "x" * 4_000_000, "short", "short", "short"]  # the third item is no target
    catalogue = Catalogue(catalogue.items.append_column("text", pa.array(texts)), catalogue.modalities)
    catalogue.save(data / "catalogue")
    tracemalloc.start()
    result = mr.compare(["popularity", "item_knn"], data=data, slice_columns=["text"])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["slices"]["text=short"]["n"] == 5
    assert most < 60_000_000  # nine rows of four bytes a character would be 144 million


def test_targets_without_a_value_in_a_slice_column_are_a_slice_of_their_own(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    brands = pa.array(["x", None, "", "missing", "x", ""])
    Catalogue(catalogue.items.append_column("brand", brands), catalogue.modalities).save(data / "catalogue")
    shop.write_split(data / "test", [*SPLITS["test"], [3, 2]], users="u")  # the last target is in no catalogue
    slices = mr.compare(["popularity", "item_knn"], data=data, slice_columns=["brand"])["slices"]
    assert slices["all"]["n"] == 6
    counts = {name: part["n"] for name, part in slices.items() if "=" in name}
    assert counts == {"brand=": 1, "brand=missing": 1, "brand='missing'": 1, "brand=x": 2}


def test_systems_without_a_common_protocol_are_refused(data: Path) -> None:
    class KnowsWhatWasSeen:
        protocols = (EXCLUDED,)

        def __call__(self, histories: Sessions) -> Tensor:
            return torch.zeros(len(histories), 9)

    with pytest.raises(ConfigError, match="no protocol of kept_strict that popularity and mine both have"):
        mr.compare({"popularity": "popularity", "mine": KnowsWhatWasSeen()}, data=data, protocols=[KEPT_STRICT])


@pytest.mark.parametrize(
    ("systems", "words"),
    [
        (["popularity"], "1 systems"),
        (["popularity", "nowhere"], "nowhere is missing"),
        (["popularity", "network"], "no run and no `data`"),
        (["popularity", "x=item_knn", "x=content_knn"], "two systems called 'x'"),
        (["popularity", "x=item_knn,content_knn"], "2 paths of one system that are not runs"),
    ],
)
def test_what_cannot_be_compared_is_said(systems: list[str], words: str) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        mr.compare(systems)


def test_a_bundle_is_not_taken_for_lists(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    pq.write_table(pa.table({"item_id": IDS}), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="is a bundle; expected: a run folder .*name the run that it was exported from"):
        mr.compare(["popularity", str(tmp_path)])


def test_a_dry_run_ranks_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    file = write_lists(tmp_path / "now.parquet", GOOD)
    result = commands.compare(["popularity", file], tmp_path / "out", data=data, dry_run=True)
    assert result["systems"] == {"popularity": "baseline", "now": "lists"}
    assert result["candidate"] == "now"
    assert not (tmp_path / "out").exists()


def test_differences_of_seeds_by_hand() -> None:
    first, second = np.array([[1, 3], [2, 2]]), np.array([1, 50])
    found: Any = paired_differences(first, second, [10])["mrr@10"]
    assert found.difference == pytest.approx(((1 + 1 / 3) / 2 - 1 + 1 / 2) / 2)
    assert metrics(first, [10])["mrr@10"] == pytest.approx((1 + 1 / 3 + 1 / 2 + 1 / 2) / 4)


def test_beyond_accuracy_by_hand(data: Path) -> None:
    catalogue = Catalogue.load(data / "catalogue")
    found = BeyondAccuracy(catalogue, np.array([3, 7]))(np.array([[3, 6], [3, 2], [8, -1]]))
    assert found["coverage@10"] == 3 / 6
    # counts 3, 1, 3, 0 of 11 events and 6 items: 4/17, 2/17, 4/17, 1/17; the unknown item and the gap are left out
    bits = -np.log2(np.array([4, 2, 4, 1]) / 17)
    assert found["novelty"] == pytest.approx(bits.mean())
    assert found["popularity"] == pytest.approx((3 + 1 + 3 + 0) / 4)
    assert found["popularity_bias"] == pytest.approx(7 / 4 / 2)  # targets a and e: 3 and 1 events
    vectors = catalogue.modalities["text"].vectors[3:8]
    unit = vectors - vectors.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    assert found["diversity"] == pytest.approx(1 - float(unit[0] @ unit[3]), abs=1e-6)  # the only pair with vectors


def test_systems_that_can_be_called_have_a_latency_and_a_size(data: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", data, 0)
    write_lists(tmp_path / "today.parquet", GOOD)
    gate = tmp_path / "gate.yaml"
    gate.write_text("milliseconds.64: {max: 1000000}\nbytes_in_memory: {min: 1}\n")
    result = mr.compare([tmp_path / "today.parquet", run, "item_knn"], data=data, gate=gate, protocols=[EXCLUDED])
    assert result["verdict"]["decision"] == "ship"
    costs = {name: of["cost"] for name, of in result["systems"].items()}
    assert costs["today"] is None
    model = load_run(run).model
    assert costs["run"]["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert costs["run"]["bytes_in_memory"] >= 4 * costs["run"]["parameters"]
    assert costs["item_knn"]["parameters"] == 0
    assert costs["item_knn"]["bytes_in_memory"] > 0
    for name in ("run", "item_knn"):
        assert all(value > 0 for value in costs[name]["milliseconds"].values())
    assert "Latency, memory and size" in page(result)


def test_what_is_named_twice_or_written_over_a_file(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_lists(tmp_path / "today.parquet", GOOD)
    result = mr.compare(["popularity", file], baselines=["popularity"], data=data, protocols=[EXCLUDED])
    assert list(result["systems"]) == ["popularity", "today"]
    assert "5 sessions are too few" in caplog.text
    with pytest.raises(ConfigError, match=r"two systems called '/\w"):
        mr.compare([file, file], data=data)
    with pytest.raises(ConfigError, match="two systems called 'popularity'"):
        mr.compare({"popularity": file, "other": "item_knn"}, baselines=["popularity"], data=data)
    folders = [write_lists(tmp_path / f"lists-0.{number}" / "part.parquet", GOOD).parent for number in (5, 6)]
    assert list(mr.compare(folders, data=data, dry_run=True)["systems"]) == ["lists-0.5", "lists-0.6"]
    with pytest.raises(ConfigError, match="is a file; expected: a folder"):
        mr.compare(["popularity", file], file, data=data)


def test_runs_that_were_trained_on_different_sessions_are_told_apart(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, other = ([Sessions.from_lists(one)] for one in (SPLITS["train"], [*SPLITS["train"][:-1], [8]]))
    runs = [str(write_run(tmp_path / f"run{n}", data, n, trained)) for n, trained in enumerate((own, other, own, ()))]
    words = r"run0 and .*run1, seeds of new, were trained on different sessions; expected: seeds that differ in nothing"
    with pytest.raises(ConfigError, match=words):
        mr.compare({"today": "popularity", "new": runs[:2]}, data=data)
    result = mr.compare({"today": runs[0], "new": runs[1], "same": runs[2], "old": runs[3]}, data=data)
    noted = {name: [note for note in of["notes"] if "trained" in note] for name, of in result["systems"].items()}
    said = "trained on other sessions than today: the difference is of models and data"
    assert noted == {"today": [], "new": [said], "same": [], "old": []}
    assert f"new was {said}" in caplog.text


def test_an_evaluation_on_other_sessions_than_those_of_the_training_says_so(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = [Sessions.from_lists(SPLITS[name]) for name in ("train", "valid")]
    for name, trained in (("same", own), ("other", own[:1])):
        commands.evaluate(write_run(tmp_path / name, data, 0, trained), alone=True)
        assert ("was trained on other sessions than" in caplog.text) == (name == "other")
