"""What each shipped recipe trains, value by value: a change here changes published results."""

from typing import Any

import pytest

from missrec_t4r.config import MISSRecConfig, Recipe, TrainConfig, shipped_recipes

DEFAULT: dict[str, Any] = {
    "model.d_model": 300,
    "model.n_head": 4,
    "model.d_feedforward": 256,
    "model.n_encoder_layers": 1,
    "model.n_decoder_layers": 2,
    "model.dropout": 0.3,
    "model.layer_norm_eps": 1e-12,
    "model.max_sequence_length": 50,
    "model.attention": "causal",
    "model.sequence_fusion": "add",
    "model.contextual_readout": "mean",
    "model.candidate_fusion": "static",
    "model.single_modality": "fused",
    "model.item_ids": True,
    "model.candidate_ids": "shared",
    "model.interest_ratio": 0.0,
    "model.interest_algorithm": "kmeans",
    "model.missing_modality": "masked",
    "model.padding_candidate": False,
    "model.initialisation": "normal",
    "model.feature_scaling": "l2",
    "model.history_bias": True,
    "model.n_neighbours": 128,
    "model.n_similar_items": 32,
    "model.cold_start_exposure": 0.0,
    "model.rare_item_cost": 0.005,
    "model.temperature": 0.07,
    "model.orthogonality": "cosine",
    "model.orthogonality_weight": 1e-4,
    "model.modality_dropout": 0.2,
    "model.mask_untrained_ids": True,
    "model.id_dropout": 0.1,
    "model.event_features": "auto",
    "model.event_feature_width": 32,
    "model.event_feature_dropout": 0.3,
    "train.learning_rate": 1e-3,
    "train.weight_decay": 0.0,
    "train.batch_size": 512,
    "train.group_by_length": True,
    "train.epochs": 40,
    "train.patience": 5,
    "train.max_minutes": 0.0,
    "train.seed": 2020,
    "train.windows_per_session": 0,
    "train.last_window_probability": 0.0,
    "train.next_items": 2,
    "train.next_items_weight": 0.3,
    "train.id_init": "content",
    "train.reverse_probability": 0.3,
    "train.ema_decay": 0.98,
    "train.warmup_steps": 0,
    "train.validation_sessions": 0,
    "train.refresh_interests_every": 1,
    "train.softmax": "auto",
    "train.negatives": 8192,
    "train.chunk_size": 8192,
    "train.accumulate": 1,
    "train.precision": "auto",
    "train.compile": False,
    "train.cuda_graphs": True,
    "train.schedule": "constant",
    "train.clip_norm": 0.0,
    "train.checkpoint_minutes": 5.0,
    "train.tensorboard": False,
    "pretrain.objective": "contrastive",
    "pretrain.sequence_sequence_weight": 1e-3,
    "pretrain.item_drop_share": 0.9,
    "pretrain.item_drop_probability": 0.2,
    "pretrain.word_drop_probability": 0.2,
    "pretrain.popularity_correction": False,
    "pretrain.refresh_interests": False,
    "pretrain.keep_adapters": False,
}
NO_AUGMENTATION: dict[str, Any] = {
    "train.next_items": 1,
    "train.id_init": "random",
    "train.reverse_probability": 0.0,
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "default": {},
    "long": NO_AUGMENTATION
    | {
        "model.d_model": 128,
        "model.max_sequence_length": 200,
        "model.dropout": 0.1,
        "model.temperature": 0.05,
        "model.modality_dropout": 0.1,
        "model.id_dropout": 0.05,
        "train.learning_rate": 0.002,
        "train.batch_size": 2048,
        "train.epochs": 80,
        "train.patience": 8,
        "train.windows_per_session": 1,
        "train.last_window_probability": 0.5,
        "train.ema_decay": 0.99,
        "train.validation_sessions": 2000,
    },
    "paper": NO_AUGMENTATION
    | {
        "model.n_decoder_layers": 1,
        "model.dropout": 0.5,
        "model.attention": "bidirectional",
        "model.contextual_readout": "first",
        "model.candidate_fusion": "dynamic_shared",
        "model.single_modality": "summed",
        "model.interest_ratio": 0.5,
        "model.missing_modality": "zero_row",
        "model.padding_candidate": True,
        "model.initialisation": "release",
        "model.feature_scaling": "none",
        "model.history_bias": False,
        "model.n_neighbours": 0,
        "model.n_similar_items": 0,
        "model.rare_item_cost": 0.0,
        "model.orthogonality": "faithful",
        "model.modality_dropout": 0.0,
        "model.mask_untrained_ids": False,
        "model.id_dropout": 0.0,
        "model.event_features": "none",
        "train.epochs": 100,
        "train.patience": 10,
        "train.ema_decay": 0.0,
        "train.precision": "fp32",
    },
    "pretrain": NO_AUGMENTATION
    | {
        "model.candidate_fusion": "dynamic_shared",
        "model.item_ids": False,
        "model.n_neighbours": 0,
        "model.n_similar_items": 0,
        "model.dropout": 0.5,
        "model.temperature": 0.12,
        "model.modality_dropout": 0.0,
        "model.id_dropout": 0.0,
        "model.event_features": "none",
        "train.batch_size": 1024,
        "train.ema_decay": 0.0,
        "train.validation_sessions": 2000,
    },
    "tiny": NO_AUGMENTATION
    | {
        "model.d_model": 32,
        "model.n_head": 2,
        "model.d_feedforward": 32,
        "model.n_decoder_layers": 1,
        "model.dropout": 0.1,
        "model.candidate_fusion": "dynamic_shared",
        "model.interest_ratio": 0.5,
        "model.modality_dropout": 0.0,
        "model.id_dropout": 0.0,
        "train.batch_size": 256,
        "train.epochs": 2,
        "train.ema_decay": 0.9,
        "train.precision": "fp32",
    },
}
"""What differs from `DEFAULT`, as the versions before `extends` resolved it."""


def effective(recipe: Recipe) -> dict[str, Any]:
    sections = {name: values for name, values in recipe.to_dict().items() if name != "name"}
    return {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}


def test_the_table_covers_every_recipe() -> None:
    assert sorted(DIFFERENCES) == shipped_recipes()


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_recipe_trains_what_it_always_trained(name: str) -> None:
    assert effective(Recipe.load(name)) == DEFAULT | DIFFERENCES[name]


def test_the_defaults_in_python_are_the_recipe_default() -> None:
    assert Recipe() == Recipe.load("default")
    assert (MISSRecConfig(), TrainConfig()) == (Recipe().model, Recipe().train)


def test_paper_in_python_is_the_recipe_paper() -> None:
    assert MISSRecConfig.paper() == Recipe.load("paper").model
    assert TrainConfig.paper() == Recipe.load("paper").train
    assert MISSRecConfig.paper(dropout=0.1).dropout == 0.1
