"""`missrec train --from`: loaded, frozen and re-initialised parts, errors, and the benefit of transfer."""

import json
from pathlib import Path

import pytest
import torch

from missrec_t4r.commands.training import train
from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError, ModalityError
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.run_folder import load_run, load_tensors
from missrec_t4r.training.warm_start.transfer import load_pretrained, read_source, require_same
from tests.pretraining.conftest import IMAGE_WIDTH, SMALL, TEXT_WIDTH, angles, modality, write_shop

ONE_EPOCH = SMALL | {"train.epochs": 1, "model.n_neighbours": 0}


def _parts(report: dict) -> dict[str, dict]:
    return {part["name"]: part for part in report["parts"]}


def test_the_published_freeze_trains_adapters_norm_fusion_and_ids(
    shops: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    result = train(
        shops["tools"],
        tmp_path / "run",
        start_from=pretrained,
        recipe="pretrain",
        settings=ONE_EPOCH | {"model.item_ids": True},
    )
    before = load_tensors(pretrained / "weights.safetensors")
    after = load_tensors(tmp_path / "run" / "weights.safetensors")
    moved = {name for name in after if name in before and not torch.equal(after[name], before[name])}
    stays = {
        name for name in before if name.startswith(("encoder.", "decoder.layers.", "decoder.norm.", "decoder.pos"))
    }
    assert not moved & stays
    assert {"item_encoder.adapters.text.weight", "decoder.norm_input.weight", "terms.history_bias.bias"} <= moved
    parts = _parts(result["weight_loading"])
    assert {name for name, part in parts.items() if part["frozen"]} == {"position embedding", "encoder", "decoder"}
    assert parts["adapter text"]["status"] == "loaded"
    assert parts["adapter image"]["status"] == "unexpected"  # this shop has no pictures
    assert parts["item IDs"]["status"] == "missing"
    assert parts["interests"]["status"] == "re-initialised"
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["weight_loading"]["kind"] == "from"
    assert info["weight_loading"]["freeze"] == "encoder_decoder"
    moved = {name for name in moved if not name.startswith(("interests.", "terms.content_knn."))} | {
        "fusion.phi"
    }  # one modality
    trained = sum(after[name].numel() for name in moved) + parts["item IDs"]["parameters"]
    assert info["weight_loading"]["trainable_parameters"] == trained
    assert info["weight_loading"]["trainable_share"] == pytest.approx(
        trained / info["weight_loading"]["parameters"], abs=1e-4
    )
    assert load_run(tmp_path / "run").recipe.model.item_ids


def test_all_transferable_weights_are_loaded(shops: dict[str, Path], pretrained: Path) -> None:
    """Another name for the same encoder's vectors finds its adapter; scores are then those of the same weights."""
    catalogue = Catalogue.load(shops["toys"] / "catalogue")
    config = Recipe.load("pretrain", SMALL).model
    torch.manual_seed(5)
    model = build_missrec(config, catalogue)
    report = load_pretrained(model, catalogue, read_source(pretrained), freeze="none")
    theirs = load_tensors(pretrained / "weights.safetensors")
    own = model.state_dict()
    assert torch.equal(own["item_encoder.adapters.title.weight"], theirs["item_encoder.adapters.text.weight"])
    same = [
        name for name in own if not name.startswith(("item_encoder.adapters.title", "interests.", "terms.content_knn."))
    ]
    assert [name for name in same if not torch.equal(own[name], theirs[name])] == []
    assert _parts(report)["adapter title"]["note"] == "from 'text', the same encoder under another name"
    assert report["trainable_share"] == 1.0
    assert all(weight.requires_grad for weight in model.parameters())


def test_pretraining_helps_from_the_first_epoch_on(shops: dict[str, Path], pretrained: Path, tmp_path: Path) -> None:
    """The three shops follow one rule that their common encoder represents, so it transfers to the third."""
    alone = train(shops["tools"], tmp_path / "alone", recipe="pretrain", settings=ONE_EPOCH)
    helped = train(shops["tools"], tmp_path / "helped", start_from=pretrained, recipe="pretrain", settings=ONE_EPOCH)
    assert helped["valid_ndcg@10"] > alone["valid_ndcg@10"] + 0.1


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({"freeze": "none"}, set()),
        ({"freeze": "all_loaded"}, {"position embedding", "encoder", "decoder", "adapter text"}),
        ({"take": "adapters"}, set()),
    ],
)
def test_freezing_and_taking_can_be_chosen(
    shops: dict[str, Path], pretrained: Path, options: dict, frozen: set[str]
) -> None:
    catalogue = Catalogue.load(shops["tools"] / "catalogue")
    model = build_missrec(Recipe.load("pretrain", SMALL).model, catalogue)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_pretrained(model, catalogue, read_source(pretrained), **({"freeze": "none"} | options))
    parts = _parts(report)
    assert {name for name, part in parts.items() if part["frozen"]} == frozen
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert report["trainable_parameters"] == trainable
    if options.get("take") == "adapters":
        assert parts["encoder"]["status"] == "re-initialised"
        assert torch.equal(model.state_dict()["encoder.norm.weight"], before["encoder.norm.weight"])
        assert not torch.equal(
            model.state_dict()["item_encoder.adapters.text.weight"], before["item_encoder.adapters.text.weight"]
        )


def test_an_ordinary_run_of_another_shop_can_be_the_source(shops: dict[str, Path], tmp_path: Path) -> None:
    settings = ONE_EPOCH | {"model.item_ids": True}
    train(shops["books"], tmp_path / "books", recipe="pretrain", settings=settings)
    result = train(
        shops["tools"], tmp_path / "tools", start_from=tmp_path / "books", recipe="pretrain", settings=settings
    )
    parts = _parts(result["weight_loading"])
    assert parts["adapter text"]["status"] == "loaded"
    assert (parts["item IDs"]["status"], parts["item IDs"]["note"]) == ("re-initialised", "of this catalogue's items")


def test_a_run_of_the_recipe_pretrain_fits_the_recipe_default(tmp_path: Path) -> None:
    require_same(Recipe.load("default").model, Recipe.load("pretrain").model, tmp_path)


def test_a_model_without_interests_does_not_start_from_one_with_them(tmp_path: Path) -> None:
    """Its decoder has learned to read a memory."""
    ours, theirs = (Recipe.load("default", {"model.interest_ratio": ratio}).model for ratio in (0.0, 0.02))
    with pytest.raises(CheckpointError, match=r"interest_ratio 0.0; .*add --set model.interest_ratio=0.02"):
        require_same(ours, theirs, tmp_path)
    require_same(theirs, Recipe.load("default", {"model.interest_ratio": 0.5}).model, tmp_path)


def test_ids_are_initialised_from_content(shops: dict[str, Path], pretrained: Path) -> None:
    """The first scores are then those of the modalities, which random IDs would outweigh."""
    catalogue = Catalogue.load(shops["tools"] / "catalogue")
    config = Recipe.load("pretrain", SMALL | {"model.item_ids": True}).model
    model = build_missrec(config, catalogue)
    initial = model.item_encoder.id_embedding.weight.detach().norm(dim=-1).mean()
    report = load_pretrained(model.train(), catalogue, read_source(pretrained), id_init="content")
    assert model.training
    candidates = model.eval().candidates()
    torch.testing.assert_close(candidates.ids[3:], candidates.modality[0, 3:])  # one modality: the same direction
    assert model.item_encoder.id_embedding.weight[5].norm().item() == pytest.approx(initial.item())
    assert _parts(report)["item IDs"]["note"] == "initialised from the items' content"


@pytest.mark.parametrize("rows_at_once", [7, 1 << 16])
def test_ids_are_initialised_from_content_without_another_run(
    shops: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    from missrec_t4r.training.state import TrainingData
    from missrec_t4r.training.trainer import Trainer

    monkeypatch.setattr("missrec_t4r.training.warm_start.id_init._CHUNK_ROWS", rows_at_once)
    catalogue = Catalogue.load(shops["toys"] / "catalogue")
    sessions = Sessions.load(shops["toys"] / "train"), Sessions.load(shops["toys"] / "valid")
    settings = SMALL | {"model.item_ids": True, "train.id_init": "content"}
    model = Trainer(Recipe.load("pretrain", settings), TrainingData(catalogue, *sessions), tmp_path).model.eval()
    candidates = model.candidates()
    both = torch.nn.functional.normalize(candidates.modality.sum(0), dim=-1)
    torch.testing.assert_close(candidates.ids[3:], both[3:])


def test_unfit_runs_and_options_are_errors_with_their_cure(
    shops: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    out, tools = tmp_path / "run", shops["tools"]
    with pytest.raises(CheckpointError, match=r"d_model 32.*d_model 16.*--set model.d_model=16 --set model.n_decoder"):
        train(
            tools,
            out,
            start_from=pretrained,
            recipe="pretrain",
            settings=SMALL | {"model.d_model": 32, "model.n_decoder_layers": 3},
        )
    with pytest.raises(CheckpointError, match="add --set model.feature_scaling=l2"):
        train(tools, out, start_from=pretrained, recipe="pretrain", settings=SMALL | {"model.feature_scaling": "none"})
    with pytest.raises(CheckpointError, match=r"would be frozen without having been loaded.*--freeze none"):
        train(
            tools,
            out,
            start_from=pretrained,
            freeze="encoder_decoder",
            take="adapters",
            recipe="pretrain",
            settings=SMALL,
        )
    with pytest.raises(ConfigError, match="--freeze 'everything'.*encoder_decoder"):
        train(tools, out, start_from=pretrained, freeze="everything", recipe="pretrain", settings=SMALL)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="a finished run"):
        train(tools, out, start_from=tmp_path / "nowhere", recipe="pretrain", settings=SMALL)
    with pytest.raises(CheckpointError, match="missrec train --from"):
        load_run(pretrained)
    assert not out.exists()


def test_vectors_of_another_or_an_unknown_encoder_are_an_error(pretrained: Path, tmp_path: Path) -> None:
    other = modality(angles(9), TEXT_WIDTH, 9, "other-text@1")
    write_shop(tmp_path / "other", list("abcdefghi"), {"text": other})
    with pytest.raises(CheckpointError, match=r"here text \(other-text@1\).*text \(ring-text@1\)"):
        train(tmp_path / "other", tmp_path / "run", start_from=pretrained, recipe="pretrain", settings=SMALL)
    write_shop(tmp_path / "silent", list("abcdefghi"), {"text": modality(angles(9), TEXT_WIDTH, 1, None)})
    with pytest.raises(ModalityError, match="--fingerprint text="):
        train(tmp_path / "silent", tmp_path / "run", start_from=pretrained, recipe="pretrain", settings=SMALL)


def test_a_modality_of_another_encoder_beside_a_common_one_is_initialised(pretrained: Path, tmp_path: Path) -> None:
    modalities = {
        "text": modality(angles(9), TEXT_WIDTH, 1, "ring-text@1"),
        "image": modality(angles(9), IMAGE_WIDTH, 4, "other-image@1"),
    }
    write_shop(tmp_path / "shop", list("abcdefghi"), modalities)
    result = train(tmp_path / "shop", tmp_path / "run", start_from=pretrained, recipe="pretrain", settings=ONE_EPOCH)
    parts = _parts(result["weight_loading"])
    assert parts["adapter text"]["status"] == "loaded"
    assert parts["adapter image"]["status"] == "re-initialised"
    assert parts["adapter image"]["note"] == "no modality of this encoder there"


def test_an_interrupted_transfer_is_not_resumed_from_another_source(
    shops: dict[str, Path], pretrained: Path, tmp_path: Path
) -> None:
    from missrec_t4r.training.trainer import Trainer

    class Killed(Exception):
        pass

    def dies(self: Trainer, epoch: int) -> None:
        if epoch == 1:
            raise Killed
        self.model.discover_interests(0)

    settings = SMALL | {"train.epochs": 3}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(shops["tools"], whole, start_from=pretrained, recipe="pretrain", settings=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "refresh_interests", dies)
        with pytest.raises(Killed):
            train(shops["tools"], killed, start_from=pretrained, recipe="pretrain", settings=settings)
    with pytest.raises(ConfigError, match="--restart"):
        train(shops["tools"], killed, start_from=pretrained, freeze="none", recipe="pretrain", settings=settings)
    train(shops["tools"], killed, start_from=pretrained, recipe="pretrain", settings=settings)
    assert (killed / "run.json").is_file()
