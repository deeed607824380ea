"""One configuration of inputs, block and task: given as a whole, or setting by setting to any of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers4rec.torch as tr

from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.errors import ConfigError, SchemaError
from missrec_t4r.t4r import MISSRecBlock, MISSRecNextItemTask, MultiModalSequenceFeatures, build_model, to_core
from tests.contract import shop


def inputs(**settings: Any) -> MultiModalSequenceFeatures:
    return MultiModalSequenceFeatures.from_schema(shop.schema(), catalogue=shop.catalogue(), **settings)


def join(inputs: MultiModalSequenceFeatures, block: MISSRecBlock, task: MISSRecNextItemTask) -> tr.Model:
    return tr.Model(tr.Head(tr.SequentialBlock(inputs, block), [task], inputs=inputs))


def test_parts_without_settings_are_the_recipe_default() -> None:
    model = join(inputs(), MISSRecBlock(), MISSRecNextItemTask())
    assert to_core(model).config == Recipe.load("default").model


def test_ids_start_as_in_the_recipe_default() -> None:
    recipe = Recipe(model=MISSRecConfig(d_model=16, n_head=2))
    models = []
    for build in (
        lambda: join(inputs(), MISSRecBlock(d_model=16, n_head=2), MISSRecNextItemTask()),
        lambda: build_model(recipe, shop.schema(), shop.catalogue()),
    ):
        torch.manual_seed(0)
        models.append(to_core(build()).eval())
    by_hand, by_recipe = (model.state_dict() for model in models)
    assert [name for name in by_hand if not torch.equal(by_hand[name], by_recipe[name])] == []
    items = models[0].item_encoder.catalogue()
    content = (torch.nn.functional.normalize(items.modality, dim=-1) * items.mask.unsqueeze(-1)).sum(0)
    assert items.ids is not None
    assert (torch.cosine_similarity(content, items.ids)[items.mask.any(0)] > 0.99).all()


def test_settings_of_all_parts_make_one_config() -> None:
    model = join(
        inputs(max_sequence_length=6, side_dropout=0.1, embedding_dim_default=8),
        MISSRecBlock(d_model=16, n_head=2, attention="bidirectional"),
        MISSRecNextItemTask(temperature=0.1),
    )
    assert to_core(model).config == MISSRecConfig(
        max_sequence_length=6,
        event_feature_dropout=0.1,
        event_feature_width=8,
        d_model=16,
        n_head=2,
        attention="bidirectional",
        temperature=0.1,
    )


def test_keyword_arguments_win_over_the_config() -> None:
    config = MISSRecConfig(d_model=16, n_head=2, temperature=0.2)
    model = join(
        inputs(config=config), MISSRecBlock(config=config), MISSRecNextItemTask(config=config, temperature=0.1)
    )
    assert to_core(model).config == MISSRecConfig(d_model=16, n_head=2, temperature=0.1)
    alone = join(inputs(), MISSRecBlock(config=config), MISSRecNextItemTask())
    assert to_core(alone).config == config, "the other parts take the block's"


def test_the_config_chooses_the_event_features() -> None:
    names = {
        setting: [column.name for column in made.event_features.columns] if made.event_features else []
        for setting in ("auto", "none", "price", "price-list, category")
        for made in [inputs(config=MISSRecConfig(event_features=setting))]
    }
    assert names == {
        "auto": ["category", "price"],
        "none": [],
        "price": ["price"],
        "price-list, category": ["price", "category"],
    }
    with pytest.raises(SchemaError, match="without the event features colour"):
        inputs(config=MISSRecConfig(event_features="colour"))
    chosen = inputs(event_features="price").event_features
    assert chosen is not None
    assert [column.name for column in chosen.columns] == ["price"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MISSRecBlock(d_modle=16), "unknown setting MISSRecBlock.d_modle.*did you mean 'd_model'"),
        (lambda: MISSRecNextItemTask(temprature=1.0), "MISSRecNextItemTask.temprature.*did you mean 'temperature'"),
        (
            lambda: inputs(max_sequence_lenght=6),
            "MultiModalSequenceFeatures.max_sequence_lenght.*'max_sequence_length'",
        ),
        (lambda: MISSRecNextItemTask(weight_tying=True), r"Task\(weight_tying=.*as in Transformers4Rec;.*leave it out"),
        (lambda: inputs(aggregation="concat"), r"Features\(aggregation=.*projected to d_model"),
        (lambda: inputs(embeddings_initializers={}), "into the catalogue, as a modality"),
        (lambda: inputs(d_output=64, masking="prefix"), r"Features\(d_output=.* leave it out"),
        (lambda: MISSRecBlock(masking=None), r"Block\(masking=.* give it to MultiModalSequenceFeatures"),
        (lambda: MISSRecBlock(d_model="wide"), "d_model is 'wide', int is expected.*arguments of MISSRecBlock"),
        (lambda: MISSRecBlock(config="default"), "config='default'.*expected: a MISSRecConfig"),
        (
            lambda: join(inputs(), MISSRecBlock(d_model=16, n_head=2), MISSRecNextItemTask(n_head=4)),
            "MISSRecNextItemTask and MISSRecBlock have n_head 4 and 2",
        ),
        (
            lambda: join(
                inputs(config=MISSRecConfig()), MISSRecBlock(config=MISSRecConfig(d_model=8)), MISSRecNextItemTask()
            ),
            "MultiModalSequenceFeatures and MISSRecBlock have d_model 300 and 8",
        ),
        (
            lambda: join(inputs(), MISSRecBlock(config=MISSRecConfig(max_sequence_length=6)), MISSRecNextItemTask()),
            "MultiModalSequenceFeatures was built with max_sequence_length=50, the other parts have 6.* pass max_seq",
        ),
        (
            lambda: join(inputs(), MISSRecBlock(sequence_fusion="contextual"), MISSRecNextItemTask()),
            "model.sequence_fusion contextual needs model.attention bidirectional",
        ),
    ],
)
def test_wrong_settings_are_refused_with_a_cure(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
