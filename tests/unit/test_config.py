"""Settings: the published ones are one call away, and a wrong one is answered in the words of the command line."""

from pathlib import Path

import pytest

from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig, shipped_recipes
from missrec_t4r.errors import ConfigError


def test_the_paper_recipe_is_the_published_configuration() -> None:
    recipe = Recipe.load("paper")
    assert recipe.model == MISSRecConfig.paper()
    published = (recipe.model.d_model, recipe.model.dropout, recipe.model.temperature, recipe.train.batch_size)
    assert published == (300, 0.5, 0.07, 512)


def test_overrides_win_over_the_recipe_and_survive_a_round_trip() -> None:
    recipe = Recipe.load("tiny", {"model.d_model": 64, "train.epochs": 7})
    assert (recipe.model.d_model, recipe.train.epochs) == (64, 7)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.d_modle": 64}, "d_model"),
        ({"model.d_model": "wide"}, "int is expected"),
        ({"model.d_model": 30, "model.n_head": 4}, "no multiple of --n-head"),
        ({"model.attention": "sideways"}, "'bidirectional', 'causal'"),
        ({"epochs": 3}, "train.epochs"),
        ({"train.ema_decay": 1.0}, "--ema-decay"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.load("tiny", overrides)


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"--dropout 2.0.*--temperature -1.0"):
        MISSRecConfig(dropout=2.0, temperature=-1.0)


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="default, long, paper, pretrain, tiny"):
        Recipe.load("papre")
    with pytest.raises(ConfigError, match="does not exist"):
        Recipe.load(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("train: {epochs: 2}\n")
    assert Recipe.load(tmp_path / "mine.yaml").train == TrainConfig(epochs=2)


def test_every_shipped_recipe_says_how_to_run_it() -> None:
    import importlib.resources

    assert shipped_recipes() == ["default", "long", "paper", "pretrain", "tiny"]
    for name in shipped_recipes():
        text = (importlib.resources.files("missrec_t4r.recipes") / f"{name}.yaml").read_text()
        assert "missrec train" in text.partition("model:")[0]
