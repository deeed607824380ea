"""Settings of the T4R parts: one `MISSRecConfig` for inputs, block and task, given as a whole or by keyword.

Each part accepts ``config=`` and any setting of `MISSRecConfig` as a keyword argument. A `Head` joins the parts, and
`merged` makes one configuration of them: the given config (by default that of the recipe ``default``), then the
keyword arguments of all parts. Two parts that contradict each other are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.config.checks import field_names, refuse, refuse_unknown, type_errors
from missrec_t4r.config.renamed import current_settings
from missrec_t4r.errors import ConfigError

_DEFAULT = MISSRecConfig()

_OF_T4R = {
    "weight_tying": "leave it out: sessions and candidates share the item encoder",
    "softmax_temperature": "write temperature=...",
    "loss": "leave it out: the loss is the softmax over the catalogue",
    "sampled_softmax max_n_samples": "leave it out: the softmax is over the whole catalogue",
    "target_dim padding_idx item_id": "leave it out: schema and catalogue state it",
    "task_block": "leave it out: candidates are scored by the session vector",
    "aggregation projection d_output": "leave it out: event features are projected to d_model and added to the items",
    "embeddings_initializers pretrained_output_dims normalizer": (
        "vectors of items belong into the catalogue, as a modality; vectors of events into a column tagged EMBEDDING"
    ),
    "embedding_dims infer_embedding_sizes infer_embedding_sizes_multiplier": (
        "write event_feature_width=..., the width of each event feature; items have d_model"
    ),
    "continuous_soft_embeddings soft_embedding_cardinality soft_embedding_cardinality_default soft_embedding_dim "
    "soft_embedding_dim_default": "leave it out: numbers always have soft one-hot embeddings",
    "tags continuous_tags categorical_tags pretrained_embeddings_tags automatic_build": (
        "leave it out: choose columns by schema.select_by_name, or by event_features='price,category'"
    ),
    "pre post": "leave it out: dropout=... and event_feature_dropout=... regularise",
    "masking": "give it to MultiModalSequenceFeatures.from_schema",
    "mlm_probability train_on_last_item_seq_only eval_on_last_item_seq_only": (
        "leave it out, or write masking=PrefixMasking(hidden_size=1, cut=...) for what is trained"
    ),
    "n_layer": "write n_encoder_layers=... and n_decoder_layers=...",
    "total_seq_length": "write max_sequence_length=...",
}
"""Arguments of T4R's inputs, transformers and task that ours have no use for, and what takes their place."""


class PartSettings:
    """What one part was given.

    Parameters
    ----------
    part : str
        Its class, for errors.
    config : MISSRecConfig or None
        None: whatever the other parts have.
    overrides : mapping of str to value
        Settings by name; old names are accepted (`missrec_t4r.config.renamed`).

    Raises
    ------
    ConfigError
        An unknown setting (the nearest known one is named) or a wrong type.
    """

    def __init__(self, part: str, config: MISSRecConfig | None, overrides: Mapping[str, Any]) -> None:
        if config is not None and not isinstance(config, MISSRecConfig):
            raise ConfigError(
                f"{part}(config={config!r})",
                "a MISSRecConfig",
                "write single settings as keyword arguments: d_model=300",
            )
        self.part, self.config = part, config
        self.overrides = current_settings(overrides, part)
        for names, cure in _OF_T4R.items():
            if given := set(names.split()) & set(self.overrides):
                raise ConfigError(f"{part}({min(given)}=...), as in Transformers4Rec", "arguments of ours", cure)
        refuse_unknown(self.overrides, field_names(MISSRecConfig), f"setting {part}.")
        refuse(type_errors(MISSRecConfig, self.overrides), f"correct the arguments of {part}")
        self.used: dict[str, Any] = {}
        """Settings that the part has already built something with."""

    def __getitem__(self, name: str) -> Any:
        """Return the part's own value of a setting, and remember that it is in use."""
        base = _DEFAULT if self.config is None else self.config
        self.used[name] = self.overrides.get(name, getattr(base, name))
        return self.used[name]


def merged(parts: Sequence[PartSettings]) -> MISSRecConfig:
    """Return the one configuration of a model's parts.

    Raises
    ------
    ConfigError
        Different configs, different values of one setting, or settings that contradict each other.
    """
    given = [part for part in parts if part.config is not None]
    base = _DEFAULT if not given or given[0].config is None else given[0].config
    overrides: dict[str, Any] = {}
    for part in parts:
        if part.config is not None and part.config != base:
            _contradiction(part, given[0], _difference(part.config, base))
        for name, value in part.overrides.items():
            if overrides.setdefault(name, value) != value:
                other = next(other for other in parts if name in other.overrides)
                _contradiction(part, other, f"{name} {value!r} and {overrides[name]!r}")
    config = dataclasses.replace(base, **overrides)
    for part in parts:
        for name, value in part.used.items():
            if getattr(config, name) != value:
                raise ConfigError(
                    f"{part.part} was built with {name}={value!r}, the other parts have {getattr(config, name)!r}",
                    "one configuration of a model",
                    f"pass {name}={getattr(config, name)!r} to {part.part} too, or the same config= to all parts",
                )
    return config


def _contradiction(part: PartSettings, other: PartSettings, words: str) -> None:
    raise ConfigError(
        f"{part.part} and {other.part} have {words}", "one configuration of a model", "give each setting one value"
    )


def _difference(config: MISSRecConfig, other: MISSRecConfig) -> str:
    values, others = vars(config), vars(other)
    return ", ".join(f"{name} {values[name]!r} and {others[name]!r}" for name in values if values[name] != others[name])
