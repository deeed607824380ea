"""What Transformers4Rec silently expects of inputs, bodies and tasks, and what its parts do: docs/t4r_contract.md."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags
from transformers4rec.torch.masking import masking_registry
from transformers4rec.torch.ranking_metric import MeanReciprocalRankAt, NDCGAt, RecallAt
from transformers4rec.torch.utils.data_utils import dataloader_registry

from missrec_t4r.config import Recipe
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.t4r import (
    MISSRecBlock,
    MISSRecNextItemTask,
    MultiModalSequenceFeatures,
    PrefixMasking,
    build_model,
    load_schema,
    to_core,
)
from missrec_t4r.t4r.build import missrec_block
from missrec_t4r.t4r.columns import item_column
from missrec_t4r.t4r.loader import PrefixLoader
from tests.contract import shop

SMALL = shop.SMALL


def by_hand(schema: Any = None, **task: Any) -> tr.Model:
    inputs = MultiModalSequenceFeatures.from_schema(
        schema or shop.schema(), catalogue=shop.catalogue(), max_sequence_length=shop.MAX_LENGTH
    )
    body = tr.SequentialBlock(inputs, MISSRecBlock(**SMALL))
    return tr.Model(tr.Head(body, [MISSRecNextItemTask(**task)], inputs=inputs))


def a_batch(data: Path, loader: Callable[..., Any], rows: int = 8) -> dict[str, torch.Tensor]:
    return next(iter(loader("merlin", data / "valid", shop.schema(), batch_size=rows, shuffle=False)))[0]


def test_our_parts_are_in_t4rs_registries() -> None:
    assert masking_registry.parse("prefix") is PrefixMasking
    assert dataloader_registry.parse("missrec") is PrefixLoader


def test_inputs_and_body_report_three_dimensions() -> None:
    model = by_hand()
    body = model.heads[0].body
    assert len(body.inputs.output_size()) == 3
    assert list(body.output_size()) == [-1, shop.MAX_LENGTH, SMALL["d_model"]]


def test_inputs_have_the_names_that_t4rs_heads_and_tasks_read(data: Path, loader: Callable[..., Any]) -> None:
    model = by_hand().eval()
    inputs = model.heads[0].body.inputs
    batch = a_batch(data, loader)
    model(dict(batch), testing=True)
    assert isinstance(inputs, tr.TabularSequenceFeatures)
    assert inputs.item_id == "item_id-list"
    assert torch.equal(inputs.categorical_module.item_seq, batch["item_id-list"])
    assert inputs.masking.masked_targets.shape == inputs.masking.mask_schema.shape == batch["item_id-list"].shape
    assert model.input_schema.column_names == shop.schema().column_names


def without_event_features(**changes: Any) -> tuple[tr.Model, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = build_model(Recipe(model=shop.config(**changes)), shop.schema(event_features=False), shop.catalogue())
    return model, {"item_id-list": torch.tensor([[5, 6, 8, 0], [40, 41, 0, 0]])}


def test_candidates_of_the_training_mode_are_not_those_of_the_next_evaluation() -> None:
    """T4R's own `Model.evaluate` leaves the model in training mode, in which modalities are dropped at random."""
    model, batch = without_event_features(modality_dropout=0.9, id_dropout=0.5)
    core, item_ids = to_core(model), batch["item_id-list"]
    with torch.no_grad():
        model.train()(dict(batch))
        found = model.eval()(dict(batch))
        assert torch.equal(found, core.score(core(item_ids), core.candidates(), item_ids))


def test_candidates_of_an_evaluation_in_bf16_are_not_those_of_the_model_after_it() -> None:
    """`T4RecTrainingArguments(bf16=True)` wraps the Trainer's calls alone; those of the script have full precision."""
    model, batch = without_event_features()
    with torch.no_grad():
        expected = model.eval()(dict(batch))
        for parameter in model.parameters():
            parameter.mul_(1.0)  # a new version of the weights: candidates are computed again
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(model(dict(batch), testing=True)["predictions"], expected)
        assert torch.equal(model(dict(batch)), expected)


def test_half_precision_keeps_losses_finite() -> None:
    """In fp16 a vector of zeros, that of a missing modality, cannot be divided by its length, which 1e-12 is not."""
    model, batch = without_event_features(dropout=0.0)
    losses = []
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            losses.append(float(model.eval()(dict(batch), testing=True)["loss"].detach()))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02)


def test_copies_on_several_gpus_are_refused_with_the_cure() -> None:
    """transformers wraps a model in `nn.DataParallel` where it sees several; its threads would share a step's state."""
    model, _ = without_event_features()
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES=0"):
        missrec_block(model)._replicate_for_data_parallel()


def test_a_sequential_block_hands_training_and_testing_to_all_but_its_last_module() -> None:
    heard = []

    class Ear(torch.nn.Module):
        def forward(self, x: Any, training: bool = False, testing: bool = False) -> Any:
            heard.append((training, testing))
            return x

    tr.SequentialBlock(Ear(), Ear())(torch.zeros(1), training=True, testing=True)
    assert heard == [(True, True), (False, False)], "why the block learns from StepState whether it trains"


def test_the_head_casts_targets_to_float_so_labels_come_from_the_masking(
    data: Path, loader: Callable[..., Any]
) -> None:
    assert torch.tensor(2**24 + 1).float().long() != 2**24 + 1, "T4R's cast loses large rows"
    model = by_hand().eval()
    batch = a_batch(data, loader)
    output = model(dict(batch), targets=torch.full((8,), 99), testing=True)
    lengths = (batch["item_id-list"] > 0).sum(1)
    assert torch.equal(output["labels"], batch["item_id-list"][torch.arange(8), lengths - 1])


def test_top_k_reaches_the_task_by_its_class(data: Path, loader: Callable[..., Any]) -> None:
    model = by_hand().eval()
    assert isinstance(model.prediction_tasks[0], tr.NextItemPredictionTask)
    scores = model(dict(a_batch(data, loader)))
    model.top_k = 7
    best, rows = model(dict(a_batch(data, loader)))
    assert best.shape == rows.shape == (8, 7)
    assert torch.equal(best, scores.gather(1, rows))
    assert not torch.isin(rows, torch.arange(3)).any()
    assert model.output_schema.column_names == ["item_id_scores", "item_ids"]


def test_metrics_by_rank_equal_t4rs_on_the_whole_catalogue(data: Path, loader: Callable[..., Any]) -> None:
    own = [NDCGAt(top_ks=[5, 20], labels_onehot=True), MeanReciprocalRankAt(top_ks=[20], labels_onehot=True)]
    theirs = copy.deepcopy(own)
    model = by_hand(metrics=own).eval()
    output = model(dict(a_batch(data, loader, 24)), testing=True)
    model.calculate_metrics(output["predictions"], output["labels"])
    for mine, other in zip(own, theirs, strict=True):
        other.update(output["predictions"], output["labels"])
        torch.testing.assert_close(mine.compute(), other.compute())
    found = model.compute_metrics(mode="eval")
    assert set(found) == {"next-item/ndcg_at_5", "next-item/ndcg_at_20", "next-item/mean_reciprocal_rank_at_20"}


def test_a_schema_with_one_row_more_than_the_catalogue_is_refused() -> None:
    assert item_column(shop.schema(maximum=shop.N_ROWS - 1), shop.N_ROWS).name == "item_id-list"
    with pytest.raises(SchemaError, match="up to 120; expected: at most 119: the catalogue's 120 rows"):
        item_column(shop.schema(maximum=shop.N_ROWS), shop.N_ROWS)


def test_equal_scores_rank_by_row_and_not_in_the_targets_favour() -> None:
    metric = MeanReciprocalRankAt(top_ks=[3], labels_onehot=True)
    model = by_hand(metrics=[metric]).eval()
    scores = torch.tensor(
        [[-torch.inf, 0.5, 0.5, 0.9, 0.5], [0.1, 0.1, 0.1, 0.1, 0.1], [-torch.inf, 0.2, *[-torch.inf] * 3]]
    )
    targets = torch.tensor([2, 4, 0])  # behind two, behind four, and one that cannot be recommended
    of_batch = model.calculate_metrics(scores, targets)["next-item/mean_reciprocal_rank_at"]
    assert float(of_batch) == pytest.approx((1 / 3 + 0 + 0) / 3)
    assert float(model.compute_metrics(mode="eval")["next-item/mean_reciprocal_rank_at_3"]) == pytest.approx(1 / 9)


def test_a_batch_of_one_row_breaks_t4rs_recall_and_not_ours(data: Path, loader: Callable[..., Any]) -> None:
    with pytest.raises(IndexError):
        RecallAt(top_ks=[10], labels_onehot=True)(torch.rand(1, 120), torch.tensor([5]))
    model = by_hand(metrics=[RecallAt(top_ks=[10, 500], labels_onehot=True)]).eval()
    output = model(dict(a_batch(data, loader, 1)), testing=True)
    batch_value = model.calculate_metrics(output["predictions"], output["labels"])["next-item/recall_at"]
    assert batch_value.shape == (2,)
    assert float(batch_value[1]) == 1.0, "cut-off 500 of 117 items: found, whatever the rank"


def test_null_and_unknown_items_are_dropped_with_their_event_features(data: Path, loader: Callable[..., Any]) -> None:
    model = by_hand().eval()
    clean = {
        "item_id-list": torch.tensor([[30, 31, 32, 0, 0]]),
        "category-list": torch.tensor([[6, 7, 1, 0, 0]]),
        "price-list": torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.0]]),
    }
    noisy = {
        "item_id-list": torch.tensor([[30, 2, 31, 1, 32]]),
        "category-list": torch.tensor([[6, 5, 7, 5, 1]]),
        "price-list": torch.tensor([[0.1, 9.0, 0.2, 9.0, 0.3]]),
    }
    assert torch.equal(model(dict(clean)), model(dict(noisy)))
    assert torch.equal(model(dict(clean), testing=True)["predictions"], model(dict(noisy), testing=True)["predictions"])


def test_a_row_whose_last_item_is_unknown_is_not_evaluated_on_an_earlier_one() -> None:
    """As with our loader, and in `missrec evaluate`: what came next is not the item before it."""
    model, _ = without_event_features()
    rows = {"item_id-list": torch.tensor([[30, 31, 2, 0], [33, 34, 35, 0], [36, 37, 38, 1], [39, 2, 40, 41]])}
    output = model.eval()(dict(rows), testing=True)
    assert output["labels"].tolist() == [35, 41]
    assert output["predictions"].shape == (2, shop.N_ROWS)
    assert model(dict(rows), training=True)["labels"].tolist() == [31, 34, 35, 37, 38, 40, 41]
    assert model(dict(rows)).shape == (4, shop.N_ROWS)


def test_rows_without_a_target_take_no_part_and_an_empty_batch_has_no_loss() -> None:
    model = by_hand(shop.schema(event_features=False)).train()
    one = {"item_id-list": torch.tensor([[30, 0, 0], [31, 32, 33]])}
    assert model(dict(one), training=True)["labels"].shape == (1,)
    output = model({"item_id-list": torch.tensor([[30], [31]])}, training=True)
    output["loss"].backward()
    assert torch.isfinite(output["loss"])
    assert output["predictions"].shape == (0, shop.N_ROWS)
    assert model.calculate_metrics(output["predictions"], output["labels"]) == {}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (shop.schema(maximum=shop.N_ROWS), "has row numbers up to 120; expected: at most 119"),
        (shop.schema().select_by_name(["category-list"]), "0 columns tagged ITEM_ID"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        MultiModalSequenceFeatures.from_schema(schema, catalogue=shop.catalogue())


def test_a_schema_with_two_or_scalar_item_columns_is_refused() -> None:
    item = shop.schema(event_features=False)["item_id-list"]
    two = shop.schema() + Schema([item.with_name("other-list")])
    with pytest.raises(SchemaError, match="2 columns tagged ITEM_ID"):
        MultiModalSequenceFeatures.from_schema(two, catalogue=shop.catalogue())
    floats = Schema([item.with_dtype("float32")])
    with pytest.raises(SchemaError, match="holds float32 lists"):
        MultiModalSequenceFeatures.from_schema(floats, catalogue=shop.catalogue())


def test_contradictions_are_refused_with_a_cure() -> None:
    schema, catalogue = shop.schema(), shop.catalogue()
    with pytest.raises(ConfigError, match="leave the target visible"):
        MultiModalSequenceFeatures.from_schema(schema, catalogue=catalogue, masking="clm")
    inputs = MultiModalSequenceFeatures.from_schema(schema, catalogue=catalogue)
    with pytest.raises(ConfigError, match="one MISSRecBlock on MultiModalSequenceFeatures"):
        tr.Head(tr.SequentialBlock(inputs, tr.MLPBlock([8])), [MISSRecNextItemTask()], inputs=inputs)
    with pytest.raises(ConfigError, match="no multiple of model.n_head"):
        tr.Head(tr.SequentialBlock(inputs, MISSRecBlock(d_model=10, n_head=3)), [MISSRecNextItemTask()], inputs=inputs)
    body = tr.SequentialBlock(inputs, MISSRecBlock(**SMALL))
    with pytest.raises(ConfigError, match=r"no table of item embeddings.*swap all three: tr\.SequentialBlock"):
        tr.Head(body, [tr.NextItemPredictionTask(weight_tying=True)], inputs=inputs)
    with pytest.raises(ConfigError, match=r"catalogue of type str; expected: a Catalogue\. .*Catalogue\.load"):
        MultiModalSequenceFeatures.from_schema(schema, catalogue="work/data/catalogue")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="MISSRecBlock has no model yet"):
        body(
            {
                "item_id-list": torch.tensor([[4, 5]]),
                "category-list": torch.ones(1, 2).long(),
                "price-list": torch.ones(1, 2),
            }
        )


@pytest.mark.parametrize(("maximum", "first"), [(116, 0), (117, 1), (118, None)])
def test_ids_that_seem_numbered_otherwise_than_the_catalogue_are_told(
    maximum: int, first: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    MultiModalSequenceFeatures.from_schema(shop.schema(maximum=maximum), catalogue=shop.catalogue())
    told = f"up to {maximum}, as if the catalogue's 117 items were numbered from {first}: they are rows from 3"
    assert [told in message for message in caplog.messages] == [True] * (first is not None)


def test_the_list_is_read_where_nvtabular_tags_the_count_of_items_as_items_too() -> None:
    count = ColumnSchema("item_id-count", dtype="int32", tags=[Tags.ITEM_ID, Tags.CATEGORICAL])
    assert item_column(shop.schema() + Schema([count])).name == "item_id-list"


def test_a_column_with_one_value_for_a_session_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """T4R's inputs repeat it at every event."""
    country = ColumnSchema("country", dtype="int64", tags=[Tags.CATEGORICAL], properties={"domain": {"max": 5}})
    user = ColumnSchema("user_id", dtype="int64", tags=[Tags.USER_ID, Tags.CATEGORICAL])
    schema = shop.schema() + Schema([country, user])
    MultiModalSequenceFeatures.from_schema(schema, catalogue=shop.catalogue())
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("not read: country, with one value for a session")
    caplog.clear()
    MultiModalSequenceFeatures.from_schema(schema, catalogue=shop.catalogue(), event_features="price")
    assert caplog.messages == [], "the columns were chosen"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"price-list": None}, "no values for the event features price-list in a training batch of shape [8, 10]"),
        ({"price-list": 1000.0}, "most values of price in a training batch are beyond the range"),
    ],
    ids=["fine", "absent", "raw"],
)
def test_event_features_that_train_nothing_are_told_once(
    data: Path, loader: Callable[..., Any], change: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    batch, model = a_batch(data, loader), by_hand().train()
    for name, factor in change.items():
        batch[name] = batch[name] * (factor or 0)
        if factor is None:
            del batch[name]
    for _ in range(2):
        model(dict(batch), training=True)
    assert [words in message for message in caplog.messages] == [True] * bool(words)


def test_raw_ids_in_place_of_rows_are_named(data: Path, loader: Callable[..., Any]) -> None:
    batch = a_batch(data, loader)
    batch["item_id-list"][0, 0] = 1039
    with pytest.raises(DataError, match=r"column 'item_id-list' holds 1039; expected: at most 119, .*not raw ids"):
        by_hand()(batch, training=True)


def test_event_features_reach_the_scores_and_gradients_reach_every_parameter(
    data: Path, loader: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    model = by_hand().train()
    batch = a_batch(data, loader, 24)
    model(dict(batch), training=True)["loss"].backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    model.eval()
    scores = model(dict(batch))
    for name in ("category-list", "price-list"):
        changed = dict(batch) | {name: torch.where(batch["item_id-list"] > 0, batch[name] * 0 + 1, batch[name])}
        assert not torch.equal(model(changed), scores)


def test_embedding_columns_are_event_features_too_and_are_hidden_with_their_item() -> None:
    style = ColumnSchema("style-list", dtype="float32", tags=[Tags.EMBEDDING, Tags.LIST], dims=(None, (0, 20), 4))
    model = by_hand(shop.schema(event_features=False) + Schema([style])).eval()
    batch = {"item_id-list": torch.tensor([[4, 6, 7, 8]]), "style-list": torch.rand(1, 4, 4)}
    vectors = model.heads[0].body(dict(batch), testing=True)
    for at, seen in ((3, False), (2, True)):
        changed = batch["style-list"].clone()
        changed[:, at] = 9
        again = model.heads[0].body(batch | {"style-list": changed}, testing=True)
        assert torch.equal(again, vectors) is not seen


def test_a_module_between_inputs_and_block_shapes_the_event_features(data: Path, loader: Callable[..., Any]) -> None:
    inputs = MultiModalSequenceFeatures.from_schema(shop.schema(), catalogue=shop.catalogue(), max_sequence_length=6)
    body = tr.SequentialBlock(inputs, tr.MLPBlock([12]), MISSRecBlock(**SMALL))
    model = tr.Model(tr.Head(body, [MISSRecNextItemTask()], inputs=inputs))
    assert body[2].side_projection.in_features == 12
    model(dict(a_batch(data, loader)), training=True)["loss"].backward()
    assert body[1][0][0].weight.grad.any()


@pytest.mark.parametrize("mode", ["training", "testing"])
def test_other_t4r_tasks_read_the_session_at_any_position(data: Path, loader: Callable[..., Any], mode: str) -> None:
    """T4R's tasks read the first position by default, which must not be the first item alone in training."""
    body, batch = by_hand().eval().heads[0].body, a_batch(data, loader, 33)
    of_some = (batch["item_id-list"] > 0).sum(1)
    batch = {name: values[(of_some > 2) & (of_some <= shop.MAX_LENGTH)] for name, values in batch.items()}
    output = body(dict(batch), **{mode: True})
    assert torch.equal(output, output[:, :1].expand_as(output))
    changed = batch["item_id-list"].clone()
    changed[:, 1] = 3 + changed[:, 1] % 100
    again = body(batch | {"item_id-list": changed}, **{mode: True})
    assert (again != output).any(-1).all()


def test_a_module_after_the_block_is_refused() -> None:
    inputs = MultiModalSequenceFeatures.from_schema(shop.schema(), catalogue=shop.catalogue())
    body = tr.SequentialBlock(inputs, MISSRecBlock(**SMALL), tr.MLPBlock([16]))
    with pytest.raises(ConfigError, match="after MISSRecBlock; expected: the block as the body's last module"):
        tr.Head(body, [MISSRecNextItemTask()], inputs=inputs)


def test_interests_refresh_by_a_step_counter_that_is_saved(data: Path, loader: Callable[..., Any]) -> None:
    model = build_model(Recipe(model=shop.config()), shop.schema(), shop.catalogue()).train()
    block = model.heads[0].body[1]
    block.refresh_steps = 2
    batch, centroids = a_batch(data, loader), []
    for _ in range(4):
        model(dict(batch), training=True)["loss"].backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad
        centroids.append(block.core.interests.centroids.clone())
    assert torch.equal(centroids[0], centroids[1])
    assert torch.equal(centroids[2], centroids[3])
    assert not torch.equal(centroids[1], centroids[2])
    assert model.state_dict()["heads.0.body.1.step"] == 4
    model(dict(batch), testing=True)
    model.eval()(dict(batch), training=True)
    assert int(block.step) == 4, "only training steps count"


def test_t4rs_older_schema_class_works(tmp_path: Path) -> None:
    from merlin_standard_lib import Schema as OldSchema

    text = """
    feature {
      name: "item_id-list_trim" type: INT value_count { min: 2 max: 20 }
      int_domain { name: "item_id/list" min: 1 max: 119 is_categorical: true }
      annotation { tag: "item_id" tag: "list" tag: "categorical" tag: "item" }
    }
    feature {
      name: "age_days-list_trim" type: FLOAT value_count { min: 2 max: 20 }
      annotation { tag: "continuous" tag: "list" }
    }
    """
    (tmp_path / "schema.pb").write_text(text, encoding="utf-8")
    old = OldSchema().from_proto_text(str(tmp_path / "schema.pb"))
    inputs = MultiModalSequenceFeatures.from_schema(old, catalogue=shop.catalogue())
    assert inputs.item_id == "item_id-list_trim"
    assert inputs.schema.column_names == ["item_id-list_trim", "age_days-list_trim"]


def test_a_schema_is_read_from_a_folder_or_a_file(data: Path, tmp_path: Path) -> None:
    assert load_schema(data) == load_schema(data / "schema.pbtxt")
    assert load_schema(data).column_names == shop.schema().column_names
    with pytest.raises(DataError, match="there is no schema .*schema.pbtxt.*missrec etl"):
        load_schema(tmp_path)
    (tmp_path / "schema.pbtxt").write_text("feature { name: 7 ", encoding="utf-8")
    with pytest.raises(DataError, match="is not a Merlin schema"):
        load_schema(tmp_path)


def test_a_trainer_without_sessions_says_what_to_pass() -> None:
    with pytest.raises(DataError, match="eval_dataset_or_path"):
        PrefixLoader.from_schema(shop.schema(), None, batch_size=4, max_sequence_length=8)
