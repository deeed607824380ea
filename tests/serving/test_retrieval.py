"""Exact retrieval returns the result of scoring everything: any phi, missing modalities, IDs, filters and ties."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from missrec_t4r.evaluation.full_ranking import top_items
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from missrec_t4r.retrieval import topk as retrieval
from missrec_t4r.retrieval.index_file import RetrievalIndex, check_index, write_tables
from missrec_t4r.retrieval.int8_bounds import quantise, steepness
from missrec_t4r.retrieval.packed_scores import PackedItems, fuse, pack_items
from missrec_t4r.retrieval.ranker import Ranker
from missrec_t4r.retrieval.topk import Found, Query, scan_bounds, search
from missrec_t4r.runs.run_folder import LoadedRun
from tests.serving import shop

DIM = 40


def catalogue(seed: int, n_rows: int, n_modalities: int, with_ids: bool, rank: int) -> CandidateEmbeddings:
    """Tokens near a few directions; some rows repeat others to the bit, some lack modalities, some lack everything."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(n_rows, rank, generator=draw) @ torch.randn(rank, DIM, generator=draw)
    noise = torch.randn(n_modalities, n_rows, DIM, generator=draw)
    copies = torch.randint(0, n_rows, (n_rows // 3,), generator=draw)
    mask = torch.rand(n_modalities, n_rows, generator=draw) < 0.7
    tokens = F.normalize(base + 0.3 * noise + 0.5, dim=-1)
    ids = F.normalize(torch.randn(n_rows, DIM, generator=draw), dim=-1)
    id_mask = torch.rand(n_rows, generator=draw) < 0.6
    for part in (tokens, mask):
        part[:, : len(copies)] = part[:, copies]
    ids[: len(copies)], id_mask[: len(copies)] = ids[copies], id_mask[copies]
    tokens = tokens * mask.unsqueeze(-1)
    return CandidateEmbeddings(tokens, mask, ids if with_ids else None, id_mask if with_ids else None)


def fusion_of(name: str, phi: float, n_rows: int) -> CandidateFusion:
    fusion = CandidateFusion(name, n_rows)  # type: ignore[arg-type]
    if fusion.phi is not None:
        with torch.no_grad():
            fusion.phi.fill_(phi)
            if name == "dynamic_instance":
                fusion.phi.add_(torch.linspace(-2, 2, n_rows))
    return fusion


def query_of(seed: int, candidates: CandidateEmbeddings, batch: int, share: float) -> Query:
    draw = torch.Generator().manual_seed(seed + 1)
    n_rows = candidates.mask.shape[1]
    usable = candidates.mask.any(0) if candidates.id_mask is None else candidates.mask.any(0) | candidates.id_mask
    vectors = F.normalize(torch.randn(batch, DIM, generator=draw) + candidates.modality[0, :batch], dim=-1)
    vectors[0] = 0  # a session without known items: only what is added counts
    added = torch.zeros(batch, n_rows)
    touched = torch.randint(0, n_rows, (batch, 5), generator=draw)
    added.scatter_(1, touched, torch.randn(batch, 5, generator=draw))
    return Query(vectors, added, usable & (torch.rand(batch, n_rows, generator=draw) < share))


def everything(table: PackedItems, query: Query, k: int) -> list[tuple[list[float], list[int]]]:
    rows = torch.arange(table.n_rows).expand(len(query.vectors), -1)
    scores = (table.exact(query.vectors, rows) + query.added).float().masked_fill(~query.allowed, -torch.inf)
    best, found = top_items(scores, k)
    kept = torch.isfinite(best)
    return [(one[real].tolist(), row[real].tolist()) for one, row, real in zip(best, found, kept)]


def same(found: list[Found], expected: list[tuple[list[float], list[int]]]) -> bool:
    return [(one.scores.tolist(), one.rows.tolist()) for one in found] == expected


shops = st.tuples(
    st.integers(0, 10**6), st.integers(6, 150), st.integers(1, 3), st.booleans(), st.sampled_from([2, DIM])
)
fusions = st.sampled_from(["static", "dynamic_shared", "dynamic_instance"])


@pytest.fixture(params=["together", "alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Search a batch at once, or one session after the other as large catalogues are, in rounds of a few items."""
    if request.param == "alone":
        for name, value in (("_TOGETHER", 0), ("_BLOCK", 4), ("_ROUND", 16), ("_FEW", 8)):
            monkeypatch.setattr(retrieval, name, value)
    return str(request.param)


@given(
    shops, fusions, st.sampled_from([-6.0, -0.5, 0.0, 0.7, 5.0, 60.0]), st.integers(1, 60), st.sampled_from([0, 0.1, 1])
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_certified_search_equals_scoring_everything(
    way: str, shape: tuple[int, int, int, bool, int], name: str, phi: float, k: int, share: float
) -> None:
    candidates = catalogue(*shape)
    fusion, query = fusion_of(name, phi, shape[1]), query_of(shape[0], candidates, 4, share)
    with torch.inference_mode():
        table = pack_items(fusion, candidates)
        torch.testing.assert_close(table.scan(query.vectors), fusion(query.vectors, candidates), atol=2e-6, rtol=0)
        expected = everything(table, query, k)
        for bounds in (scan_bounds(table, query), quantise(table).bounds(table, query)):
            assert same(search(table, query, bounds, k), expected)


@given(shops, st.sampled_from([-6.0, 0.0, 3.0, 60.0]))
@settings(max_examples=60, deadline=None)
def test_no_score_exceeds_its_bound(shape: tuple[int, int, int, bool, int], phi: float) -> None:
    candidates = catalogue(*shape)
    query = query_of(shape[0], candidates, 4, 1.0)
    with torch.inference_mode():
        table = pack_items(fusion_of("dynamic_shared", phi, shape[1]), candidates)
        rows = torch.arange(table.n_rows).expand(4, -1)
        scores = (table.exact(query.vectors, rows) + query.added).masked_fill(~query.allowed, -torch.inf)
        for bounds in (scan_bounds(table, query), quantise(table).bounds(table, query)):
            assert bool((bounds >= scores).all())


@given(
    st.lists(st.floats(-40, 40), min_size=2, max_size=5),
    st.floats(-30, 30),
    st.lists(st.floats(-1, 1), min_size=5, max_size=5),
)
@settings(max_examples=300, deadline=None)
def test_a_fused_score_errs_by_no_more_than_its_steepness(votes: list[float], phi: float, off: list[float]) -> None:
    v = torch.tensor(votes, dtype=torch.float64)[:, None, None]
    d = 1e-4 * torch.tensor(off[: len(votes)], dtype=torch.float64)[:, None, None]
    present, sharp = torch.ones_like(v, dtype=torch.bool), torch.tensor(phi, dtype=torch.float64)
    moved = (fuse(v + d, present, sharp) - fuse(v, present, sharp)).abs()
    assert float(moved) <= steepness(len(votes)) * float(d.abs().max()) + 1e-12


def test_the_steepness_of_two_votes_is_that_of_a_sigmoid() -> None:
    x = torch.linspace(0, 30, 1_000_001, dtype=torch.float64)
    w = torch.sigmoid(x)
    assert abs(1 + float((2 * x * w * (1 - w)).max()) - steepness(2)) < 2e-4


def test_chunks_and_threads_change_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = catalogue(5, 150, 2, True, 5)
    table, query = pack_items(fusion_of("dynamic_shared", 2.0, 150), candidates), query_of(5, candidates, 3, 1.0)
    with torch.inference_mode():
        table_in_bytes = quantise(table)
        whole = table_in_bytes.bounds(table, query)
        monkeypatch.setattr("missrec_t4r.retrieval.int8_bounds.CHUNK", 17)
        for threads in (1, 2):
            torch.testing.assert_close(table_in_bytes.bounds(table, query, threads), whole, atol=4e-3, rtol=0)


@pytest.mark.parametrize(("n_modalities", "name"), [(1, "static"), (2, "dynamic_shared"), (3, "dynamic_instance")])
def test_tables_written_in_parts_and_mapped_answer_as_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_modalities: int, name: str
) -> None:
    monkeypatch.setattr("missrec_t4r.retrieval.index_file.CHUNK", 50)  # the last part overlaps the one before
    monkeypatch.setattr("missrec_t4r.retrieval.index_file.SAMPLE", 40)
    candidates, fusion = catalogue(6, 120, n_modalities, True, 5), fusion_of(name, 2.0, 120)
    query = query_of(6, candidates, 3, 1.0)

    def part(rows: torch.Tensor) -> PackedItems:
        ids, id_mask = (None if one is None else one[rows] for one in candidates[2:])
        own = CandidateEmbeddings(candidates.modality[:, rows], candidates.mask[:, rows], ids, id_mask)
        return pack_items(fusion, own, rows)

    with torch.inference_mode():
        table = pack_items(fusion, candidates)
        write_tables(tmp_path / "tables.safetensors", replace(table, tokens=table.tokens[:, :0]), part)
        mapped = RetrievalIndex.load(tmp_path / "tables.safetensors")
        check_index(tmp_path / "tables.safetensors", 120, DIM, n_modalities)
        for field in ("tokens", "place", "modality", "several", "phi"):
            assert torch.equal(getattr(mapped.table, field), getattr(table, field)), field
        found = search(mapped.table, query, mapped.quantised.bounds(mapped.table, query), 9)
        assert same(found, everything(table, query, 9))


def test_an_items_score_depends_neither_on_its_place_nor_on_its_batch() -> None:
    candidates = catalogue(7, 90, 2, True, 5)
    moved = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    fusion, query = fusion_of("dynamic_shared", 2.0, 90), query_of(7, candidates, 8, 1.0)
    with torch.inference_mode():
        one = pack_items(fusion, candidates)
        other = pack_items(
            fusion,
            CandidateEmbeddings(
                *(part[:, moved] for part in candidates[:2]), *(part[moved] for part in candidates[2:])
            ),  # type: ignore[index]
        )
        rows = torch.arange(90).expand(8, -1)
        whole = one.exact(query.vectors, rows).float()
        assert torch.equal(other.exact(query.vectors, rows).float(), whole[:, moved])
        for line in range(8):
            single = one.exact(query.vectors[line : line + 1], rows[:1, 7:9]).float()
            assert torch.equal(single[0], whole[line, 7:9])


def test_the_ranker_takes_the_certified_search_by_itself_and_answers_the_same(loaded: LoadedRun) -> None:
    plain = Ranker(loaded.model, loaded.catalogue)
    large = Ranker(loaded.model, loaded.catalogue, certified_from=10)
    assert plain.search.quantised is None
    assert large.search.quantised is not None
    rows = shop.padded(
        [torch.randint(1, 33, (1 + i % 8,), generator=torch.Generator().manual_seed(i)).numpy() for i in range(40)]
    )
    for k in (1, 5, 100):
        expected, found = plain.rank(rows, top_k=k, exclude_seen=True), large.rank(rows, top_k=k, exclude_seen=True)
        assert found.rows.tolist() == expected.rows.tolist()
        assert found.scores.tolist() == expected.scores.tolist()
