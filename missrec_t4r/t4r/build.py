"""Conversions between a recipe, a T4R model and the pure-torch model inside it; weights are shared, never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers4rec.torch as tr

from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.errors import ConfigError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.t4r.block import MISSRecBlock
from missrec_t4r.t4r.inputs import MultiModalSequenceFeatures
from missrec_t4r.t4r.masking import PrefixMasking
from missrec_t4r.t4r.task import MISSRecNextItemTask


def build_model(
    recipe: Recipe,
    schema: Any,
    catalogue: Catalogue,
    *,
    masking: str | PrefixMasking = "prefix",
    top_k: int | None = None,
    event_features: Sequence[EventColumn] | None = None,
) -> tr.Model:
    """Build the T4R model of a recipe: the same object as inputs, block, task and Head written by hand.

    Parameters
    ----------
    recipe : Recipe
        Its model settings, the seed of the clustering and the initial ID embeddings.
    schema : Merlin schema
        Columns to read; the recipe's ``model.event_features`` chooses among the event columns.
    catalogue : Catalogue
    masking : str or PrefixMasking
        As in `MultiModalSequenceFeatures.from_schema`.
    top_k : int, optional
        Number of items returned at inference; None returns all scores.
    event_features : sequence of EventColumn, optional
        The event features with their statistics, in place of those of the schema.
    """
    block = MISSRecBlock(config=recipe.model, seed=recipe.train.seed, id_init=recipe.train.id_init)
    return _assemble(block, schema, catalogue, masking, event_features, top_k)


def missrec_block(model: tr.Model) -> MISSRecBlock:
    """Return the model's one `MISSRecBlock`."""
    blocks = [module for module in model.modules() if isinstance(module, MISSRecBlock)]
    if len(blocks) != 1:
        raise ConfigError(
            f"a model with {len(blocks)} MISSRecBlock", "one", "build it with missrec_t4r.t4r.build_model"
        )
    return blocks[0]


def to_core(model: tr.Model) -> MISSRec:
    """Return the pure-torch model inside a T4R model: same weights (shared, not copied), same scores, bit for bit.

    Raises
    ------
    ConfigError
        Another module stands between inputs and block; the core has no such part.
    """
    block = missrec_block(model)
    if block.core is None:
        raise ConfigError("a MISSRecBlock without a Head", "a model built by tr.Head and tr.Model")
    if block.side_projection is not None:
        raise ConfigError(
            "a model with another module between its inputs and its MISSRecBlock",
            "tr.SequentialBlock(inputs, MISSRecBlock(...))",
            "evaluate it with tr.Trainer, or leave the module out",
        )
    return block.core


def from_core(core: MISSRec, schema: Any, catalogue: Catalogue, *, top_k: int | None = None) -> tr.Model:
    """Return a T4R model around a pure-torch one, to continue its training with ``tr.Trainer``; weights are shared.

    Parameters
    ----------
    core : MISSRec
        For example of ``load_run(run).model``.
    schema : Merlin schema
        Its item column is read, and the event features that the core has.
    catalogue : Catalogue
        The one that the core was built for.
    """
    if core.item_encoder.n_rows != catalogue.n_rows:
        raise ConfigError(
            f"a model of {core.item_encoder.n_rows} rows and a catalogue of {catalogue.n_rows}",
            "the same catalogue",
            "for another one build a new model, and load_continued(to_core(model), catalogue, read_source(RUN))",
        )
    block = MISSRecBlock(config=core.config)
    block.core = core
    return _assemble(block, schema, catalogue, "prefix", core.event_columns, top_k)


def _assemble(
    block: MISSRecBlock,
    schema: Any,
    catalogue: Catalogue,
    masking: str | PrefixMasking,
    event_features: Sequence[EventColumn] | None,
    top_k: int | None,
) -> tr.Model:
    config, core = block.settings.config, block.core
    inputs = MultiModalSequenceFeatures.from_schema(
        schema, catalogue=catalogue, config=config, masking=masking, event_features=event_features
    )
    if core is not None and core.event_features is not None:
        inputs.event_features = core.event_features.encoder
    task = MISSRecNextItemTask(config=config)
    model = tr.Model(tr.Head(tr.SequentialBlock(inputs, block), [task], inputs=inputs))
    model.top_k = top_k
    return model
