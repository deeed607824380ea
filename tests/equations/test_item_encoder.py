"""Item towers: adapters over frozen vectors, with missing modalities masked or, as published, biased."""

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training.warm_start.id_init import ids_from_content
from tests import shop
from tests.equations import reference as ref
from tests.equations import translate

CONFIGS = {"paper": shop.paper(), "default": shop.default(), "inductive": shop.default(item_ids=False)}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@every_config
def test_tokens_of_the_catalogue(config: MISSRecConfig) -> None:
    model = shop.model(config)
    found, expected = model.item_encoder.catalogue(), translate.items(model, shop.catalogue())
    counted = found.mask.numpy()
    np.testing.assert_array_equal(counted, expected.counts)
    np.testing.assert_array_equal(found.attended.numpy()[:, ref.FIRST_ITEM :], expected.present[:, ref.FIRST_ITEM :])
    tolerance = 1e-10 if config.feature_scaling == "none" else 1e-6
    np.testing.assert_allclose(
        translate.array(found.modality)[counted], expected.tokens[counted], rtol=0, atol=tolerance
    )
    assert (found.ids is None) == (not config.item_ids)


@every_config
def test_tokens_of_some_rows_are_those_of_the_catalogue(config: MISSRecConfig) -> None:
    item_encoder = shop.model(config).item_encoder
    rows = shop.batch(padding=1)
    for direct, gathered in zip(item_encoder(rows), item_encoder.catalogue().take(rows, candidates=True), strict=True):
        assert (direct is None) == (gathered is None)
        if direct is not None:
            torch.testing.assert_close(direct, gathered, rtol=0, atol=1e-12)


def test_published_token_of_a_missing_modality_is_the_bias() -> None:
    model = shop.model(shop.paper())
    tokens = model.item_encoder(torch.tensor([shop.row("voucher")]))
    image = model.item_encoder.names.index("image")
    assert tokens.mask[image].all()
    torch.testing.assert_close(tokens.modality[image, 0], model.item_encoder.adapters["image"].bias, rtol=0, atol=0)


def test_our_token_of_a_missing_modality_does_not_count() -> None:
    model = shop.model(shop.default())
    tokens = model.item_encoder(torch.tensor([shop.row("voucher"), shop.row("rug"), shop.row("lamp")]))
    assert tokens.mask.tolist() == [[True, False, True], [False, True, True]]  # text, image


@pytest.mark.parametrize("name", ["text", "image"])
def test_scaled_vectors_have_unit_length(name: str) -> None:
    vectors = shop.model(shop.default()).item_encoder.vectors.get_buffer(name)
    expected = ref.unit(shop.catalogue().modalities[name].vectors.astype(np.float64))
    np.testing.assert_allclose(vectors.numpy(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("config", [shop.paper(), shop.paper(candidate_ids="own")], ids=["shared", "own"])
def test_candidates_are_unit_tokens(config: MISSRecConfig) -> None:
    model = shop.model(config)
    found, expected = model.candidates(), translate.candidates(model, shop.catalogue())
    real = slice(ref.FIRST_ITEM, None)
    np.testing.assert_allclose(
        translate.array(found.modality)[:, real], ref.unit(expected.tokens)[:, real], rtol=0, atol=1e-10
    )
    assert found.ids is not None
    assert expected.ids is not None
    np.testing.assert_allclose(translate.array(found.ids)[real], ref.unit(expected.ids)[real], rtol=0, atol=1e-10)


def test_candidate_ids_of_their_own_start_as_those_of_sessions_and_score_without_entering_them() -> None:
    model = build_missrec(shop.default(candidate_ids="own"), shop.catalogue()).eval()
    model.discover_interests(seed=0)
    ids, own = model.item_encoder.id_tables
    assert torch.equal(ids, own)
    ids_from_content(model)
    assert torch.equal(ids, own)
    session = shop.batch([["lamp", "mug"]])

    def now() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return model(session), model.score(model(session), model.candidates(), session)

    vector, scores = now()
    with torch.no_grad():
        own[shop.row("lamp")] *= -1
    again, changed = now()
    assert torch.equal(again, vector)
    differs = (changed != scores)[0].nonzero().flatten().tolist()
    assert differs == [shop.row("lamp")]
