"""Candidate fusion against the reference, and its published special cases with the arithmetic beside them."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings
from tests import shop
from tests.equations import reference as ref
from tests.equations import translate

ROWS, DIM = 8, 6


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(ref.unit(np.random.default_rng(seed).normal(size=shape)))


def tokens(*, ids: bool, n_modalities: int = 2) -> CandidateEmbeddings:
    """Row 4 lacks the last modality, row 5 the first, row 6 all of them; rows 4 and 7 have no trained ID."""
    mask = torch.ones(n_modalities, ROWS, dtype=torch.bool)
    mask[-1, 4] = mask[0, 5] = mask[:, 6] = False
    mask[:, :3] = False
    trained = torch.tensor([False, False, False, True, False, True, True, False])
    modality = unit(n_modalities, ROWS, DIM, seed=1)
    return CandidateEmbeddings(modality, mask, unit(ROWS, DIM, seed=2) if ids else None, trained if ids else None)


def as_items(candidates: CandidateEmbeddings) -> ref.Items:
    mask = candidates.mask.numpy()
    trained = np.zeros(ROWS, bool) if candidates.id_mask is None else candidates.id_mask.numpy()
    ids = None if candidates.ids is None else candidates.ids.numpy()
    return ref.Items(candidates.modality.numpy(), mask, mask, ids, trained)


@pytest.mark.parametrize("n_modalities", [1, 2, 3])
@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", ["static", "dynamic_shared", "dynamic_instance"])
def test_fused_scores(name: str, ids: bool, n_modalities: int) -> None:
    candidates, session = tokens(ids=ids, n_modalities=n_modalities), unit(4, DIM, seed=3)
    fusion = CandidateFusion(name, ROWS).double()  # type: ignore[arg-type]
    phi = None
    if fusion.phi is not None:
        phi = np.array([2.5]) if name == "dynamic_shared" else np.linspace(-3, 3, ROWS)
        fusion.phi.data = torch.from_numpy(phi)
    found = fusion(session, candidates).detach().numpy()
    expected = np.stack([ref.fused_scores(s, as_items(candidates), phi) for s in session.numpy()])
    scored = np.isfinite(expected)
    np.testing.assert_allclose(found[scored], expected[scored], rtol=0, atol=1e-10)
    assert not found[:, :3].any(), "a row with neither modality nor ID scores 0 until the model masks it"
    has_something = candidates.mask.any(0) | (candidates.id_mask if candidates.id_mask is not None else False)
    assert scored.all(0).tolist() == has_something.tolist()


def test_phi_starts_as_the_mean() -> None:
    candidates, session = tokens(ids=True), unit(4, DIM, seed=3)
    static = CandidateFusion("static", ROWS)(session, candidates)
    for name in ("dynamic_shared", "dynamic_instance"):
        torch.testing.assert_close(
            CandidateFusion(name, ROWS).double()(session, candidates), static, rtol=0, atol=1e-12
        )  # type: ignore[arg-type]


def test_by_hand() -> None:
    # session along x; text token along x: cosine 1; image token along y: cosine 0; ID at 60 degrees: cosine .5
    modality = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64)
    ids = torch.tensor([[0.5, math.sqrt(0.75)]], dtype=torch.float64)
    session = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    candidates = CandidateEmbeddings(modality, torch.ones(2, 1, dtype=torch.bool), ids, torch.tensor([True]))
    fusion = CandidateFusion("dynamic_shared", 1).double()
    assert fusion.phi is not None
    fusion.phi.data[:] = math.log(3)  # weights 3 : 1, fused .75
    assert fusion(session, candidates).item() == pytest.approx((0.5 + 2 * 0.75) / 3)
    without_image = candidates._replace(mask=torch.tensor([[True], [False]]))
    assert fusion(session, without_image).item() == pytest.approx((0.5 + 2 * 1.0) / 3)
    assert fusion(session, candidates._replace(id_mask=torch.tensor([False]))).item() == pytest.approx(0.75)


@pytest.mark.parametrize("phi", [-40.0, 0.0, 7.0, 60.0])
def test_a_fused_score_is_between_the_smallest_and_the_largest_vote(phi: float) -> None:
    candidates, session = tokens(ids=False, n_modalities=3), unit(50, DIM, seed=3)
    fusion = CandidateFusion("dynamic_shared", ROWS).double()
    assert fusion.phi is not None
    fusion.phi.data[:] = phi
    votes = torch.einsum("bd,mnd->mbn", session, candidates.modality)[..., [3, 7]]
    fused = fusion(session, candidates)[:, [3, 7]]
    assert (fused <= votes.amax(0) + 1e-12).all()
    assert (fused >= votes.amin(0) - 1e-12).all()
    if phi >= 0:
        assert (fused >= votes.mean(0) - 1e-12).all()


def test_one_modality_and_ids_are_summed_as_published() -> None:
    catalogue = shop.catalogue(without={})
    text = dataclasses.replace(catalogue, modalities={"text": catalogue.modalities["text"]})
    model, item_ids = shop.model(shop.paper(), text), shop.batch()
    with torch.no_grad():
        session = model(item_ids)
        found = model.score(session, model.candidates(), item_ids).numpy()
    items = translate.items(model, text)
    expected = np.stack([ref.summed_scores(s, items) for s in session.numpy()])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
    apart = np.stack([ref.fused_scores(s, items, None) for s in session.numpy()])
    assert np.abs(found[:, ref.FIRST_ITEM :] - apart[:, ref.FIRST_ITEM :]).max() > 0.1, (
        "both ways score alike: the test proves nothing"
    )


def test_padding_is_a_candidate_in_training_alone() -> None:
    model, item_ids = shop.model(shop.paper(dropout=0.0)), shop.batch()
    with torch.no_grad():
        evaluated = model.score(model(item_ids), model.candidates(), item_ids)
        trained = model.train().score(model(item_ids), model.candidates(), item_ids)
    assert torch.isneginf(evaluated[:, : ref.FIRST_ITEM]).all()
    assert torch.isfinite(trained[:, 0]).all()
    assert torch.isneginf(trained[:, 1 : ref.FIRST_ITEM]).all()
    torch.testing.assert_close(trained[:, ref.FIRST_ITEM :], evaluated[:, ref.FIRST_ITEM :], rtol=0, atol=1e-12)
