"""Business rules: invalid ones are refused, filters are exact, and k items are returned whenever k pass."""

from __future__ import annotations

import json
import tracemalloc
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from missrec_t4r.bundle.bundle import load_bundle
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ServingError
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.retrieval.explain import BOUGHT_TOGETHER, reasons
from missrec_t4r.retrieval.filters import NO_RULES, ItemColumns, Rules, capped
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.runs.run_folder import LoadedRun
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.transports import translate_errors
from missrec_t4r.serving.triton.backend import RankerBackend
from missrec_t4r.serving.triton.local_server import LocalTriton
from tests.serving import shop

SESSION = np.array([[5, 9, 4]])
ITEMS = range(shop.N_ITEMS)
"""Index in the item table; its row is three more."""
PASSING = {
    '{"in_stock": true}': lambda i: i % 5 != 0,
    '{"in_stock": [true, false]}': lambda i: True,
    '{"brand": "brand 1"}': lambda i: i % 4 == 1,
    '{"brand": ["brand 1", "brand 0", "nobody"]}': lambda i: i % 4 in (0, 1) and i != 4,
    '{"price": {"min": 12, "max": 20.5}}': lambda i: 12 <= 10 + i <= 20.5 and i != 7,
    '{"price": {"max": 17}}': lambda i: i < 7,
    '{"price": {"min": 12, "max": 20}}': lambda i: 2 <= i <= 10 and i != 7,
    '{"stars": {"max": 3}}': lambda i: i % 6 <= 3,
    '{"stars": {"min": 3, "max": 3}}': lambda i: i % 6 == 3,
    '{"stars": [1, 2.0, 2.5]}': lambda i: i % 6 in (1, 2),
    '{"market": "DE"}': lambda i: i % 2 == 1,
    '{"market": ["DE", "FR"]}': lambda i: i % 4 != 0,
    '{"in_stock": true, "market": "DE", "stars": {"min": 3}}': lambda i: i % 5 != 0 and i % 2 == 1 and i % 6 >= 3,
    '{"title": "Ware 3"}': lambda i: i == 3,
}


@pytest.fixture(scope="module", params=[False, True], ids=["as on a CPU", "as on a GPU"])
def ranker(loaded: LoadedRun, request: pytest.FixtureRequest) -> Ranker:
    return Ranker(loaded.model, loaded.catalogue, together=request.param)


@pytest.mark.parametrize("where", PASSING)
def test_filters_let_through_what_they_say_and_every_passing_item_is_answered(ranker: Ranker, where: str) -> None:
    expected = {i + 3 for i in ITEMS if PASSING[where](i)}
    ranking = ranker.rank(SESSION, top_k=100, rules=[Rules.parse(f'{{"where": {where}}}')])
    assert set(ranking.rows[0, : ranking.n_items[0]].tolist()) == expected
    assert ranking.n_passed.tolist() == [len(expected)]
    free = [row for row in ranker.rank(SESSION, top_k=100).rows[0].tolist() if row in expected]
    assert ranking.rows[0, : len(expected)].tolist() == free  # the order is that of the unfiltered ranking
    few = ranker.rank(SESSION, top_k=3, rules=[Rules.parse(f'{{"where": {where}}}')])
    assert few.rows[0, : few.n_items[0]].tolist() == free[:3]


def test_prices_may_be_decimals_and_dates_are_compared_as_unix_seconds() -> None:
    prices = pa.array([Decimal("1.25"), None, Decimal("3.50")], pa.decimal128(6, 2))
    days = pa.array([date(2024, 1, day) for day in (1, 2, 3)])
    stamps = days.cast(pa.timestamp("us", "Europe/Berlin"))
    columns = ItemColumns(pa.table({"price": prices, "day": days, "stamp": stamps}))
    second = datetime(2024, 1, 2, tzinfo=timezone.utc).timestamp()
    for where, expected in [
        ({"price": {"min": 1.25, "max": 2}}, [3]),
        ({"price": [3.5, 9]}, [5]),
        ({"day": {"min": second}}, [4, 5]),
        ({"stamp": {"max": second}}, [3, 4]),
    ]:
        assert np.flatnonzero(columns.passing(Rules.of({"where": where}).where)).tolist() == expected
    assert columns.groups("price").tolist()[3:] == [0, -1, 1]


def test_a_list_matches_by_any_of_its_values_whatever_its_type() -> None:
    sizes = [["s", "m"], None, ["m", "l"]]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 2)):
        columns = ItemColumns(pa.table({"size": pa.array(sizes, kind)}))
        assert np.flatnonzero(columns.passing(Rules.of({"where": {"size": "m"}}).where)).tolist() == [3, 5]
        assert np.flatnonzero(columns.passing(Rules.of({"where": {"size": ["s"]}}).where)).tolist() == [3]


def test_every_session_of_a_batch_has_its_own_rules(ranker: Ranker) -> None:
    rules = [Rules.parse(f'{{"where": {where}}}') for where in PASSING]
    together = ranker.rank(np.repeat(SESSION, len(rules), axis=0), top_k=4, rules=rules)
    for line, own in enumerate(rules):
        alone = ranker.rank(SESSION, top_k=4, rules=[own])
        assert together.rows[line, : alone.n_items[0]].tolist() == alone.rows[0, : alone.n_items[0]].tolist()
        assert together.n_passed[line] == alone.n_passed[0]


def test_allowed_excluded_and_filtered_items_meet(ranker: Ranker) -> None:
    allow = np.array([[7, 8, 9, 10, 2], [0, 0, 0, 0, 0], [2, 0, 0, 0, 0]])
    ranking = ranker.rank(
        np.repeat(SESSION, 3, axis=0), top_k=100, allow=allow, exclude=np.array([[8], [8], [0]]), exclude_seen=True
    )
    assert set(ranking.rows[0, :2].tolist()) == {7, 10}
    assert ranking.n_passed.tolist() == [2, shop.N_ITEMS - 4, 0]  # a list of unknown ids alone allows nothing
    assert ranking.n_items.tolist() == [2, shop.N_ITEMS - 4, 0]


def test_caps_skip_the_third_of_a_brand_and_fill_up_from_below(ranker: Ranker) -> None:
    rules = Rules.parse('{"where": {"in_stock": true}, "at_most": {"brand": 2}}')
    ranking = ranker.rank(SESSION, top_k=8, rules=[rules])
    groups = ranker.columns.groups("brand")
    expected: list[int] = []
    for row in ranker.rank(SESSION, top_k=100, rules=[Rules(rules.where)]).rows[0].tolist():
        if row and (groups[row] < 0 or sum(groups[row] == groups[kept] for kept in expected) < 2):
            expected.append(row)
    assert ranking.rows[0].tolist() == expected[:8]
    assert len(expected) == 9  # four brands twice and one item without a brand
    everything = ranker.rank(SESSION, top_k=100, rules=[rules])
    assert everything.rows[0, : everything.n_items[0]].tolist() == expected
    assert everything.n_passed.tolist() == [24]


def test_a_list_with_caps_is_filled_from_as_deep_as_needed(ranker: Ranker) -> None:
    """Four brands once each and the one item without a brand, wherever that ranks."""
    rules, groups, ranks = Rules.parse('{"at_most": {"brand": 1}}'), ranker.columns.groups("brand"), []
    (alone,) = np.flatnonzero(groups[3:] < 0) + 3
    for row in range(3, shop.N_ITEMS + 3):
        whole = ranker.rank(np.array([[row]]), top_k=100).rows[0].tolist()
        expected = [one for at, one in enumerate(whole) if groups[one] < 0 or groups[one] not in groups[whole[:at]]]
        assert ranker.rank(np.array([[row]]), top_k=5, rules=[rules]).rows[0].tolist() == expected
        ranks.append(whole.index(alone))
    assert max(ranks) > 20 > min(ranks)  # beyond and within the first search


def test_caps_make_the_search_of_other_sessions_no_deeper(ranker: Ranker) -> None:
    rules = [Rules.parse('{"at_most": {"brand": 1}}'), NO_RULES, Rules.parse('{"at_most": {"stars": 1}}')]
    known, nobody, wanted = np.array([[5], [9], [12]]), np.zeros((3, 0), np.int64), np.array([4, 3, 4])
    found = ranker.batches(known, {}, nobody, None, wanted, rules).found
    assert [len(best.rows) for best in found] == [4, 4, 4]
    for line, best in enumerate(found):
        alone = ranker.rank(known[line : line + 1], top_k=4, rules=rules[line : line + 1])
        assert best.rows.tolist() == alone.rows[0].tolist()


@given(
    st.lists(st.integers(-1, 3), min_size=1, max_size=30),
    st.lists(st.integers(-1, 2), min_size=30, max_size=30),
    st.integers(1, 3),
    st.integers(1, 12),
)
@settings(max_examples=100, deadline=None)
def test_caps_keep_the_best_that_keep_to_them(brand: list[int], colour: list[int], cap: int, k: int) -> None:
    groups = [(np.array(brand), cap), (np.array(colour), 2)]
    kept = capped(range(len(brand)), groups, k)
    for values, most in groups:
        chosen = [int(values[place]) for place in kept if values[place] >= 0]
        assert max((chosen.count(value) for value in chosen), default=0) <= most
    for place in range(kept[-1] if len(kept) == k else len(brand)):
        if place not in kept:  # a skipped item was over a cap when its turn came
            before = [one for one in kept if one < place]
            assert any(
                values[place] >= 0 and sum(values[one] == values[place] for one in before) == most
                for values, most in groups
            )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "rules are not JSON"),
        (b"\xff\xfe", "rules are not JSON"),
        ("[" * 10_000, "rules are not JSON"),
        ("[]", "rules hold list"),
        ('{"wher": {}}', "wher"),
        ('{"where": []}', "not an object"),
        ('{"where": {"price": {"min": NaN}}}', "NaN is not JSON"),
        ('{"where": {"price": {"low": 3}}}', "min, max or both"),
        ('{"where": {"price": {"min": 3, "max": 2}}}', "min not above max"),
        ('{"where": {"price": {"max": 1' + "0" * 400 + "}}}", "too large"),
        ('{"where": {"price": null}}', "a value, a list of values"),
        ('{"where": {"brand": []}}', "a value, a list of values"),
        ('{"where": {"brand": [["x"]]}}', "a value, a list of values"),
        ('{"at_most": {"brand": 0}}', "at least 1"),
        ('{"at_most": {"brand": true}}', "at least 1"),
        ('{"where": {"colour": "red"}}', "no column 'colour'"),
        ('{"where": {"in_stock": 1}}', "values of the column's type, bool"),
        ('{"where": {"price": "cheap"}}', "values of the column's type, double"),
        ('{"where": {"brand": {"min": 1}}}', "numbers, for min and max"),
        ('{"where": {"brand": "\\ud800"}}', "cannot hold"),
        ('{"where": {"stars": 9999999999999999999}}', "cannot hold"),
        ('{"at_most": {"market": 2}}', "one value per item"),
        (" " * 70_000, "at most 65536"),
    ],
)
def test_bad_rules_are_refused_in_words(ranker: Ranker, text: str, words: str) -> None:
    with pytest.raises(ServingError, match=words):
        ranker.columns.check(Rules.parse(text))


def test_filters_are_kept_only_as_far_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys count as masks do: a filter may list thousands of values, and a small catalogue has small masks."""
    monkeypatch.setattr("missrec_t4r.retrieval.filters._CACHED_BYTES", 100_000)
    columns = ItemColumns(pa.table({"item_id": ["a", "b", "c"], "n": [1, 2, 3]}))
    tracemalloc.start()
    for number in range(500):
        wanted = [2, *range(1000 * number + 10, 1000 * number + 600)]
        mask = columns.passing(Rules.of({"where": {"n": wanted}}).where)
        assert np.flatnonzero(mask).tolist() == [4]
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 300_000
    for value in (1, 2, 3, 1):
        mask = columns.passing(Rules.of({"where": {"n": value}}).where)
        assert np.flatnonzero(mask).tolist() == [value + 2]


def test_a_filter_that_repeats_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ItemColumns(pa.table({"item_id": ["a", "b"], "n": [1, 2]}))
    wanted = Rules.of({"where": {"n": [2, 1]}}).where
    first = columns.passing(wanted)
    monkeypatch.setattr(ItemColumns, "_mask", None)  # computing it would fail
    assert np.array_equal(columns.passing(Rules.of({"where": {"n": [1, 2]}}).where), first)


def test_reasons_name_the_item_without_which_the_score_is_lowest(ranker: Ranker, loaded: LoadedRun) -> None:
    """Of all items in several sessions: the terms and the sharpness of the votes decide here and there."""
    rng, n = np.random.default_rng(3), shop.N_ITEMS
    for session in [SESSION, *(rng.choice(np.arange(3, n + 3), (1, 4), replace=False) for _ in range(12))]:
        given = ranker.rank(session, top_k=n).rows[0]
        items, modalities = reasons(ranker, session, given)
        own = session[0].tolist()
        with torch.inference_mode():
            tokens = loaded.model.candidates()
            rests = torch.tensor([[row for row in own if row != left] for left in own])
            scores = loaded.model.score(loaded.model(rests), tokens, rests)[:, given].numpy()  # [left out, item]
            votes = torch.einsum("d,mnd->mn", loaded.model(torch.from_numpy(session))[0], tokens.modality[:, given])
            logits = (loaded.model.fusion.phi * votes).masked_fill(~tokens.mask[:, given], -torch.inf)
        chosen = scores[[own.index(item) for item in items], np.arange(n)]
        np.testing.assert_allclose(chosen, scores.min(0), atol=1e-6)
        by_modality = modalities != BOUGHT_TOGETHER
        assert modalities[by_modality].tolist() == logits.argmax(0)[by_modality].tolist()
    alone, _ = reasons(ranker, np.array([[7]]), given)
    assert set(alone.tolist()) == {7}
    assert reasons(ranker, np.array([[2, 0]]), given)[0].tolist() == [0] * n


def test_what_co_occurrence_recommends_is_bought_together(bundle: Path) -> None:
    """Row 20 was bought with row 5 and nothing else: with a large weight of the term it is the reason, else never."""
    loaded = load_bundle(bundle)
    term = terms_of(loaded.model).item_knn
    assert term is not None
    term.fit(Sessions.from_lists([[5, 20]] * 9), 5)
    ranker, given, session = Ranker(loaded.model, loaded.catalogue), np.array([20, 11]), np.array([[7, 5]])
    found = {}
    for weight in (0.0, 1000.0):
        term.choose(term.chosen._replace(weight=weight))
        items, why = reasons(ranker, session, given)
        assert reasons(ranker, np.array([[5]]), given)[1][0] == (BOUGHT_TOGETHER if weight else why[0])
        found[weight] = items[0], why[0] == BOUGHT_TOGETHER, why[1] == BOUGHT_TOGETHER
    assert found[1000.0] == (5, True, False)
    assert found[0.0][1:] == (False, False)


@pytest.mark.triton
def test_rules_on_the_wire(server: LocalTriton, bundle: object, loaded: LoadedRun, ranker: Ranker) -> None:
    catalogue = loaded.catalogue
    raw = [item.encode() for item in catalogue.ids_of(np.array([5, 9, 4]))]
    base = {"item_ids": np.array([raw, raw], object), "length": np.array([[3], [3]], np.int32)}
    base["top_k"] = np.array([[6], [6]], np.int32)
    text = json.dumps({"where": {"in_stock": True, "price": {"max": 30}}, "at_most": {"brand": 2}})
    banned = catalogue.ids_of(np.array([11]))[0].encode()
    extra = {
        "rules": np.array([[text.encode()], [b""]], object),
        "exclude": np.array([[banned, b""], [b"nobody", b""]], object),
        "reasons": np.array([[True], [False]]),
    }
    names = ("item_id", "n_items", "n_passed", "catalogue_version", "reason_item", "reason_modality")
    with MISSRecClient(server.grpc_url) as client, translate_errors(client.url, "missrec", 10):
        answer = client._transport.infer("missrec", base | extra, names)
        bad = extra | {"rules": np.array([[b'{"where": {"colour": "red"}}'], [b""]], object)}
        with pytest.raises(ServingError, match="no column 'colour'"), translate_errors(client.url, "missrec", 10):
            client._transport.infer("missrec", base | bad, names)
        only = client._transport.infer("missrec", base | {"allow": np.array([[raw[0]], [b""]], object)}, names)
    expected = ranker.rank(
        np.repeat(SESSION, 2, axis=0), top_k=6, rules=[Rules.parse(text), Rules()], exclude=np.array([[11], [0]])
    )
    for line in range(2):
        rows = expected.rows[line, : expected.n_items[line]]
        served = [item.decode() for item in answer["item_id"][line, : answer["n_items"][line, 0]]]
        assert served == catalogue.ids_of(rows)
    assert answer["n_passed"][:, 0].tolist() == expected.n_passed.tolist()
    items, modalities = reasons(ranker, SESSION, expected.rows[0])
    assert [item.decode() for item in answer["reason_item"][0]] == catalogue.ids_of(items)
    names_of = [*catalogue.modalities, "bought together", "id"]
    assert [one.decode() for one in answer["reason_modality"][0]] == [names_of[index] for index in modalities]
    assert set(answer["reason_item"][1].tolist()) == set(answer["reason_modality"][1].tolist()) == {b""}
    assert only["n_items"].tolist() == [[1], [6]]
    assert answer["catalogue_version"][0, 0].decode() == RankerBackend(bundle).catalogue_version  # type: ignore[arg-type]
