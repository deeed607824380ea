"""Softmax for large catalogues: chunked gives the full loss and gradients, sampled an unbiased estimate."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import TrainingBatch, collate, training_batches
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.training.loss.chunked import ChunkedSoftmax
from missrec_t4r.training.loss.full import FullSoftmax, Softmax, StepEmbeddings, candidate_rows
from missrec_t4r.training.loss.sampled import SampledSoftmax
from missrec_t4r.training.precision import matmul_dtype
from missrec_t4r.training.step import choose_softmax, training_loss
from tests import shop
from tests.properties.cases import CONFIGS

CPU = torch.device("cpu")
EXAMPLES = [shop.rows([*session, target]) for session, target in zip(shop.SESSIONS, shop.TARGETS, strict=True)]
PARTLY_DROPPED = {"modality_dropout": 0.5, "id_dropout": 0.5}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def _batch(config: MISSRecConfig, next_items: int = 2) -> TrainingBatch:
    data = Sessions.from_lists(EXAMPLES)
    [(examples, _)] = training_batches(data, config, TrainConfig.paper(batch_size=1000), np.random.default_rng(0))
    return collate(data, examples, next_items, all_positions=config.attention == "causal", backwards=False)


def _step(net: MISSRec, softmax: Softmax, **train: object) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients, with the same dropout of modalities and IDs whatever the softmax."""
    net = copy.deepcopy(net).train()
    torch.manual_seed(1)
    batch = _batch(net.config)
    loss = training_loss(net, batch, TrainConfig.paper(next_items=2, **train), softmax=softmax)  # type: ignore[arg-type]
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for n, p in net.named_parameters()}
    return loss.item(), gradients


def _dropping(config: MISSRecConfig) -> MISSRec:
    """A model that drops modalities and IDs in training, and nothing else."""
    return shop.model(MISSRecConfig(**({**vars(config), "dropout": 0.0} | PARTLY_DROPPED)))


def _everything() -> SampledSoftmax:
    return SampledSoftmax(torch.ones(len(shop.ITEMS) + 3), negatives=1000)


@every_config
@pytest.mark.parametrize("softmax", [ChunkedSoftmax(4), _everything()], ids=["chunked", "sampled"])
def test_loss_and_gradients_are_those_of_the_full_softmax(config: MISSRecConfig, softmax: Softmax) -> None:
    net = _dropping(config)
    expected, gradients = _step(net, FullSoftmax())
    found, ours = _step(net, softmax)
    assert found == pytest.approx(expected, abs=1e-10)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("candidate_ids", ["shared", "own"])
def test_only_candidates_of_the_id_table_get_a_gradient(candidate_ids: str) -> None:
    net = shop.model(shop.default(candidate_ids=candidate_ids)).train()
    softmax = SampledSoftmax(torch.ones(len(shop.ITEMS) + 3), negatives=2)
    batch = TrainingBatch(torch.tensor([[3, 4]]), torch.tensor([[[4], [5]]]))
    training_loss(net, batch, TrainConfig.paper(), softmax=softmax).backward()
    gradient = net.item_encoder.id_tables[-1].grad
    assert gradient is not None
    assert gradient.is_sparse
    rows = set(gradient.coalesce().indices()[0].tolist())
    assert {3, 4, 5} <= rows
    assert len(rows) <= 6  # the session's, the targets, two draws and the padding row


def test_frozen_weights_get_no_gradient() -> None:
    net = _dropping(shop.default())
    assert net.item_encoder.id_embedding is not None
    net.item_encoder.id_embedding.weight.requires_grad_(False)
    net.item_encoder.adapters["text"].requires_grad_(False)
    for softmax in (ChunkedSoftmax(4), SampledSoftmax(torch.ones(15), 3)):
        training_loss(net.train(), _batch(net.config), TrainConfig.paper(), softmax=softmax).backward()
        assert net.item_encoder.id_embedding.weight.grad is None
        assert net.item_encoder.adapters["text"].weight.grad is None
        assert net.item_encoder.adapters["image"].weight.grad is not None


class _Shown(SampledSoftmax):
    """Keeps the candidates of the last step."""

    def embed(self, model: MISSRec, item_ids: Tensor, targets: Tensor) -> StepEmbeddings:
        self.last = super().embed(model, item_ids, targets)
        return self.last


def test_the_expected_sum_over_the_sample_is_the_sum_over_the_catalogue() -> None:
    """Targets of the rest of the batch are drawn by their share; each candidate counts 1 / its probability."""
    net = shop.model(shop.default()).train()
    classes = torch.nonzero(candidate_rows(net)).flatten()
    torch.manual_seed(0)
    frequency = torch.zeros(net.item_encoder.n_rows).index_copy_(0, classes, torch.rand(len(classes)))
    softmax = _Shown(frequency, negatives=2)
    values = torch.linspace(1, 3, net.item_encoder.n_rows, dtype=torch.float64)
    estimates, rounds, others = [], 1000, 3
    for _ in range(rounds):
        drawn = torch.multinomial(frequency, others, replacement=True)
        softmax.embed(net, torch.zeros(1, 1, dtype=torch.int64), drawn)
        assert softmax.last.candidates is not None
        rows = softmax.last.rows[softmax.last.candidates]
        rows = rows[rows > 0]
        estimates.append((values[rows] / softmax.log_inclusion(net, rows, others).exp()).sum())
    found = torch.stack(estimates)
    assert abs(found.mean() - values[classes].sum()) < 3 * found.std() / rounds**0.5
    assert found.std() > 1  # each draw is far off


def test_the_sampled_denominator_is_the_full_one_in_expectation() -> None:
    """For one position, exp(loss) is the denominator over the target's share of it: unbiased, item by item."""
    net = shop.model(shop.default(dropout=0.0, temperature=0.3)).train()
    batch = TrainingBatch(torch.tensor([[3]]), torch.tensor([[[6]]]))
    train, rounds = TrainConfig.paper(), 120
    expected = torch.exp(training_loss(net, batch, train).detach())
    torch.manual_seed(0)
    softmax = SampledSoftmax(torch.ones(15), negatives=6)
    with torch.no_grad():
        found = torch.stack([training_loss(net, batch, train, softmax=softmax).exp() for _ in range(rounds)])
    error = found.std() / rounds**0.5
    assert abs(found.mean() - expected) < 3 * error
    assert error < 0.05 * expected


def test_the_sampled_loss_is_near_the_full_one_for_popular_and_for_rare_targets() -> None:
    """Popular items are drawn as targets of other positions as well; uncorrected, they would count several times."""
    n_items, popularity = 200, torch.arange(1, 201, dtype=torch.float64) ** -1.0
    items = shop.random_modalities(n_items, {"text": 6}, seed=0)
    catalogue = shop.make_catalogue([f"P{i}" for i in range(n_items)], items, np.ones(n_items))
    net = shop.model(shop.default(dropout=0.0, temperature=0.3), catalogue).train()
    softmax = SampledSoftmax(torch.cat([torch.zeros(3), popularity]), negatives=40)
    torch.manual_seed(0)
    differences = []
    with torch.no_grad():
        for _ in range(12):
            targets = torch.multinomial(popularity, 20, replacement=True) + 3
            batch = TrainingBatch(torch.randint(3, 203, (20, 1)), targets.view(20, 1, 1))
            full, sampled = (
                training_loss(net, batch, TrainConfig.paper(), softmax=kind) for kind in (FullSoftmax(), softmax)
            )
            differences.append(float(sampled - full))
    assert abs(np.mean(differences)) < 0.05


def test_an_accidental_hit_counts_once() -> None:
    """One position whose target is also drawn: among two items the loss is that of two items, not of three."""
    net = shop.model(shop.default(dropout=0.0)).train()
    batch = TrainingBatch(torch.tensor([[3]]), torch.tensor([[[6]]]))
    classes = candidate_rows(net)
    net.untrained = torch.nonzero(~(classes & torch.isin(torch.arange(len(classes)), torch.tensor([6, 7])))).flatten()
    expected = training_loss(net, batch, TrainConfig.paper()).item()
    for frequency in (torch.ones(15), torch.eye(15)[6]):  # however popular, and drawn every time
        softmax = SampledSoftmax(frequency, negatives=2)
        assert training_loss(net, batch, TrainConfig.paper(), softmax=softmax).item() == pytest.approx(
            expected, abs=1e-12
        )


def test_the_same_target_twice_in_a_position_is_corrected_once() -> None:
    net = shop.model(shop.default(dropout=0.0)).train()
    batch = TrainingBatch(torch.tensor([[3]]), torch.tensor([[[6, 6]]]))
    train = TrainConfig.paper(next_items=2, next_items_weight=1.0)
    expected = training_loss(net, batch, train).item()
    found = training_loss(net, batch, train, softmax=SampledSoftmax(torch.ones(15), 1000)).item()
    assert found == pytest.approx(expected, abs=1e-12)


def test_auto_is_exact_and_goes_by_the_size_of_the_table() -> None:
    frequency = torch.ones(10)
    kinds = [
        type(choose_softmax(TrainConfig.paper(softmax=name), rows, 512, frequency, CPU))  # type: ignore[arg-type]
        for name, rows in [("auto", 100_000), ("auto", 1_000_000), ("full", 1_000_000), ("sampled", 10)]
    ]
    assert kinds == [FullSoftmax, ChunkedSoftmax, FullSoftmax, SampledSoftmax]


def test_half_precision_changes_the_loss_little_and_keeps_weights_in_fp32() -> None:
    torch.manual_seed(0)
    net = build_missrec(shop.default(dropout=0.0), shop.catalogue()).train()
    net.discover_interests(seed=0)
    losses = {}
    for precision in ("fp32", "bf16"):
        train = TrainConfig.paper(precision=precision)  # type: ignore[arg-type]
        for softmax in (FullSoftmax(matmul_dtype(train.precision, CPU)), ChunkedSoftmax(4), _everything()):
            loss = training_loss(net, _batch(net.config), train, softmax=softmax)
            net.zero_grad()
            loss.backward()
            assert loss.dtype == torch.float32
            assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
            losses[precision, type(softmax).__name__] = loss.item()
    full = losses["fp32", "FullSoftmax"]
    assert list(losses.values()) == pytest.approx([full] * 6, rel=2e-2)
    assert losses["bf16", "FullSoftmax"] != full


def test_large_tables_are_not_copied_and_rows_are_scaled_on_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    small = shop.model(shop.default())
    monkeypatch.setattr("missrec_t4r.model.build.LARGE", 1)
    catalogue = shop.catalogue()
    torch.manual_seed(0)
    large = build_missrec(shop.default(), catalogue)
    table = large.item_encoder.vectors.get_buffer("text")
    assert table.data_ptr() == catalogue.modalities["text"].vectors.ctypes.data
    large = shop.model(shop.default())
    for rows in (torch.arange(15), torch.tensor([[3, 4]])):
        torch.testing.assert_close(
            large.item_encoder(rows), small.item_encoder(rows), rtol=0, atol=1e-6
        )  # fp32 against fp64
    torch.testing.assert_close(large.item_encoder.catalogue(), small.item_encoder.catalogue(), rtol=0, atol=1e-6)


def test_large_vector_files_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("missrec_t4r.data.catalogue._MAPPED_BYTES", 1)
    catalogue = shop.catalogue()
    catalogue.save(tmp_path / "catalogue")
    mapped = Catalogue.load(tmp_path / "catalogue")
    assert isinstance(mapped.modalities["text"].vectors, np.memmap)
    assert np.array_equal(mapped.modalities["text"].vectors, catalogue.modalities["text"].vectors)
    assert build_missrec(shop.default(), mapped).item_encoder.n_rows == catalogue.n_rows
