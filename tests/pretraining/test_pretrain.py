"""Pre-training: the objective is the paper's sum, it learns, and a killed run is resumed with the same result."""

import json
from pathlib import Path

import pytest
import torch

from missrec_t4r.config import Recipe
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.union import load_domains
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.runs.run_folder import RUN_FILE, STATE_FILE, load_tensors
from missrec_t4r.training.pretrain import Pretrainer, contrastive_loss, pretrain
from missrec_t4r.training.step import Totals
from tests import shop
from tests.equations import reference as ref
from tests.pretraining.conftest import SMALL

SESSIONS = [["lamp", "desk", "chair"], ["mug", "kettle", "teapot", "pan"], ["rug", "sofa"]]


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_the_objective_is_the_sum_of_its_parts(attention: str) -> None:
    """Views without any change: s' is s, so all parts can be recomputed from the session vectors."""
    config = shop.default(attention=attention, item_ids=False, history_bias=False, dropout=0.0, temperature=0.5)
    settings = {"sequence_sequence_weight": 0.2, "item_drop_probability": 0.0}
    recipe = Recipe.from_dict({"extends": "paper", "model": vars(config), "pretrain": settings})
    model = shop.model(config)
    item_ids = shop.batch(SESSIONS)
    last = torch.tensor(shop.rows(["shelf", "shelf", "plate"]))
    targets = torch.nn.functional.pad(item_ids[:, 1:], (0, 1))
    lengths = (item_ids > 0).sum(1)
    targets[torch.arange(3), lengths - 1] = last
    batch = TrainingBatch(item_ids, targets.unsqueeze(-1) if attention == "causal" else last.unsqueeze(-1))
    found = contrastive_loss(model, batch, recipe)

    encoded = model.encode(item_ids, last_only=attention == "bidirectional")
    final = model.encode(item_ids, last_only=True).vectors
    vectors, positives = encoded.vectors, last
    if attention == "causal":
        vectors, positives = encoded.vectors[targets > 0], targets[targets > 0]
    scores = model.fusion(vectors, model.candidates()).detach().numpy()
    views = final.detach().numpy()
    orthogonality = orthogonality_loss(encoded.memory, encoded.interests.mask, "cosine").item()
    expected = (
        ref.sequence_item_contrast(scores, positives.tolist(), 0.5)
        + 0.2 * ref.sequence_sequence_contrast(views, views, last.tolist(), 0.5)
        + config.orthogonality_weight * 2 * orthogonality
    )
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_items_that_cannot_be_recommended_are_no_positives() -> None:
    config = shop.default(item_ids=False, dropout=0.0, attention="bidirectional")
    model = shop.model(config, shop.catalogue({"text": ["rug"], "image": ["rug"]}))
    recipe = Recipe.from_dict(
        {"extends": "paper", "model": vars(config), "pretrain": {"sequence_sequence_weight": 0.0}}
    )
    both = TrainingBatch(shop.batch(SESSIONS[:2]), torch.tensor([[shop.row("rug")], [shop.row("mug")]]))
    one = contrastive_loss(model, both, recipe)
    assert torch.isfinite(one)
    model.zero_grad()
    one.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters() if weight.grad is not None)


def test_a_run_learns_and_stores_the_sources_of_its_modalities(pretrained: Path) -> None:
    losses = _losses(pretrained)
    assert losses[-1] < losses[0] - 0.3
    info = json.loads((pretrained / RUN_FILE).read_text())
    assert info["pretraining"]["modalities"]["text"] == {"books": "text", "toys": "title"}
    assert info["pretraining"]["domains"]["books"]["items"] == 14
    assert info["modalities"]["text"] == {"width": 8, "fingerprint": "ring-text@1"}
    assert info["valid_ndcg@10"] > 0.5
    weights = load_tensors(pretrained / "weights.safetensors")
    assert "item_encoder.adapters.image.weight" in weights
    assert not any("id_embedding" in name for name in weights)


@pytest.mark.parametrize("refresh", [False, True])
def test_a_batch_mixes_domains_and_interests_are_discovered_once_or_every_epoch(
    shops: dict[str, Path], tmp_path: Path, refresh: bool
) -> None:
    folders = {name: shops[name] for name in ("books", "toys")}
    domains, seen = load_domains(folders), []

    class Watched(Pretrainer):
        def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> torch.Tensor:
            seen.append(set(domains.domain[batch.item_ids.numpy().ravel()].tolist()))
            return super().loss(batch, totals)

    recipe = Recipe.load("pretrain", SMALL | {"train.epochs": 2, "pretrain.refresh_interests": refresh})
    trainer = Watched(recipe, domains, folders, tmp_path)
    centroids = []
    for _ in range(2):
        trainer._epoch()
        centroids.append(trainer.model.interests.centroids.clone())
    assert sum({0, 1} <= domains_of_batch for domains_of_batch in seen) > len(seen) / 2
    assert torch.equal(*centroids) is not refresh


def test_a_killed_run_is_resumed_and_ends_like_an_uninterrupted_one(shops: dict[str, Path], tmp_path: Path) -> None:
    folders = {name: shops[name] for name in ("books", "toys")}
    settings = SMALL | {"train.epochs": 3, "model.dropout": 0.2, "pretrain.item_drop_share": 0.5}
    pretrain(folders, tmp_path / "whole", settings=settings)

    class Killed(Exception):
        pass

    class Dies(Pretrainer):
        def refresh_interests(self, epoch: int) -> None:
            if epoch == 1:
                raise Killed
            super().refresh_interests(epoch)

    victim = Dies(Recipe.load("pretrain", settings), load_domains(folders), folders, tmp_path / "killed")
    with pytest.raises(Killed):
        victim.run(folders["books"])
    assert (tmp_path / "killed" / STATE_FILE).is_file()
    torch.manual_seed(123)
    pretrain(folders, tmp_path / "killed", settings=settings)
    assert _losses(tmp_path / "killed") == _losses(tmp_path / "whole")


def test_the_full_softmax_over_the_union_is_an_objective_too(shops: dict[str, Path], tmp_path: Path) -> None:
    settings = SMALL | {"train.epochs": 4, "pretrain.objective": "full_softmax", "train.next_items": 2}
    result = pretrain([shops["books"], f"games={shops['toys']}"], tmp_path / "run", settings=settings)
    assert set(result["pretraining"]["domains"]) == {"books", "games"}
    assert _losses(tmp_path / "run")[-1] < _losses(tmp_path / "run")[0]


def test_the_published_setting_can_be_pretrained(shops: dict[str, Path], tmp_path: Path) -> None:
    """Prefixes, bidirectional attention, zero rows for missing modalities, the authors' regulariser."""
    published = {"model.item_ids": False, "model.interest_ratio": 0.02, "train.epochs": 2}
    folders = [shops["books"], shops["toys"]]
    result = pretrain(folders, tmp_path / "run", recipe="paper", settings=SMALL | published)
    assert result["epochs"] == 2
    assert _losses(tmp_path / "run")[1] < _losses(tmp_path / "run")[0]
    recipe = Recipe.from_dict(json.loads((tmp_path / "run" / "recipe.json").read_text()))
    assert (recipe.model.attention, recipe.model.missing_modality) == ("bidirectional", "zero_row")
    assert recipe.pretrain == Recipe.load("pretrain").pretrain  # the defaults are the published ones


def test_popularity_can_be_corrected(shops: dict[str, Path], tmp_path: Path) -> None:
    settings = SMALL | {"train.epochs": 6, "pretrain.popularity_correction": True}
    pretrain([shops["books"], shops["toys"]], tmp_path / "run", settings=settings)
    assert _losses(tmp_path / "run")[-1] < _losses(tmp_path / "run")[0]


def test_adapters_can_keep_their_initial_weights(shops: dict[str, Path], tmp_path: Path) -> None:
    """The adapters do not change in any epoch, while the decoder is trained."""
    for epochs in (1, 3):
        settings = SMALL | {"train.epochs": epochs, "pretrain.keep_adapters": True}
        pretrain([shops["books"], shops["toys"]], tmp_path / str(epochs), settings=settings)
    short, long = (load_tensors(tmp_path / str(epochs) / "weights.safetensors") for epochs in (1, 3))
    assert torch.equal(short["item_encoder.adapters.text.weight"], long["item_encoder.adapters.text.weight"])
    name = next(name for name in short if name.startswith("decoder.layers") and name.endswith("weight"))
    assert not torch.equal(short[name], long[name])


def test_settings_that_cannot_transfer_are_errors(shops: dict[str, Path], tmp_path: Path) -> None:
    settings = {"model.item_ids": True, "model.candidate_fusion": "dynamic_instance", "train.next_items": 2}
    with pytest.raises(ConfigError, match=r"model.item_ids.*dynamic|model.item_ids.*candidate_fusion.*next_items"):
        pretrain([shops["books"]], tmp_path / "run", settings=settings)
    with pytest.raises(ConfigError, match="item_drop_share 2.0"):
        pretrain([shops["books"]], tmp_path / "run", settings={"pretrain.item_drop_share": 2.0})
    with pytest.raises(ConfigError, match="one --data per domain"):
        pretrain([], tmp_path / "run")
    assert not (tmp_path / "run").exists()
