"""Settings: recipes that extend each other, old names, and errors in the words of the command line."""

import json
from pathlib import Path

import pytest

from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig, shipped_recipes
from missrec_t4r.config.renamed import RENAMED
from missrec_t4r.errors import ConfigError


def test_overrides_win_over_the_recipe_and_survive_a_round_trip() -> None:
    recipe = Recipe.load("tiny", {"model.d_model": 64, "train.epochs": 7})
    assert (recipe.model.d_model, recipe.train.epochs) == (64, 7)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.load(recipe) == recipe
    assert Recipe.load(recipe, {"train.epochs": 8}) == Recipe.load("tiny", {"model.d_model": 64, "train.epochs": 8})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.d_modle": 64}, "d_model"),
        ({"model.d_model": "wide"}, "int is expected"),
        ({"model.d_model": 30, "model.n_head": 4}, "no multiple of model.n_head"),
        ({"model.n_head": 0}, "model.n_head 0 is below 1"),
        ({"model.attention": "sideways"}, "'bidirectional', 'causal'"),
        ({"epochs": 3}, "train.epochs"),
        ({"train.ema_decay": 1.0}, "train.ema_decay"),
        ({"train.learning_rate": True}, "a number is expected"),
        ({"train.learning_rate": float("nan")}, "learning_rate is nan, a number is expected"),
        ({"train.max_minutes": float("inf")}, "max_minutes is inf, a number is expected"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(overrides: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe.load("tiny", overrides)


def test_all_contradictions_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"model.dropout 2.0.*model.temperature -1.0"):
        MISSRecConfig(dropout=2.0, temperature=-1.0)


def test_an_unknown_recipe_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="default, long, paper, pretrain, tiny"):
        Recipe.load("papre")
    with pytest.raises(ConfigError, match="does not exist"):
        Recipe.load(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("train: {epochs: 2}\n")
    assert Recipe.load(tmp_path / "mine.yaml").train == TrainConfig(epochs=2)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def test_a_recipe_extends_shipped_ones_and_files_beside_it(tmp_path: Path) -> None:
    write(
        tmp_path,
        mine="extends: base.yaml\ntrain: {epochs: 3}",
        base="extends: paper\nname: ours\nmodel: {d_model: 64}\ntrain: {epochs: 9, patience: 2}",
    )
    recipe = Recipe.load(tmp_path / "mine.yaml", {"train.seed": 1})
    assert recipe.model == MISSRecConfig.paper(d_model=64)
    assert recipe.train == TrainConfig.paper(epochs=3, patience=2, seed=1)
    assert recipe.name == "mine", "a name is not inherited"


def test_a_recipes_name_and_its_files_name_have_no_influence(tmp_path: Path) -> None:
    write(tmp_path, paper="model: {d_model: 64}", default="extends: default\ntrain: {epochs: 1}")
    assert Recipe.load(tmp_path / "paper.yaml").model == MISSRecConfig(d_model=64)
    assert Recipe.load(tmp_path / "default.yaml").train == TrainConfig(epochs=1)
    assert Recipe.from_dict({"name": "paper"}).model == MISSRecConfig()
    assert Recipe.from_dict({"extends": "paper"}).model == MISSRecConfig.paper()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: papre", "mine extends 'papre': recipe 'papre' is unknown; expected: one of default, .* correct ext"),
        ("extends: other.yaml", "mine extends 'other.yaml': recipe file .*other.yaml does not exist"),
        ("extends: 3", "mine extends 3: .*is unknown"),
        ("extends: mine.yaml", "the recipes mine -> mine extend each other"),
        (
            "extends: a.yaml",
            "the recipes mine -> a -> b -> mine extend each other; expected: a chain that ends. remove",
        ),
        ("exends: paper", "unknown setting recipe.exends.*did you mean 'extends'"),
        ("model: 3", "model: is 3; expected: a mapping of settings"),
        ("model: {d_modle: 3}", "unknown setting model.d_modle.*did you mean 'd_model'"),
        ("- 3", "holds list; expected: a mapping"),
        ("model: [", "is not YAML .*; expected: a mapping"),
        ("model: 2026-13-45", "is not YAML .month must be in 1..12.; expected: a mapping"),
        ("[" * 5000, "is not YAML .*; expected: a mapping"),
    ],
)
def test_a_recipe_that_cannot_be_resolved_is_refused(tmp_path: Path, text: str, words: str) -> None:
    write(tmp_path, mine=text, a="extends: b.yaml", b="extends: mine.yaml")
    with pytest.raises(ConfigError, match=words):
        Recipe.load(tmp_path / "mine.yaml")


def test_numbers_of_a_recipe_may_be_written_as_in_python(tmp_path: Path) -> None:
    """PyYAML alone reads `1e-3` as a text."""
    write(tmp_path, mine="train: {learning_rate: 1e-3, weight_decay: .5E-2, epochs: 10}\nmodel: {temperature: 7e-2}")
    recipe = Recipe.load(tmp_path / "mine.yaml")
    assert (recipe.train.learning_rate, recipe.train.weight_decay, recipe.train.epochs) == (0.001, 0.005, 10)
    assert recipe.model.temperature == 0.07


def test_a_json_recipe_may_be_indented_by_tabs(tmp_path: Path) -> None:
    """YAML forbids them; `train.learning_rate` is as Python writes it."""
    text = json.dumps({"train": {"epochs": 2, "learning_rate": 1e-05}}, indent="\t")
    (tmp_path / "mine.json").write_text(text)
    assert Recipe.load(tmp_path / "mine.json").train == TrainConfig(epochs=2, learning_rate=1e-05)


def test_old_names_of_settings_are_accepted(tmp_path: Path) -> None:
    write(tmp_path, mine="model: {n_lookalikes: 4, side_features: none, side_width: 8}\ntrain: {id_start: tokens}")
    recipe = Recipe.load(tmp_path / "mine.yaml", {"model.newcomer_exposure": 1.0, "model.side_dropout": 0.1})
    assert recipe.model == MISSRecConfig(
        n_similar_items=4,
        event_features="none",
        event_feature_width=8,
        event_feature_dropout=0.1,
        cold_start_exposure=1.0,
    )
    assert recipe.train.id_init == "content"
    assert Recipe.load(tmp_path / "mine.yaml", {"model.n_similar_items": 5}).model.n_similar_items == 5
    with pytest.raises(ConfigError, match=r"train.id_init is given twice.* remove train.id_start"):
        Recipe.load("default", {"train.id_start": "random", "train.id_init": "random"})
    assert set(RENAMED.values()) <= {*vars(MISSRecConfig()), *vars(TrainConfig())}


def test_stored_settings_of_earlier_versions_keep_their_meaning() -> None:
    model = {"newcomer_exposure": 1, "side_features": "none", "candidate_fusion": "dynamic_shared"}
    old = {"name": "tiny", "model": model, "train": {"epochs": 2, "id_start": "tokens"}}
    recipe = Recipe.from_stored(old)
    assert (recipe.model.cold_start_exposure, recipe.model.event_features) == (1, "none")
    assert recipe.model.rare_item_cost == 0, "ranks as it was exported"
    assert (recipe.train.epochs, recipe.train.id_init) == (2, "content")
    assert Recipe.from_stored(recipe.to_dict()) == recipe

    first = {"name": "paper", "model": {"d_model": 32}, "train": {"epochs": 2}}  # wrote fewer settings
    assert Recipe.from_stored(first).model == MISSRecConfig.paper(d_model=32)
    assert Recipe.from_stored(first | {"name": "mine"}).train == TrainConfig(
        epochs=2, id_init="random", precision="fp32"
    )


def test_the_recipe_of_the_howto_loads(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "howto" / "train.md").read_text(encoding="utf-8")
    write(tmp_path, mine=text.partition("```yaml\n")[2].partition("```")[0])
    assert Recipe.load(tmp_path / "mine.yaml").model == MISSRecConfig(d_model=128)


def test_every_shipped_recipe_says_how_to_run_it() -> None:
    import importlib.resources

    assert shipped_recipes() == ["default", "long", "paper", "pretrain", "tiny"]
    for name in shipped_recipes():
        text = (importlib.resources.files("missrec_t4r.recipes") / f"{name}.yaml").read_text()
        assert "missrec train" in text.partition("model:")[0]
