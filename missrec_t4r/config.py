"""Settings, each with its default, its unit and its source; read from YAML recipes, written back to every run.

`MISSRecConfig.paper()` is the published method (arXiv:2308.11175) to the letter; the defaults are ours, and each
departure says why. Contradictions are reported all at once, in the words a user typed.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from missrec_t4r.errors import ConfigError

SequenceFusion = Literal["add", "contextual"]
CandidateFusionName = Literal["static", "dynamic_shared", "dynamic_instance"]
Attention = Literal["bidirectional", "causal"]
MissingModality = Literal["masked", "zero_row"]
Orthogonality = Literal["cosine", "faithful"]
FeatureScaling = Literal["l2", "none"]
ContextualReadout = Literal["mean", "first"]
SingleModality = Literal["fused", "summed"]
Initialisation = Literal["normal", "release"]
InterestAlgorithm = Literal["kmeans", "dpc_knn"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
IdStart = Literal["random", "tokens"]
SoftmaxName = Literal["auto", "full", "chunked", "sampled"]
PretrainObjective = Literal["contrastive", "full_softmax"]


@dataclass(frozen=True, kw_only=True)
class MISSRecConfig:
    """Architecture of the model."""

    d_model: int = 300
    """Width of tokens and of the session vector."""
    n_head: int = 4
    """Attention heads; divides ``d_model``."""
    d_feedforward: int = 256
    """Width of the feed-forward layers (paper: 256)."""
    n_encoder_layers: int = 1
    """Layers of the contextual encoder."""
    n_decoder_layers: int = 1
    """Layers of the interest-aware decoder."""
    dropout: float = 0.5
    """Dropout of hidden states and of attention weights (paper: 0.5)."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every LayerNorm (paper: 1e-12)."""
    max_sequence_length: int = 50
    """Items of a session that the model sees, the most recent ones (paper: 50)."""
    attention: Attention = "causal"
    """``bidirectional``: one example is one prefix, as published. ``causal``: every position of a session is trained
    in one pass, several times faster; exact without interest tokens and with one decoder layer (docs/equations.md)."""
    sequence_fusion: SequenceFusion = "add"
    """``add``: an item is the sum of its modality tokens. ``contextual``: every modality keeps a token of its own."""
    contextual_readout: ContextualReadout = "mean"
    """Which output stands for the session under ``contextual`` fusion: the ``mean`` over the last item's modalities
    (ours), or the ``first`` modality's, as in the authors' release."""
    candidate_fusion: CandidateFusionName = "dynamic_shared"
    """How a candidate's modality scores are weighed (paper, dynamic candidate fusion)."""
    single_modality: SingleModality = "fused"
    """With one modality and IDs. ``fused``: scored apart, the modality twice, as with several modalities (ours).
    ``summed``: the score is the cosine with the sum of both, as in the authors' release."""
    item_ids: bool = True
    """True: transductive, items also have a learned ID embedding. False: inductive, any item with a feature scores."""
    interest_ratio: float = 0.5
    """Interest clusters per modality token of the catalogue (paper: 0.5 fine-tuning, 0.02 pre-training)."""
    interest_algorithm: InterestAlgorithm = "kmeans"
    """``kmeans``: mini-batch k-means, as in the published logs. ``dpc_knn``: density peaks, small catalogues only."""
    missing_modality: MissingModality = "masked"
    """``masked``: a missing modality is never attended to, clustered or scored. ``zero_row``: as published, its token
    is the adapter's bias."""
    padding_candidate: bool = False
    """True: the padding row, its tokens the adapters' biases, is one more class of the training softmax, as in the
    authors' release; it is never recommended. Needs ``missing_modality: zero_row``."""
    initialisation: Initialisation = "normal"
    """``normal``: normal(0, 0.02), biases 0. ``release``: that of the authors' code, which leaves the projections of
    queries, keys and values Xavier-uniform and the adapters at torch's default."""
    feature_scaling: FeatureScaling = "l2"
    """``l2``: modality vectors of unit length enter the adapters, so that encoders of any scale train alike (ours)."""
    history_bias: bool = True
    """Learn one number that is added to the score of items already in the session (ours: 1 % of targets repeat)."""
    n_neighbours: int = 128
    """Co-occurring items per item that the neighbour prior adds to the score when ranking, with a weight that
    validation chooses after training (ours: small shops are won by item-kNN otherwise); 0 switches it off."""
    n_lookalikes: int = 32
    """Items of the most similar content per candidate that the look-alike prior adds to the score when ranking, its
    weight chosen on validation after training (ours: the adapters forget what raw vectors know); 0 switches it off."""
    newcomer_exposure: float = 0.0
    """Places among the first ten that items without any event get, relative to what items with events are worth by
    their targets; others lose them (ours). Validation finds the level; 0: new items are last (docs/howto/train.md)."""
    temperature: float = 0.07
    """Divides scores before the softmax; > 0 (paper: 0.07)."""
    orthogonality: Orthogonality = "cosine"
    """``cosine``: mean squared cosine between different interest tokens of a session (ours). ``faithful``: the authors'
    regulariser, which depends on padding."""
    orthogonality_weight: float = 1e-4
    """Weight of the regulariser (paper: 1e-4)."""
    modality_dropout: float = 0.0
    """Probability that a training item loses one of its modalities; it never loses the last one (ours)."""
    mask_untrained_ids: bool = True
    """An item that never occurs in training is scored by its modalities alone (ours); False uses its untrained ID."""
    id_dropout: float = 0.0
    """Probability that a training item is treated as if it had no ID embedding (ours: prepares for new items)."""
    side_features: str = "auto"
    """Event columns that enter the item tokens: ``auto`` for every input column of the schema, ``none``, or names
    separated by commas (ours; the paper has none)."""
    side_width: int = 32
    """Numbers that each side feature becomes before it is projected to ``d_model``."""
    side_dropout: float = 0.3
    """Probability that a training session loses all side features, and again each of them: requests may lack them
    (docs/experiments.md: between 0.1 and 0.3 validation shows no difference)."""

    def __post_init__(self) -> None:
        _check_types(self)
        wrong = [
            (self.d_model % self.n_head != 0, f"--d-model {self.d_model} is no multiple of --n-head {self.n_head}"),
            (min(self.d_model, self.n_head, self.d_feedforward, self.max_sequence_length) < 1, "a size is below 1"),
            (self.n_encoder_layers < 0 or self.n_decoder_layers < 1, "--n-decoder-layers must be at least 1"),
            (not 0 <= self.dropout < 1, f"--dropout {self.dropout} is outside [0, 1)"),
            (self.n_neighbours < 0, f"--n-neighbours {self.n_neighbours} is negative"),
            (self.n_lookalikes < 0, f"--n-lookalikes {self.n_lookalikes} is negative"),
            (self.newcomer_exposure < 0, f"--newcomer-exposure {self.newcomer_exposure} is negative"),
            (self.temperature <= 0, f"--temperature {self.temperature} is not positive"),
            (not 0 < self.interest_ratio <= 1, f"--interest-ratio {self.interest_ratio} is outside (0, 1]"),
            (not 0 <= self.modality_dropout < 1, f"--modality-dropout {self.modality_dropout} is outside [0, 1)"),
            (not 0 <= self.id_dropout < 1, f"--id-dropout {self.id_dropout} is outside [0, 1)"),
            (self.side_width < 1, f"--side-width {self.side_width} is below 1"),
            (not 0 <= self.side_dropout < 1, f"--side-dropout {self.side_dropout} is outside [0, 1)"),
            (
                self.attention == "causal" and self.sequence_fusion == "contextual",
                "--sequence-fusion contextual needs --attention bidirectional",
            ),
            (
                self.padding_candidate and self.missing_modality == "masked",
                "--padding-candidate needs --missing-modality zero_row",
            ),
        ]
        _refuse([words for bad, words in wrong if bad])

    @classmethod
    def paper(cls, **changes: Any) -> MISSRecConfig:
        """Return the published configuration, as the authors' release has it.

        Examples
        --------
        >>> MISSRecConfig.paper().attention
        'bidirectional'
        """
        published: dict[str, Any] = {
            "attention": "bidirectional",
            "missing_modality": "zero_row",
            "padding_candidate": True,
            "contextual_readout": "first",
            "single_modality": "summed",
            "initialisation": "release",
            "feature_scaling": "none",
            "history_bias": False,
            "n_neighbours": 0,
            "n_lookalikes": 0,
            "newcomer_exposure": 0.0,
            "mask_untrained_ids": False,
            "side_features": "none",
            "orthogonality": "faithful",
        }
        return cls(**(published | changes))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tuning on one data set."""

    learning_rate: float = 1e-3
    """Adam's step size (paper: 1e-3)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (paper: none)."""
    batch_size: int = 512
    """Trained positions per optimiser step, as published for prefixes; sessions are packed up to this number."""
    group_by_length: bool = True
    """Batches of sessions of similar length (ours: little padding). False: of random ones, as published, and slower."""
    epochs: int = 60
    """Upper limit of passes over the training sessions."""
    patience: int = 5
    """Epochs without a better validation NDCG@10 before training stops (paper: 10)."""
    max_minutes: float = 0.0
    """Stop after the epoch that passes this many minutes; 0 for no limit."""
    seed: int = 2020
    """Seeds initialisation, order, dropout and clustering."""
    windows_per_session: int = 0
    """Windows of ``max_sequence_length`` drawn per session and epoch; 0 takes every position once."""
    next_items: int = 1
    """How many following items are targets of a position; 1 is the published objective."""
    next_items_weight: float = 0.3
    """Weight of the targets after the first; the first has 1."""
    id_start: IdStart = "random"
    """How ID embeddings start: ``random``, as published, or as the item's ``tokens`` (ours; random ones drown them)."""
    reverse_probability: float = 0.0
    """Probability that a training session is read backwards (ours, an augmentation)."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights that are evaluated and exported; 0 switches averaging off."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from zero."""
    validation_sessions: int = 0
    """Sessions ranked after every epoch, a fixed sample; 0 ranks all."""
    refresh_interests_every: int = 1
    """Epochs between two interest discoveries (paper: 1)."""
    softmax: SoftmaxName = "auto"
    """``full``: one score per position and item. ``chunked``: the same loss and gradients, the catalogue in pieces.
    ``sampled``: an estimate from the batch's targets and ``negatives`` random items, for millions of items.
    ``auto``: exact, chunked where a full table of scores would pass 256 MiB."""
    negatives: int = 8192
    """Random items per step that ``sampled`` compares with, beside the batch's targets."""
    chunk_size: int = 8192
    """Catalogue rows that ``chunked`` scores at once."""
    accumulate: int = 1
    """Parts in which a step's batch is worked through, for little memory; the step is that of the whole batch."""
    precision: Precision = "fp32"
    """Of matrix products; weights, softmax and optimiser stay in fp32. ``auto`` is bf16 where the device has
    instructions for it, on CPUs too; ``fp16`` needs a GPU."""
    compile: bool = False
    """Compile encoder and decoder with ``torch.compile``; needs a C++ compiler, pays off in long runs."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: ``constant`` (paper), or a ``cosine`` down to zero at the last of ``epochs``."""
    clip_norm: float = 0.0
    """Largest norm of a step's gradient, longer ones are scaled down; 0 for no limit (paper)."""
    checkpoint_minutes: float = 5.0
    """Minutes between two saved states within an epoch; 0 saves at the end of epochs only."""
    tensorboard: bool = False
    """Write the curves to ``tensorboard/`` in the run folder; needs ``pip install 'missrec-t4r[tensorboard]'``."""

    def __post_init__(self) -> None:
        _check_types(self)
        wrong = [
            (self.learning_rate <= 0, f"--learning-rate {self.learning_rate} is not positive"),
            (min(self.batch_size, self.epochs, self.patience, self.next_items) < 1, "a count is below 1"),
            (min(self.accumulate, self.negatives, self.chunk_size) < 1, "accumulate, negatives or chunk_size below 1"),
            (min(self.clip_norm, self.checkpoint_minutes) < 0, "clip_norm or checkpoint_minutes is negative"),
            (not 0 <= self.reverse_probability <= 1, "--reverse-probability is outside [0, 1]"),
            (not 0 <= self.ema_decay < 1, f"--ema-decay {self.ema_decay} is outside [0, 1)"),
        ]
        _refuse([words for bad, words in wrong if bad])


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What `missrec pretrain` does besides `TrainConfig`: objectives and augmented views over several domains."""

    objective: PretrainObjective = "contrastive"
    """``contrastive``: each position against the positives of its batch, as published. ``full_softmax``: against the
    union of all domains' items (ours; a harder task that costs a pass over the union per step)."""
    sequence_sequence_weight: float = 1e-3
    """Weight of the contrast between a session and its augmented view (paper: 1e-3); 0 makes no view."""
    item_drop_share: float = 0.9
    """Share of batches whose view leaves items out; the rest leave words out of texts (paper: 0.9). Without texts
    with words left out (`missrec features`) every view leaves items out."""
    item_drop_probability: float = 0.2
    """Probability that a view lacks an item; the first always stays (paper: 0.2)."""
    word_drop_probability: float = 0.2
    """Probability that an item of a view is read with words left out of its text (paper: 0.2)."""

    popularity_correction: bool = False
    """Take each candidate's log frequency off its logit: popular items are negatives more often (ours; logQ)."""
    refresh_interests: bool = False
    """False: interests are found once, under the first adapters, as published. True: as in fine-tuning, every
    ``train.refresh_interests_every`` epochs (ours: the encoder then learns on centroids like those it will meet)."""

    keep_adapters: bool = False
    """True: the adapters stay the random projections that they start as, which keep what raw vectors know; encoder and
    decoder alone learn, and are transferred with them (ours: trained adapters forget what other shops do not need)."""

    def __post_init__(self) -> None:
        _check_types(self)
        shares = ("item_drop_share", "item_drop_probability", "word_drop_probability")
        wrong = [
            (not 0 <= getattr(self, name) <= 1, f"pretrain.{name} {getattr(self, name)} is outside [0, 1]")
            for name in shares
        ]
        wrong.append((self.sequence_sequence_weight < 0, "pretrain.sequence_sequence_weight is negative"))
        _refuse([words for bad, words in wrong if bad])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named setting: the model and how it is trained."""

    name: str = "default"
    """Shown in tables and written to the run."""
    model: MISSRecConfig = field(default_factory=MISSRecConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Read by `missrec pretrain` alone."""

    @classmethod
    def load(cls, name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
        """Read a shipped recipe by name, or a YAML file by path.

        Parameters
        ----------
        name_or_path : str or Path
            ``"default"``, ``"paper"``, … or a path that ends in ``.yaml``.
        overrides : mapping, optional
            ``{"model.d_model": 128, "train.epochs": 3}``; wins over the file.

        Raises
        ------
        ConfigError
            Unknown recipe or key (the nearest known one is named), wrong type, or a contradiction.
        """
        text, name = _recipe_text(name_or_path)
        content = yaml.safe_load(text) or {}
        if not isinstance(content, dict):
            raise ConfigError(f"recipe {name} holds {type(content).__name__}", "a mapping with model: and train:")
        return cls.from_dict(_overridden({"name": name} | content, overrides or {}))

    def changed(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return the recipe with other settings, named as in `load`."""
        return Recipe.from_dict(_overridden(self.to_dict(), overrides))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """Build from a mapping as `to_dict` writes it."""
        _refuse_unknown(content, cls, "recipe")
        base = MISSRecConfig.paper if content.get("name") == "paper" else MISSRecConfig
        model, train, pretrain = (dict(content.get(part) or {}) for part in ("model", "train", "pretrain"))
        _refuse_unknown(model, MISSRecConfig, "model")
        _refuse_unknown(train, TrainConfig, "train")
        _refuse_unknown(pretrain, PretrainConfig, "pretrain")
        name = str(content.get("name", "default"))
        parts = {"train": TrainConfig(**train), "pretrain": PretrainConfig(**pretrain)}
        return cls(name=name, model=base(**model), **parts)  # type: ignore[arg-type]  # by name

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = importlib.resources.files("missrec_t4r.recipes")
    return sorted(entry.name[: -len(".yaml")] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _recipe_text(name_or_path: str | Path) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist", "a YAML file", "check the path")
        return path.read_text(encoding="utf-8"), path.stem
    if str(name_or_path) not in shipped_recipes():
        known = ", ".join(shipped_recipes())
        raise ConfigError(f"recipe {str(name_or_path)!r} is unknown", f"one of {known}, or a path to a .yaml file")
    file = importlib.resources.files("missrec_t4r.recipes") / f"{name_or_path}.yaml"
    return file.read_text(encoding="utf-8"), str(name_or_path)


def _overridden(content: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in overrides.items():
        part, _, setting = key.partition(".")
        if not setting:
            names = "model.NAME, train.NAME or pretrain.NAME"
            raise ConfigError(f"setting {key!r}", names, f"try model.{key} or train.{key}")
        content.setdefault(part, {})[setting] = value
    return content


def _refuse_unknown(content: Mapping[str, Any], settings: type[Any], where: str) -> None:
    known = [item.name for item in dataclasses.fields(settings)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            cure = f"did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown setting {where}.{key}", f"one of {', '.join(known)}", cure.rstrip("?") and cure)


def _check_types(settings: Any) -> None:
    hints = get_type_hints(type(settings))
    wrong = []
    for item in dataclasses.fields(settings):
        value, hint = getattr(settings, item.name), hints[item.name]
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                wrong.append(f"{item.name} is {value!r}, one of {', '.join(map(repr, get_args(hint)))} is expected")
        elif hint is float:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                wrong.append(f"{item.name} is {value!r}, a number is expected")
        elif type(value) is not hint:
            wrong.append(f"{item.name} is {value!r}, {hint.__name__} is expected")
    _refuse(wrong)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise ConfigError("; ".join(wrong), "", "correct the recipe or the --set options")
