"""What a position may know: the items up to it, and never the target. And when one pass equals many prefixes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from missrec_t4r.config import TrainConfig
from missrec_t4r.data.batching import collate, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.training.step import training_loss
from tests import shop
from tests.properties.cases import close, items, model, pad, quick, sessions

CAUSAL = ["default", "default, two layers each", "inductive", "without interests"]
causal = pytest.mark.parametrize("name", CAUSAL)
pairs = st.lists(st.tuples(items, items), min_size=1, max_size=8)


@causal
@quick
@given(both=pairs, step=st.integers(0, 7))
def test_later_items_change_no_earlier_position(name: str, both: list[tuple[int, int]], step: int) -> None:
    step = step % len(both)
    one = [first for first, _ in both]
    other = [*one[: step + 1], *(second for _, second in both[step + 1 :])]
    with torch.no_grad():
        kept, changed = (model(name).encode(pad([session])).vectors[0, : step + 1] for session in (one, other))
    close(changed, kept, 1e-12)


@causal
def test_the_last_item_changes_its_own_position_and_no_earlier_one(name: str) -> None:
    one, other = pad([shop.rows(["lamp", "desk", "mug", "rug"])]), pad([shop.rows(["lamp", "desk", "mug", "pan"])])
    net = model(name)
    with torch.no_grad():
        first, second = net.encode(one).vectors, net.encode(other).vectors
    close(first[:, :3], second[:, :3], 1e-12)  # not to the bit: the sessions differ in their number of interests
    assert (first[:, 3] - second[:, 3]).abs().max() > 1e-3


@causal
@quick
@given(session=sessions)
def test_a_causal_position_is_the_vector_of_its_prefix(name: str, session: list[int]) -> None:
    with torch.no_grad():
        positions = model(name).encode(pad([session])).vectors[0]
        prefixes = torch.cat([model(name)(pad([session[: t + 1]])) for t in range(len(session))])
    close(positions, prefixes)


def bidirectional_twin(net: MISSRec) -> MISSRec:
    """Return the model that has the same weights and interests, and sees its whole session."""
    twin = shop.model(shop.default(**(_sizes(net) | {"attention": "bidirectional"})))
    twin.load_state_dict(net.state_dict())
    return twin


def _sizes(net: MISSRec) -> dict[str, float]:
    return {name: getattr(net.config, name) for name in ("n_encoder_layers", "n_decoder_layers", "interest_ratio")}


def _largest_gap(net: MISSRec, session: list[int]) -> float:
    """How far one causal pass is from the bidirectional model's vectors of all prefixes."""
    twin = bidirectional_twin(net)
    with torch.no_grad():
        prefixes = torch.cat([twin(pad([session[: t + 1]])) for t in range(len(session))])
        return float((net.encode(pad([session])).vectors[0] - prefixes).abs().max())


SESSION = shop.rows(["lamp", "kettle", "rug", "voucher", "lamp", "mug"])


def test_causal_is_exact_without_interests_and_with_one_decoder_layer() -> None:
    net = shop.model(shop.default(n_decoder_layers=1))
    net.interests.assignment.zero_()
    assert _largest_gap(net, SESSION) < 1e-12


def test_a_model_without_interests_has_no_part_that_only_they_use() -> None:
    """Nothing of it is trained, stored or clustered, and one decoder layer stays exact."""
    net = shop.model(shop.default(interest_ratio=0.0, n_decoder_layers=1))
    assert not [name for name in net.state_dict() if name.startswith("encoder.") or "cross" in name]
    net.discover_interests(seed=0)
    assert not net.interests.discovered
    assert _largest_gap(net, SESSION) < 1e-12
    net.train().encode(pad([SESSION])).vectors[0, :, 0].sum().backward()
    untrained = [name for name, weight in net.decoder.named_parameters() if weight.grad is None]
    assert untrained == [], "torch's DDP would stop"


def test_causal_is_exact_with_interests_when_the_encoder_has_no_layer() -> None:
    net = shop.model(shop.default(n_encoder_layers=0, n_decoder_layers=1))
    assert net.interests.discovered
    assert _largest_gap(net, SESSION) < 1e-12


def test_causal_is_exact_when_the_first_item_shows_all_interests() -> None:
    net = shop.model(shop.default(n_decoder_layers=1))
    net.interests.assignment.clamp_(max=1)
    assert _largest_gap(net, SESSION) < 1e-12


def test_causal_is_an_approximation_with_an_interest_encoder() -> None:
    assert _largest_gap(shop.model(shop.default(n_decoder_layers=1)), SESSION) > 1e-4


def test_causal_is_an_approximation_with_two_decoder_layers() -> None:
    net = shop.model(shop.default(n_decoder_layers=2))
    net.interests.assignment.zero_()
    assert _largest_gap(net, SESSION) > 1e-4


@quick
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=6),
    attention=st.sampled_from(["causal", "bidirectional"]),
    backwards=st.booleans(),
    n_targets=st.integers(1, 3),
)
def test_training_examples_hold_every_transition_once_and_no_target_in_sight(
    lengths: list[int], attention: str, backwards: bool, n_targets: int
) -> None:
    # every event is a number of its own, so that a position can be recognised by its value
    events = np.split(np.arange(3, 3 + sum(lengths)), np.cumsum(lengths)[:-1])
    data = Sessions.from_lists(list(events))
    config = shop.default(attention=attention, max_sequence_length=5)
    train = TrainConfig.paper(batch_size=4, next_items=n_targets, reverse_probability=float(backwards))
    transitions = []
    for examples, reverse in training_batches(data, config, train, np.random.default_rng(0)):
        all_positions = attention == "causal"
        batch = collate(data, examples, n_targets, all_positions=all_positions, backwards=reverse)
        for row, targets in zip(batch.item_ids.tolist(), batch.targets.tolist(), strict=True):
            seen = [item for item in row if item]
            for t, wanted in enumerate(targets if all_positions else [targets]):
                visible = seen[: t + 1] if all_positions else seen
                wanted = [item for item in wanted if item]
                if t >= len(seen) or not wanted:
                    assert not wanted
                    continue
                step = -1 if reverse else 1
                assert not set(wanted) & set(visible)
                assert wanted == [visible[-1] + step * k for k in range(1, len(wanted) + 1)]
                transitions.append(tuple(sorted((visible[-1], wanted[0]))))
    expected = [(int(a), int(b)) for session in events for a, b in itertools.pairwise(session)]
    if attention == "causal" or not backwards:  # prefixes read backwards have the session's oldest items as targets
        assert sorted(transitions) == expected


def test_the_loss_of_one_pass_is_the_loss_of_its_prefixes() -> None:
    net = shop.model(shop.default(orthogonality_weight=0.0))
    data = Sessions.from_lists([shop.rows(session) for session in shop.SESSIONS if len(session) > 1])
    train = TrainConfig.paper(batch_size=1000)
    losses = []
    for config in (net.config, shop.default(attention="bidirectional")):
        [(examples, _)] = training_batches(data, config, train, np.random.default_rng(0))
        batch = collate(data, examples, 1, all_positions=config is net.config, backwards=False)
        losses.append(training_loss(net, batch, train).detach())
    close(losses[0], losses[1])


def test_exchanging_the_target_changes_no_other_position_s_loss() -> None:
    net, train = shop.model(shop.default(orthogonality_weight=0.0)), TrainConfig.paper(batch_size=1000)

    def logits_at(session: list[int]) -> torch.Tensor:
        data = Sessions.from_lists([session])
        [(examples, _)] = training_batches(data, net.config, train, np.random.default_rng(0))
        batch = collate(data, examples, 1, all_positions=True, backwards=False)
        return net.encode(batch.item_ids).vectors.detach()

    history = shop.rows(["lamp", "kettle", "rug"])
    assert torch.equal(logits_at([*history, shop.row("pan")]), logits_at([*history, shop.row("sofa")]))
