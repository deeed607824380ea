"""What a score may know under each protocol, by hand, and which data its weights come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from missrec_t4r import commands
from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import ConfigError
from missrec_t4r.evaluation.full_ranking import (
    EXCLUDED,
    KEPT_STRICT,
    KEPT_WITH_HISTORY_TERM,
    PROTOCOLS,
    Scored,
    quick_metrics,
    rank_systems,
)
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec, terms_of
from missrec_t4r.ranking.protocols import Blend, BlendScorer, blends_of
from missrec_t4r.ranking.scorer import ModelScorer
from missrec_t4r.ranking.terms.content_knn import ContentKNNSettings, ContentKNNTerm
from missrec_t4r.ranking.terms.item_knn import ItemKNNSettings, ItemKNNTerm
from missrec_t4r.ranking.tune import Validation, fit_terms
from missrec_t4r.runs.evaluate import evaluate
from missrec_t4r.runs.run_folder import load_run
from tests import shop

VALID = [[3, 4, 5], [3, 4], [4, 5, 3], [6, 3, 4], [7, 6]]


@pytest.fixture
def model(catalogue: Catalogue, train: Sessions) -> MISSRec:
    """A network with random weights and every term, tuned as after training."""
    torch.manual_seed(1)
    built = build_missrec(MISSRecConfig(d_model=8, n_head=2), catalogue)
    built.discover_interests(seed=1)
    fit_terms(built.eval(), catalogue, train, Sessions.from_lists(VALID))
    return built


def scores_of(
    model: MISSRec, blends: dict[str, dict[str, Blend]], histories: Sessions
) -> dict[tuple[str, str], Tensor]:
    scorer = BlendScorer(ModelScorer.with_popularity(model, catalogue_of(model)), blends)
    return {(one.system, name): one.scores for one in scorer(histories) for name in one.protocols}


def catalogue_of(model: MISSRec) -> Catalogue:
    n_items = model.item_encoder.n_rows - 3
    return shop.make_catalogue(list("abcdef"), {}, np.ones(n_items, np.int64))


def blends(model: MISSRec, catalogue: Catalogue, train: Sessions, **options: bool) -> dict[str, dict[str, Blend]]:
    return blends_of(model, Validation(model, catalogue, train, Sessions.from_lists(VALID)), **options)[0]


def test_own_pairs_by_hand(train: Sessions) -> None:
    off, stay = ItemKNNTerm(9, 4), ItemKNNTerm(9, 4, own_pairs=True)
    for term in (off, stay):
        term.fit(train, 50)
        term.choose(ItemKNNSettings(1.0, 1.0, 0.0))
    session = torch.tensor([[3, 4]])
    # pairs: 3-4 two sessions, 3-5 one, 4-5 twice in [4, 5, 5] and once in [3, 4, 5], 3-6 one
    assert stay(session)[0, 3:].tolist() == [2.0, 2.0, 4.0, 1.0, 0.0, 0.0]
    assert off(session)[0, 3:].tolist() == [1.0, 1.0, 4.0, 1.0, 0.0, 0.0]  # one meeting of 3 and 4 less, for each


def test_an_item_resembles_itself_most_in_the_strict_protocol_alone(catalogue: Catalogue) -> None:
    text = catalogue.modalities["text"]
    vectors, present = {"text": torch.from_numpy(text.vectors)}, torch.from_numpy(text.present)[None]
    for itself in (False, True):
        term = ContentKNNTerm(9, 1, itself=itself)
        term.fit(vectors, present)
        term.choose(ContentKNNSettings(2.0, 0.5))
        added = term(torch.tensor([[3]]))[0]
        assert added[3].item() == (2.0 if itself else 0.0)  # alone in its list of one, with weight 1
        assert added[4].item() == (0.0 if itself else 2.0)  # texts [1, 0] and [1, .1]: 3 is the nearest other


def test_a_strict_score_is_a_sum_over_items_that_no_marking_of_the_seen_changes(
    model: MISSRec, catalogue: Catalogue, train: Sessions
) -> None:
    histories = Sessions.from_lists([[3, 4, 5], [6, 3], [4, 5, 5]])
    before = scores_of(model, blends(model, catalogue, train), histories)
    with torch.no_grad():
        terms_of(model).history_bias.bias.fill_(50.0)  # marks what was seen as never before
    after = scores_of(model, blends(model, catalogue, train), histories)
    for system in ("model", "network", "terms"):
        torch.testing.assert_close(after[system, KEPT_STRICT], before[system, KEPT_STRICT], rtol=0, atol=0)
    change = after["network", KEPT_WITH_HISTORY_TERM] - before["network", KEPT_WITH_HISTORY_TERM]
    assert change[0, 3] > 40


def test_terms_of_the_strict_protocol_add_up_item_by_item(
    model: MISSRec, catalogue: Catalogue, train: Sessions
) -> None:
    """What an item of the session says about a candidate is the same whether or not the candidate was seen."""
    found = blends(model, catalogue, train)
    sessions = torch.tensor([[3, 4], [3, 0], [4, 0]])  # with the last item's age 0, and no decay
    for protocol, is_strict in ((KEPT_STRICT, True), (KEPT_WITH_HISTORY_TERM, False)):
        item_knn = found["terms"][protocol].terms["item_knn"]
        item_knn.choose(ItemKNNSettings(1.0, 1.0, 0.0))
        both, first, second = item_knn(sessions)
        assert torch.equal(both, first + second) is is_strict


def test_no_rank_under_excluded_depends_on_what_marks_the_seen(
    model: MISSRec, catalogue: Catalogue, train: Sessions
) -> None:
    histories, targets = Sessions.from_lists([[3, 4, 5], [6, 3], [4, 5, 5]]), np.array([6, 4, 3])
    shared = blends(model, catalogue, train, alone=False)
    with_bias = {"network": dict.fromkeys(PROTOCOLS, shared["network"][KEPT_WITH_HISTORY_TERM])}
    scorer = ModelScorer.with_popularity(model, catalogue)
    ranked = [
        rank_systems(BlendScorer(scorer, of), histories, targets, 9)["network"].ranks[EXCLUDED].tolist()
        for of in (shared, with_bias)
    ]
    assert ranked[0] == ranked[1]


def test_a_model_that_knows_what_was_seen_is_not_ranked_as_strict(model: MISSRec, catalogue: Catalogue) -> None:
    scorer, sessions = ModelScorer.with_popularity(model, catalogue), Sessions.from_lists(VALID)
    assert set(quick_metrics(scorer, sessions, 9)) == {EXCLUDED, KEPT_WITH_HISTORY_TERM}
    with pytest.raises(ConfigError, match=r"'kept_strict' for scores that depend on which items were seen"):
        quick_metrics(scorer, sessions, 9, protocols=[KEPT_STRICT])
    model.terms.clear()
    assert set(quick_metrics(scorer, sessions, 9)) == set(PROTOCOLS)


def test_terms_alone_need_no_network_and_no_training(model: MISSRec, catalogue: Catalogue, train: Sessions) -> None:
    histories = Sessions.from_lists([[3, 4, 5], [6, 3]])
    before = scores_of(model, blends(model, catalogue, train), histories)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    after = scores_of(model, blends(model, catalogue, train), histories)
    for protocol in PROTOCOLS:
        torch.testing.assert_close(after["terms", protocol], before["terms", protocol], rtol=0, atol=0)
    assert not torch.equal(after["network", KEPT_STRICT], before["network", KEPT_STRICT])


def test_systems_share_one_pass_through_the_network(model: MISSRec, catalogue: Catalogue, train: Sessions) -> None:
    found, passes = blends(model, catalogue, train), []
    model.decoder.register_forward_hook(lambda *_: passes.append(1))
    ranked = rank_systems(
        BlendScorer(ModelScorer.with_popularity(model, catalogue), found), Sessions.from_lists([[3]]), np.array([4]), 9
    )
    assert set(ranked) == {"model", "exported", "network", "terms"}
    assert passes == [1]


def test_protocols_with_the_same_filter_have_the_same_ranks() -> None:
    scores = torch.tensor([[-torch.inf] * 3 + [0.9, 0.5, 0.7]])
    ranked = rank_systems(
        lambda _: [Scored("one", PROTOCOLS, scores)], Sessions.from_lists([[3]]), np.array([4]), 6, top_k=2
    )["one"]
    assert {name: ranks.tolist() for name, ranks in ranked.ranks.items()} == {
        EXCLUDED: [2], KEPT_STRICT: [3], KEPT_WITH_HISTORY_TERM: [3],
    }  # fmt: skip
    assert ranked.recommended[EXCLUDED].tolist() == [[5, 4]]
    assert ranked.recommended[KEPT_STRICT].tolist() == [[3, 5]]


# On a shop that a model can learn


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A generated shop, a small network of the recipe `default` trained on it, and its evaluation."""
    pytest.importorskip("nvtabular", reason="the ETL needs the extra merlin")
    folder = tmp_path_factory.mktemp("protocols")
    raw, data, run = folder / "raw", folder / "data", folder / "run"
    commands.generate(raw, users=USERS, items=ITEMS, seed=5)
    commands.etl(raw / "interactions.parquet", raw / "items.parquet", data)
    commands.features(data, text_columns=["title", "description"])
    commands.train(data, run, settings=SMALL)
    return run, evaluate(run)


USERS, ITEMS = 500, 150
SMALL = {
    "model.d_model": 64,
    "model.n_decoder_layers": 1,
    "train.epochs": 12,
    "train.batch_size": 128,
    "train.max_minutes": 0,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_default_beats_its_terms_alone_and_item_knn(trained: tuple[Path, dict[str, Any]], protocol: str) -> None:
    found = trained[1]["protocols"][protocol]
    for other in ("terms", "item_knn"):
        assert found["model"]["ndcg@10"] > found[other]["ndcg@10"], other


def test_exported_is_what_the_run_scores(trained: tuple[Path, dict[str, Any]]) -> None:
    run, report = trained
    loaded = load_run(run)
    scorer = ModelScorer.with_popularity(loaded.model, loaded.catalogue)
    served = quick_metrics(scorer, Sessions.load(loaded.data / "test"), loaded.catalogue.n_rows)
    for protocol in (KEPT_WITH_HISTORY_TERM, EXCLUDED):
        assert report["protocols"][protocol]["exported"]["ndcg@10"] == pytest.approx(served[protocol]["ndcg@10"])
