"""The search of a GPU, run on a CPU: it finds what scoring everything finds, and waits for one result per round."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from missrec_t4r.errors import ServingError
from missrec_t4r.retrieval import device_search
from missrec_t4r.retrieval.device_search import DeviceItems, exact_products, search_together, sessions_with_room, upload
from missrec_t4r.retrieval.filters import Rules
from missrec_t4r.retrieval.packed_scores import PackedItems, pack_items
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.retrieval.topk import Query
from missrec_t4r.runs.run_folder import LoadedRun
from tests.device.second_device import second_device
from tests.serving import shop
from tests.serving.test_retrieval import catalogue, everything, fusion_of, fusions, query_of, same, shops

CPU = torch.device("cpu")


@pytest.fixture(params=["as it is", "in small parts"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks, chunks and parts of a few rows: what a large catalogue has, in a small one."""
    if request.param == "in small parts":
        parts = {"_SCANNED": 64, "_ADDRESSED": 300, "_GATHERED": 700, "_CANDIDATE_BYTES": 9000}
        for name, value in {"BLOCK": 4, "SPARE": 0, "_WIDER": 2, **parts}.items():
            monkeypatch.setattr(device_search, name, value)
    return str(request.param)


@given(
    shops,
    fusions,
    st.sampled_from([-6.0, 0.0, 0.7, 60.0]),
    st.integers(1, 60),
    st.sampled_from([0, 0.1, 1]),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_finds_what_scoring_everything_finds(
    sizes: str,
    shape: tuple[int, int, int, bool, int],
    name: str,
    phi: float,
    k: int,
    share: float,
    dtype: torch.dtype,
) -> None:
    candidates = catalogue(*shape)
    query = query_of(shape[0], candidates, 4, share)
    with torch.inference_mode():
        table = pack_items(fusion_of(name, phi, shape[1]), candidates)
        found, passed = search_together(DeviceItems.place(table, CPU, dtype), query, k)
        assert same(found, everything(table, query, k))
    assert passed == query.allowed.sum(1).tolist()


@given(shops, fusions, st.sampled_from([-6.0, 0.0, 3.0, 60.0]), st.sampled_from([torch.float16, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_no_score_is_further_from_the_scan_than_its_error(
    shape: tuple[int, int, int, bool, int], name: str, phi: float, dtype: torch.dtype
) -> None:
    candidates = catalogue(*shape)
    query = query_of(shape[0], candidates, 4, 1.0)
    with torch.inference_mode():
        table = pack_items(fusion_of(name, phi, shape[1]), candidates)
        scores, maxima, error = DeviceItems.place(table, CPU, dtype).scan(query)
        rows = torch.arange(table.n_rows).expand(4, -1)
        exact = (table.exact(query.vectors, rows) + query.added).float()
        off = (scores[:, : table.n_rows] - exact).abs()[query.allowed]
        assert bool((off <= error.expand(-1, table.n_rows)[query.allowed]).all())
        assert bool((scores[:, table.n_rows :] == -torch.inf).all())
        assert torch.equal(maxima, scores.unflatten(1, (-1, device_search.BLOCK)).amax(2))
        assert float(error.max()) < (0.004 if dtype == torch.float16 else 0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_of_a_scan_counts_every_rounding(dtype: torch.dtype) -> None:
    """In one dimension session, token and product are rounded, and some token errs by almost the sum of the three."""
    n = 20_000
    tokens = torch.linspace(0.5, 1, n).unsqueeze(1)
    rows = torch.arange(n)
    table = PackedItems(tokens, rows[None], torch.zeros(1, n, dtype=torch.int64), rows[:0], torch.zeros(n))
    unit = torch.finfo(dtype).eps / 4  # half of the distance of two numbers between a half and one
    session = torch.tensor([[0.75 + 0.95 * unit]])
    query = Query(session, torch.zeros(1, n), torch.ones(1, n, dtype=torch.bool))
    scores, _, error = DeviceItems.place(table, CPU, dtype).scan(query)
    off = (scores[:, :n] - (session @ tokens.T)).abs().max()
    assert 0.75 * error < off <= error


@pytest.mark.parametrize("alike", [torch.zeros, torch.rand])
def test_sessions_with_more_ties_than_candidates_are_searched_again(
    alike: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hundreds of items with one score, or scores that differ by less than 16 bits show: the lowest rows win ties."""
    monkeypatch.setattr(device_search, "SPARE", 2)
    draw = torch.Generator().manual_seed(0)
    candidates = catalogue(3, 400, 2, True, 2)
    centre = torch.nn.functional.normalize(torch.randn(candidates.modality.shape[-1], generator=draw), dim=0)
    near = centre + 1e-5 * alike(400, len(centre))
    candidates = candidates._replace(modality=torch.stack([near, near]), ids=near)
    query = query_of(3, candidates, 5, 1.0)
    read: list[int] = []
    once = DeviceItems.candidates
    monkeypatch.setattr(
        DeviceItems, "candidates", lambda self, part, k, width: read.append(width) or once(self, part, k, width)
    )
    with torch.inference_mode():
        table = pack_items(fusion_of("dynamic_shared", 2.0, 400), candidates)
        found, _ = search_together(DeviceItems.place(table, CPU), query, 7)
        assert same(found, everything(table, query, 7))
    assert read == [16, 128, 400]


@pytest.mark.parametrize("batch", [1, 4])
def test_no_product_reads_more_numbers_than_cublas_addresses(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_search, "_ADDRESSED", 1 << 14)
    n_rows, dim = 5_000, 20
    tokens = torch.nn.functional.normalize(torch.randn(n_rows, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    rows = torch.arange(n_rows)
    table = PackedItems(tokens, rows[None], torch.zeros(1, n_rows, dtype=torch.int64), rows[:0], torch.zeros(n_rows))
    query = Query(tokens[:batch], torch.zeros(batch, n_rows), torch.ones(batch, n_rows, dtype=torch.bool))
    items, read = DeviceItems.place(table, CPU), list[int]()
    fused = DeviceItems._fused
    monkeypatch.setattr(
        DeviceItems,
        "_fused",
        lambda self, session, part: read.append(self.rough[0, part].numel()) or fused(self, session, part),
    )
    (first, *_), _ = search_together(items, query, 3)
    assert first.rows[0] == 0
    assert sum(read) == items.rough.numel()
    assert max(read) <= 1 << 14


@pytest.mark.parametrize("room", [1, 1 << 30])
def test_candidates_of_many_sessions_take_bounded_memory(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions that need all items as candidates: as many at a time as their memory allows."""
    monkeypatch.setattr(device_search, "_CANDIDATE_BYTES", room)
    table = PackedItems(
        torch.zeros(400, 8),
        torch.arange(400)[None],
        torch.zeros(1, 400, dtype=torch.int64),
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(400),
    )
    query = Query(torch.zeros(5, 8), torch.zeros(5, 400), torch.ones(5, 400, dtype=torch.bool))
    sizes: list[int] = []
    once = DeviceItems.candidates
    monkeypatch.setattr(
        DeviceItems,
        "candidates",
        lambda self, part, k, width: sizes.append(len(part.vectors)) or once(self, part, k, width),
    )
    found, _ = search_together(DeviceItems.place(table, CPU), query, 3)
    assert [one.rows.tolist() for one in found] == [[0, 1, 2]] * 5
    assert set(sizes) == ({1} if room == 1 else {5})


@pytest.mark.parametrize("batch", [1, 64])
def test_the_ranker_answers_as_on_a_cpu(loaded: LoadedRun, batch: int) -> None:
    rng = np.random.default_rng(batch)
    rows = shop.padded([rng.integers(0, loaded.catalogue.n_rows, rng.integers(0, 12)) for _ in range(batch)])
    plain = Ranker(loaded.model, loaded.catalogue)
    together = Ranker(loaded.model, loaded.catalogue, together=True, batch_size=50)
    texts = ["", '{"where": {"in_stock": true}}', '{"where": {"price": {"max": 20}}, "at_most": {"brand": 2}}']
    asked: dict[str, Any] = {
        "top_k": rng.integers(1, 40, batch),
        "exclude_seen": rng.random(batch) < 0.5,
        "exclude": rng.integers(0, loaded.catalogue.n_rows, (batch, 3)),
        "allow": rng.integers(3, loaded.catalogue.n_rows, (batch, 20)) * (rng.random((batch, 1)) < 0.3),
        "rules": [Rules.parse(texts[number]) for number in rng.integers(0, 3, batch)],
    }
    expected, found = plain.rank(rows, **asked), together.rank(rows, **asked)
    assert found.rows.tolist() == expected.rows.tolist()
    assert found.n_items.tolist() == expected.n_items.tolist()
    assert found.n_passed.tolist() == expected.n_passed.tolist()
    assert found.fallback.tolist() == expected.fallback.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)


def test_sessions_that_are_searched_again_are_counted(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """For `missrec_widened_searches_total`, on a GPU as on a CPU."""
    monkeypatch.setattr(device_search, "SPARE", 0)
    ranker, rows = Ranker(loaded.model, loaded.catalogue, together=True), np.array([[5, 6], [7, 0], [8, 9]])
    ranker.rank(rows, top_k=3)
    certain = ranker.search.widenings
    monkeypatch.setattr(DeviceItems, "_error", lambda self, vectors, rough: torch.full((len(vectors), 1), 1e3))
    ranker.rank(rows, top_k=3)
    assert (certain, ranker.search.widenings) == (0, 3)


def test_a_filter_is_uploaded_once_and_the_oldest_leaves(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded = list[int]()
    monkeypatch.setattr("missrec_t4r.retrieval.filters._CACHED_BYTES", 2 * (loaded.catalogue.n_rows + 400))
    ranker = Ranker(loaded.model, loaded.catalogue, together=True)
    passing = ranker.columns.passing
    monkeypatch.setattr(ranker.columns, "passing", lambda where: uploaded.append(min(where[0][1])) or passing(where))
    for stars in (1, 2, 3, 2, 3, 1):
        ranker.rank(np.array([[5]]), rules=[Rules.of({"where": {"stars": stars}})])
    assert uploaded == [1, 2, 3, 1]


def test_uploaded_arrays_keep_their_types_and_shapes() -> None:
    arrays = [
        np.arange(6).reshape(2, 3),
        np.array([True, False, True]),
        np.zeros((0, 2), np.float32),
        np.float32([1.5]),
    ]
    for one, array in zip(upload(arrays, CPU), arrays, strict=True):
        assert one.numpy().dtype == array.dtype
        assert one.tolist() == array.tolist()


def test_a_card_without_room_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    table, card = pack_items(fusion_of("static", 0.0, 150), catalogue(4, 150, 2, True, 2)), torch.device("cuda", 0)
    needed = DeviceItems.bytes_needed(table, card)
    free = [needed + device_search.RESERVED + 10 * 24 * 150]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    assert sessions_with_room(table, card, 64) == 10
    assert sessions_with_room(table, card, 4) == 4
    free[0] = needed + 24 * 150
    assert sessions_with_room(table, card, 64) == 1
    free[0] = 0
    with pytest.raises(ServingError, match=r"cuda:0 has 0.00 GiB free.*GiB more.*KIND_CPU"):
        sessions_with_room(table, card, 64)


def test_a_card_without_room_for_the_model_is_refused_before_anything_is_moved(
    loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded.model
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with second_device():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size - 1, 1 << 40))
        with pytest.raises(ServingError, match=r"cuda:0 has .* GiB free for a catalogue .*; expected: .* GiB more"):
            Ranker(model, loaded.catalogue, device="cuda:0")
        assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_the_current_gpu_is_one_of_them(loaded: LoadedRun) -> None:
    """Tensors on ``cuda`` are on ``cuda:0``: what lies there is not counted as something to be moved."""
    with second_device():
        ranker = Ranker(loaded.model, loaded.catalogue, device="cuda")
        assert ranker.device == torch.device("cuda", 0)
        assert ranker.device == ranker.table.tokens.device


SWITCHES = [
    lambda: torch.set_float32_matmul_precision("high"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", True),
    lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    lambda: setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", True),
]
"""What users set, the last two with a newer torch alone."""


def _switches() -> dict[str, object]:
    names = ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation", "fp32_precision")
    found = {name: getattr(torch.backends.cuda.matmul, name, None) for name in names}
    with suppress(RuntimeError):  # torch refuses to say it where `fp32_precision` was set
        found["precision"] = torch.get_float32_matmul_precision()
    return found


@pytest.mark.parametrize("switch", SWITCHES if hasattr(torch.backends.cuda.matmul, "fp32_precision") else SWITCHES[:3])
def test_products_are_exact_within_a_search_and_as_before_after_it(switch: Callable[[], None]) -> None:
    try:
        switch()
        before = _switches()
        with exact_products():
            within = _switches()
            with exact_products():
                pass
            assert _switches() == within
        assert _switches() == before
        assert within["precision"] == "highest"
        assert within["fp32_precision"] in (None, "none", "ieee")
        assert not within["allow_fp16_reduced_precision_reduction"]
        assert not within["allow_fp16_accumulation"]
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
        if hasattr(torch.backends.cuda.matmul, "allow_fp16_accumulation"):
            torch.backends.cuda.matmul.allow_fp16_accumulation = False


def test_products_are_exact_until_the_last_thread_has_left() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        first, second = exact_products(), exact_products()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "highest"
        second.__exit__(None, None, None)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_encoding_and_ranking_on_a_gpu_multiply_exactly(loaded: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, session vectors and terms too: TF32 would move scores by a thousandth."""
    seen: list[str] = []
    linear = torch.nn.functional.linear

    def noted(*given: Any) -> torch.Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return linear(*given)

    monkeypatch.setattr(torch.nn.functional, "linear", noted)
    torch.set_float32_matmul_precision("high")
    try:
        ranker = Ranker(loaded.model, loaded.catalogue, together=True)
        made = len(seen)
        ranker.rank(np.array([[5, 6]]))
        ranked = len(seen)
        ranker.encode(np.array([[5, 6]]))
        assert 0 < made < ranked < len(seen)
        assert set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision("highest")
