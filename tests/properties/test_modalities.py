"""Missing modalities: scored as if never declared, and never read."""

import dataclasses

import numpy as np
import pytest
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.model.missrec import MISSRec
from tests import shop
from tests.properties.cases import close, pad, scores

MASKED = {
    "default": shop.default(),
    "inductive": shop.default(item_ids=False),
    "static": shop.default(candidate_fusion="static"),
    "contextual": shop.ours_masked(sequence_fusion="contextual"),
}
every_config = pytest.mark.parametrize("config", MASKED.values(), ids=MASKED.keys())


def rebuilt(net: MISSRec, catalogue: Catalogue) -> MISSRec:
    """Return a model over another catalogue with the weights and interests that both share."""
    other = shop.model(net.config, catalogue)
    state = {key: value for key, value in net.state_dict().items() if key in other.state_dict()}
    kept = [list(net.item_encoder.names).index(name) for name in other.item_encoder.names]
    state["interests.assignment"] = net.interests.assignment[kept]
    other.load_state_dict(state, strict=False)
    return other


@every_config
def test_a_modality_that_no_item_has_scores_as_if_it_was_never_declared(config: MISSRecConfig) -> None:
    catalogue = shop.catalogue(without={"text": [], "image": shop.ITEMS})
    net = shop.model(config, catalogue)
    text_only = Catalogue(catalogue.items, {"text": catalogue.modalities["text"]})
    close(scores(rebuilt(net, text_only), shop.batch()), scores(net, shop.batch()))


@every_config
def test_the_vector_of_a_missing_modality_is_never_read(config: MISSRecConfig) -> None:
    catalogue = shop.catalogue()
    image = catalogue.modalities["image"]
    vectors = image.vectors.copy()
    vectors[shop.row("voucher")] = 100 * np.arange(1, 5)
    noisy = Catalogue(catalogue.items, {**catalogue.modalities, "image": dataclasses.replace(image, vectors=vectors)})
    net = shop.model(config, catalogue)
    close(scores(rebuilt(net, noisy), shop.batch()), scores(net, shop.batch()))


@every_config
def test_the_order_in_which_modalities_are_declared_does_not_matter(config: MISSRecConfig) -> None:
    catalogue = shop.catalogue()
    swapped = Catalogue(catalogue.items, dict(reversed(catalogue.modalities.items())))
    net = shop.model(config, catalogue)
    close(scores(rebuilt(net, swapped), shop.batch()), scores(net, shop.batch()))


@pytest.mark.parametrize("item_ids", [True, False])
def test_an_item_without_any_modality_has_its_id_or_is_not_recommended(item_ids: bool) -> None:
    nothing = shop.catalogue(without={"text": ["lamp", "plate"], "image": ["lamp", "plate"]})  # the plate is cold
    net = shop.model(shop.default(item_ids=item_ids), nothing)
    found = scores(net, pad([[shop.row("mug")]]))[0]
    assert torch.isneginf(found[shop.row("plate")])
    assert bool(torch.isfinite(found[shop.row("lamp")])) == item_ids
    if item_ids:
        with torch.no_grad():
            by_id = (
                net(pad([[shop.row("mug")]]))
                @ torch.nn.functional.normalize(net.item_encoder.id_embedding.weight, dim=-1).T
            )
        close(found[shop.row("lamp")], by_id[0, shop.row("lamp")])


@pytest.mark.parametrize("sequence_fusion", ["add", "contextual"])
def test_an_item_without_any_modality_still_speaks_for_its_session_by_its_id(sequence_fusion: str) -> None:
    nothing = shop.catalogue(without={"text": ["lamp", "desk"], "image": ["lamp", "desk"]})
    net = shop.model(shop.ours_masked(sequence_fusion=sequence_fusion), nothing)
    with torch.no_grad():
        last = net(pad([shop.rows(["mug", "lamp"]), shop.rows(["mug", "desk"])]))
        first = net(pad([shop.rows(["lamp", "mug"]), shop.rows(["desk", "mug"])]))
    close(last.norm(dim=1), torch.ones(2, dtype=torch.float64))
    assert (last[0] - last[1]).abs().max() > 1e-3
    assert (first[0] - first[1]).abs().max() > 1e-3


def test_a_cold_item_is_scored_by_its_modalities_alone() -> None:
    net = shop.model(shop.default())
    assert net.item_encoder.id_embedding is not None
    before = scores(net, shop.batch())
    with torch.no_grad():
        net.item_encoder.id_embedding.weight[shop.row("plate")] = 5.0
    close(scores(net, shop.batch()), before, 1e-12)
    row = shop.row("pan")
    with torch.no_grad():
        net.item_encoder.id_embedding.weight[row] = 5.0
    assert (scores(net, shop.batch()) - before)[:, row].abs().max() > 1e-3


@pytest.mark.parametrize("config", [shop.default(), shop.paper()], ids=["masked", "zero row"])
def test_dropout_hides_one_modality_of_some_items_and_never_the_last(config: MISSRecConfig) -> None:
    item_encoder = shop.model(dataclasses.replace(config, modality_dropout=0.5, id_dropout=0.5)).item_encoder
    whole, losses = item_encoder.catalogue(), torch.zeros(item_encoder.n_rows)
    torch.manual_seed(0)
    item_encoder.train()
    for _ in range(200):
        step = item_encoder.catalogue()
        assert not (step.mask & ~whole.mask).any(), "nothing appears that the item lacks"
        assert torch.equal(step.mask.any(0), whole.mask.any(0)), "nothing loses its last modality"
        assert not (step.attended & ~step.mask).any()
        losses += whole.mask.sum(0) - step.mask.sum(0)
    several = whole.mask.sum(0) == 2
    assert not losses[~several].any()
    assert ((losses[several] / 200 - 0.5).abs() < 0.15).all()


def test_id_dropout_spares_items_that_have_nothing_else() -> None:
    nothing = shop.catalogue(without={"text": ["lamp"], "image": ["lamp"]})
    item_encoder = shop.model(shop.default(id_dropout=0.5), nothing).item_encoder
    torch.manual_seed(0)
    kept = torch.stack([item_encoder.train().catalogue().id_mask for _ in range(200)]).double().mean(0)  # type: ignore[misc]
    assert kept[shop.row("lamp")] == 1.0
    assert kept[shop.row("plate")] == 0.0, "the cold item never had one"
    assert abs(float(kept[shop.row("mug")]) - 0.5) < 0.15
