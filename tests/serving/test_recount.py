"""`missrec export --recount`: the served model counts the events that validation and test ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.bundle.update_catalogue import update_catalogue
from missrec_t4r.commands import verify
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.export.export import export
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import save_run
from missrec_t4r.schema import ITEM_ID, ITEM_LIST
from tests.serving import shop
from tests.shop import write_split

SESSIONS = [[4, 5, 9, 10]] * 6 + [[6, 7, 8, 11]] * 6
"""The last item is the test target, the one before it the validation target."""
TUNED = {"window": 3, "directed": False}


def make_run(
    folder: Path,
    tuned: Mapping[str, Any] = TUNED,
    sessions: Any = SESSIONS,
    users: Mapping[str, Sequence[object]] | None = None,
    **settings: object,
) -> Path:
    """Write a run whose score is almost its item-kNN term, counted in training, and whose rare items gain much.

    ``users``: the columns that say whose the sessions are; by default one user each.
    """
    (folder / "data").mkdir(parents=True)
    catalogue = shop.catalogue()
    data = shop.data_folder(folder / "data", catalogue)
    for split, without in (("train", 2), ("valid", 1), ("test", 0)):
        file = write_split(data / split, [session[: len(session) - without] for session in sessions], users="u")
        if users is not None:
            rows = pq.read_table(file, columns=[ITEM_LIST])
            pq.write_table(
                pa.table({name: pa.array(values) for name, values in users.items()} | {ITEM_LIST: rows[0]}), file
            )
    model = shop.model_for(catalogue, **settings)
    terms = terms_of(model)
    if terms.item_knn is not None and tuned:
        terms.item_knn.fit(Sessions.from_lists([session[:-2] for session in SESSIONS]), tuned["window"])
        terms.item_knn.choose(ItemKNNSettings(1.0, 0.9, 0.0))
        assert terms.rare_items is not None
        terms.rare_items.choose(torch.tensor([[0.0] * 3, [3.0] * 3]), [1.0, 1.0])
    settings_of_terms = {"score_terms": {"item_knn": tuned} if tuned else {}}
    save_run(folder / "run", model, shop.recipe_of(model), data, settings_of_terms, catalogue)
    return folder / "run"


def ranked(bundle: Path, session: list[int]) -> list[int]:
    loaded = load_bundle(bundle)
    return list(Ranker(loaded.model, loaded.catalogue).rank(np.array([session]), top_k=30).rows[0])


def test_what_only_later_events_tell_is_recommended(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "counted_events" not in export(run, tmp_path / "before")
    result = export(run, tmp_path / "after", recount=True)
    assert result["counted_events"] == 48
    assert result["parity"]["equal"]
    assert sorted(ranked(tmp_path / "after", [9])[:3]) == [4, 5, 10]  # together in all six sessions of theirs
    assert sorted(ranked(tmp_path / "before", [9])[:3]) != [4, 5, 10]


@pytest.mark.parametrize("kind", [pa.int64(), pa.timestamp("us"), pa.timestamp("ns", "Europe/Berlin")], ids=str)
def test_the_manifest_says_what_was_counted_and_until_when(tmp_path: Path, kind: pa.DataType) -> None:
    run = make_run(tmp_path)
    export(run, tmp_path / "before")
    assert verify(tmp_path / "before")["recount"] is None
    for split in ("train", "valid", "test"):
        file = tmp_path / "data" / split / "part_0.parquet"
        rows = pq.read_table(file)
        times = [[1_700_000_000 + 86_400 * day for day in range(len(items))] for items in rows[ITEM_LIST].to_pylist()]
        seconds = pa.array(times).cast(pa.list_(kind if kind == pa.int64() else pa.timestamp("s")))
        pq.write_table(rows.append_column("timestamp-list", seconds.cast(pa.list_(kind))), file)
    export(run, tmp_path / "after", recount=True)
    counted = {"events": 48, "sessions": 12, "until": "2023-11-17T22:13:20Z"}
    assert verify(tmp_path / "after")["recount"] == counted
    assert update_catalogue(tmp_path / "after", pa.table({"item_id": ["new"]}))["added"] == 1
    assert verify(tmp_path / "after")["recount"] == counted  # an update keeps the weights, and so the counts
    pq.write_table(pq.read_table(file).slice(0, 0), tmp_path / "data" / "valid" / "part_0.parquet")
    export(run, tmp_path / "after", recount=True)
    assert verify(tmp_path / "after")["recount"] == counted  # the events of validation are those of test, less the last


def test_an_item_with_enough_events_is_no_longer_rare(tmp_path: Path) -> None:
    """Items 4 to 7 alone have more than four events in training, 4 to 11 in all splits."""
    run = make_run(tmp_path)
    export(run, tmp_path / "before")
    export(run, tmp_path / "after", recount=True)
    before, after = ranked(tmp_path / "before", [3]), ranked(tmp_path / "after", [3])
    assert max(before.index(row) for row in (8, 9, 10, 11)) < min(before.index(row) for row in (4, 5, 6, 7))
    assert min(after.index(row) for row in (8, 9, 10, 11)) >= shop.N_ITEMS - 9  # only items 4 to 11 have events


def test_events_and_items_of_an_update_are_counted_without_a_training(tmp_path: Path) -> None:
    """As `missrec etl --update` leaves the folder: every session goes on with an item that the run does not have."""
    run, folder = make_run(tmp_path), tmp_path / "data"
    before = Catalogue.load(folder / "catalogue")
    added = before.items.slice(0, 1).set_column(0, ITEM_ID, pa.array(["new"]))
    modalities = {
        name: Modality(np.append(one.vectors, one.vectors[4:5], axis=0), np.append(one.present, True))
        for name, one in before.modalities.items()
    }
    Catalogue(pa.concat_tables([before.items, added]), modalities).save(folder / "catalogue")
    for split, without in (("train", 2), ("valid", 1), ("test", 0)):
        longer = [[*session, before.n_rows] for session in SESSIONS]
        write_split(folder / split, [session[: len(session) - without] for session in longer], users="u")
    assert export(run, tmp_path / "bundle", recount=True)["counted_events"] == 60
    first = ranked(tmp_path / "bundle", [10])[:4]
    assert before.n_rows in first  # 4, 5 and 9 are in these sessions as well
    export(run, tmp_path / "without")
    assert ranked(tmp_path / "without", [10]).index(before.n_rows) > first.index(before.n_rows)


def test_the_run_stays_as_it_was(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    files = {file: file.read_bytes() for file in run.iterdir()}
    export(run, tmp_path / "bundle", recount=True)
    assert {file: file.read_bytes() for file in run.iterdir()} == files


@pytest.mark.parametrize(
    ("tuned", "settings", "found"),
    [({}, {}, "with an untuned item-kNN term"), (TUNED, {"n_neighbours": 0}, "without item-kNN term")],
)
def test_a_model_without_counts_is_refused(
    tmp_path: Path, tuned: dict[str, Any], settings: dict[str, Any], found: str
) -> None:
    run = make_run(tmp_path, tuned, **settings)
    with pytest.raises(ConfigError, match=f"{found}.*export it without --recount"):
        export(run, tmp_path / "bundle", recount=True)
    assert not (tmp_path / "bundle").exists()


def test_a_data_folder_that_has_lost_events_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, sessions=SESSIONS[:5])
    with pytest.raises(DataError, match=r"20 events .* at least the 24 that training counted"):
        export(run, tmp_path / "bundle", recount=True)


def test_all_sessions_of_a_user_are_counted(tmp_path: Path) -> None:
    """As `missrec etl --session-gap` writes them: with the user's id in several rows, and a session id beside it."""
    users = {"user_id": [f"u{number // 2}" for number in range(12)], "session_id": [0, 1] * 6}
    run = make_run(tmp_path, users=users)
    assert export(run, tmp_path / "bundle", recount=True)["counted_events"] == 48
    assert sorted(ranked(tmp_path / "bundle", [9])[:3]) == [4, 5, 10]


def test_rows_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    """The row of one split cannot be found in the next one: its events would count twice, or not at all."""
    run = make_run(tmp_path, users={"user_id": [f"u{number // 2}" for number in range(12)]})
    with pytest.raises(
        DataError, match=r"test has 12 rows of 6 users or sessions.*one row per user, or a column session_id"
    ):
        export(run, tmp_path / "bundle", recount=True)
