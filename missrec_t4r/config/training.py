"""Settings of training: fine-tuning on one data set, and what pre-training on several adds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from missrec_t4r.config.checks import check_limits, check_types

Precision = Literal["auto", "fp32", "bf16", "fp16"]
Schedule = Literal["constant", "cosine"]
IdInit = Literal["random", "content"]
SoftmaxName = Literal["auto", "full", "chunked", "sampled"]
PretrainObjective = Literal["contrastive", "full_softmax"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training on one data set.

    The defaults are those of the recipe ``default``; `TrainConfig.paper` is the published training.
    """

    learning_rate: float = 1e-3
    """Adam's step size (paper: 1e-3)."""
    weight_decay: float = 0.0
    """Decoupled weight decay (paper: none)."""
    batch_size: int = 512
    """Trained positions per optimiser step, as published for prefixes; sessions are packed up to this number."""
    group_by_length: bool = True
    """Batches of sessions of similar length (ours: little padding). False: of random ones, as published, and slower."""
    epochs: int = 40
    """Maximal number of passes over the training sessions (paper: 100)."""
    patience: int = 5
    """Epochs without a better validation NDCG@10 before training stops (paper: 10)."""
    max_minutes: float = 0.0
    """Training stops after the step in which this many minutes pass, keeps the best weights so far and records it in
    `run.json` as ``stopped_by``; the result then depends on the machine's speed. 0 for no limit."""
    seed: int = 2020
    """Seed of initialisation, order, dropout and clustering."""
    windows_per_session: int = 0
    """Random windows of ``max_sequence_length`` per session and epoch; 0 trains every position once."""
    last_window_probability: float = 0.0
    """Probability that a random window is the last one of its session (ours: what comes after the end is what a trained
    model is asked for); the others begin anywhere."""
    next_items: int = 2
    """How many of the following items are targets of a position (paper: 1)."""
    next_items_weight: float = 0.3
    """Weight of the targets after the first; the first has 1."""
    id_init: IdInit = "content"
    """Initial ID embeddings: ``random``, as published, or from the item's ``content``, the sum of its modality
    embeddings (ours: random ones outweigh the content until every item was trained often)."""
    reverse_probability: float = 0.3
    """Probability that a training batch of sessions is read backwards (ours, an augmentation)."""
    ema_decay: float = 0.98
    """Decay per step of the exponential moving average of the weights, which is evaluated and exported; 0 switches
    averaging off (paper)."""
    warmup_steps: int = 0
    """Steps in which the learning rate grows linearly from zero."""
    validation_sessions: int = 0
    """Sessions ranked after every epoch, a fixed random sample; 0 ranks all."""
    refresh_interests_every: int = 1
    """Epochs between two interest discoveries (paper: 1)."""
    softmax: SoftmaxName = "auto"
    """``full``: one score per position and item. ``chunked``: the same loss and gradients, the catalogue in pieces.
    ``sampled``: an estimate from the batch's targets and ``negatives`` random items, for millions of items.
    ``auto``: exact, chunked where the full score matrix would exceed 256 MiB."""
    negatives: int = 8192
    """Random items per step for the ``sampled`` softmax, beside the batch's targets."""
    chunk_size: int = 8192
    """Catalogue rows per piece of the ``chunked`` softmax."""
    accumulate: int = 1
    """Parts into which a step's batch is split to save memory; gradients are summed, the step is that of the whole
    batch."""
    precision: Precision = "auto"
    """Of matrix products; weights, softmax and optimiser stay in fp32. ``auto`` is bf16 where the device has
    instructions for it, CPUs included, up to 1.7 times as fast; ``fp16`` needs a GPU."""
    compile: bool = False
    """Compile encoder and decoder with ``torch.compile``; needs a C++ compiler, pays off in long runs."""
    cuda_graphs: bool = True
    """On a GPU, record training steps as CUDA graphs, which saves the time of launching their kernels: batches are
    padded to a few shapes, every recorded step is compared with one that is not, and where one differs or none can be
    recorded the log says so and training goes on without. Nothing on a CPU."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: ``constant`` (paper), or a ``cosine`` down to zero at the last of ``epochs``."""
    clip_norm: float = 0.0
    """Maximal norm of a step's gradient, longer ones are scaled down; 0 for no limit (paper)."""
    checkpoint_minutes: float = 5.0
    """Minutes between two checkpoints within an epoch; 0 saves at the end of epochs only."""
    tensorboard: bool = False
    """Write the curves to ``tensorboard/`` in the run folder; needs ``pip install 'missrec-t4r[tensorboard]'``."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("batch_size", "epochs", "patience", "next_items", "refresh_interests_every", "accumulate")
        amounts = ("weight_decay", "max_minutes", "next_items_weight", "clip_norm", "checkpoint_minutes")
        limits = {
            "is not positive": ("learning_rate",),
            "is below 1": (*sizes, "negatives", "chunk_size"),
            "is negative": (*amounts, "windows_per_session", "warmup_steps", "validation_sessions"),
            "is outside [0, 1]": ("reverse_probability", "last_window_probability"),
            "is outside [0, 1)": ("ema_decay",),
        }
        contradictions = [
            (
                self.last_window_probability > 0 and not self.windows_per_session,
                f"train.last_window_probability {self.last_window_probability} needs train.windows_per_session: with 0 "
                "every position is trained once",
            )
        ]
        check_limits(self, "train", limits, contradictions)

    @classmethod
    def paper(cls, **changes: Any) -> TrainConfig:
        """Return the published training: that of the recipe ``paper``, with ``changes`` if any.

        Examples
        --------
        >>> TrainConfig.paper().epochs
        100
        """
        from missrec_t4r.config.recipe import Recipe

        return dataclasses.replace(Recipe.load("paper").train, **changes)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Settings that pre-training has beside `TrainConfig`: objectives and augmented views over several domains."""

    objective: PretrainObjective = "contrastive"
    """``contrastive``: each position against the positives of its batch, as published. ``full_softmax``: against the
    union of all domains' items (ours; a harder task that costs a pass over the union per step)."""
    sequence_sequence_weight: float = 1e-3
    """Weight of the contrast between a session and its augmented view (paper: 1e-3); 0 makes no view."""
    item_drop_share: float = 0.9
    """Share of batches whose view drops items; in the rest it drops words of the items' texts (paper: 0.9). Without
    texts with dropped words (`missrec features`) every view drops items."""
    item_drop_probability: float = 0.2
    """Probability that a view lacks an item; the first item is always kept (paper: 0.2)."""
    word_drop_probability: float = 0.2
    """Probability that a view uses an item's text with dropped words (paper: 0.2)."""

    popularity_correction: bool = False
    """Subtract each candidate's log frequency from its logit: popular items are negatives more often (ours; logQ)."""
    refresh_interests: bool = False
    """False: interests are discovered once, with the initial adapters, as published. True: as in fine-tuning, every
    ``train.refresh_interests_every`` epochs (ours: the encoder then trains on centroids like those of fine-tuning)."""

    keep_adapters: bool = False
    """True: the adapters keep their random initial projections, which preserve the raw vectors' information; encoder
    and decoder alone are trained, and are transferred with them (ours: trained adapters lose what other data sets
    need)."""

    def __post_init__(self) -> None:
        check_types(self)
        shares = ("item_drop_share", "item_drop_probability", "word_drop_probability")
        check_limits(self, "pretrain", {"is outside [0, 1]": shares, "is negative": ("sequence_sequence_weight",)})
