"""A session's scores are its own: not its batch's, not its padding's, not the cache's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.ranking.hybrid import terms_of
from missrec_t4r.schema import FIRST_ITEM_ROW
from tests.properties.cases import CONFIGS, MAX_LENGTH, batches, close, model, pad, quick, scores

every_config = pytest.mark.parametrize("name", CONFIGS)


@every_config
@quick
@given(chosen=batches, width=st.integers(1, MAX_LENGTH))
def test_more_padding_changes_no_score(name: str, chosen: list[list[int]], width: int) -> None:
    close(scores(model(name), pad(chosen, width)), scores(model(name), pad(chosen)))


@every_config
@quick
@given(chosen=batches)
def test_a_batch_of_one_equals_its_row_in_a_batch(name: str, chosen: list[list[int]]) -> None:
    alone = torch.cat([scores(model(name), pad([session])) for session in chosen])
    close(scores(model(name), pad(chosen)), alone)


@every_config
def test_cached_candidates_equal_fresh_ones_bitwise(name: str) -> None:
    net, one, other = model(name), pad([[3, 4], [5]]), pad([[6, 7, 8]])
    cached = net.candidates()
    with torch.no_grad():
        for item_ids in (one, other, one):
            assert torch.equal(net.score(net(item_ids), cached, item_ids), scores(net, item_ids))


@every_config
@quick
@given(chosen=batches)
def test_the_last_position_alone_equals_the_last_of_all_positions(name: str, chosen: list[list[int]]) -> None:
    with torch.no_grad():
        everywhere, last = model(name).encode(pad(chosen)).vectors, model(name)(pad(chosen))
    close(torch.stack([vectors[len(session) - 1] for vectors, session in zip(everywhere, chosen, strict=True)]), last)


@every_config
@quick
@given(chosen=batches)
def test_catalogue_tokens_of_the_step_equal_the_sessions_own(name: str, chosen: list[list[int]]) -> None:
    net = model(name)
    with torch.no_grad():
        close(
            net.encode(pad(chosen), items=net.item_encoder.catalogue().take(pad(chosen)), last_only=True).vectors,
            net(pad(chosen)),
        )


@every_config
def test_reserved_rows_are_never_recommended(name: str) -> None:
    found = scores(model(name), pad([[3], [4, 4, 5]]))
    assert torch.isneginf(found[:, :FIRST_ITEM_ROW]).all()
    assert torch.isfinite(found[:, FIRST_ITEM_ROW:]).all()


@every_config
def test_a_session_without_any_item_has_finite_scores(name: str) -> None:
    assert torch.isfinite(scores(model(name), pad([[0, 0], [3, 4]]))[:, FIRST_ITEM_ROW:]).all()


@quick
@given(chosen=batches, width=st.integers(1, MAX_LENGTH))
def test_our_regulariser_knows_neither_padding_nor_repetition(chosen: list[list[int]], width: int) -> None:
    def regulariser(batch: list[list[int]], seq: int | None = None) -> torch.Tensor:
        encoded = model("default").encode(pad(batch, seq))
        return orthogonality_loss(encoded.memory, encoded.interests.mask, "cosine").detach()

    close(regulariser(chosen, width), regulariser(chosen))
    close(regulariser(chosen + chosen), regulariser(chosen))


def test_history_bias_changes_the_items_of_the_history_and_no_other() -> None:
    net, item_ids = model("default"), pad([[3, 5, 3]])
    with torch.no_grad():
        plain = net.fusion(net(item_ids), net.candidates())
    change = (scores(net, item_ids) - plain)[0, FIRST_ITEM_ROW:]
    expected = torch.zeros_like(change)
    expected[[0, 2]] = terms_of(net).history_bias.bias.detach()  # once each, however often they occur
    close(change, expected)


@every_config
@quick
@given(chosen=batches)
def test_empty_interest_places_change_no_score(name: str, chosen: list[list[int]]) -> None:
    trimmed = scores(model(name), pad(chosen))
    with pytest.MonkeyPatch.context() as patch:  # a compiled model keeps every place: shapes may not depend on data
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        close(scores(model(name), pad(chosen)), trimmed)
