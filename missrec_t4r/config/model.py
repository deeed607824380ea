"""Settings of the model: architecture, score terms, and what training does to its inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from missrec_t4r.config.checks import check_limits, check_types

SequenceFusion = Literal["add", "contextual"]
CandidateFusionName = Literal["static", "dynamic_shared", "dynamic_instance"]
Attention = Literal["bidirectional", "causal"]
MissingModality = Literal["masked", "zero_row"]
Orthogonality = Literal["cosine", "faithful"]
FeatureScaling = Literal["l2", "none"]
ContextualReadout = Literal["mean", "first"]
SingleModality = Literal["fused", "summed"]
Initialisation = Literal["normal", "release"]
CandidateIds = Literal["shared", "own"]
InterestAlgorithm = Literal["kmeans", "dpc_knn"]


@dataclass(frozen=True, kw_only=True)
class MISSRecConfig:
    """Architecture of the model and the terms of its score.

    The defaults are those of the recipe ``default``; `MISSRecConfig.paper` is the published method (arXiv:2308.11175).
    "(ours)" marks what the paper does not have.
    """

    d_model: int = 300
    """Width of the embeddings and of the session vector."""
    n_head: int = 4
    """Attention heads; divides ``d_model``."""
    d_feedforward: int = 256
    """Width of the feed-forward layers (paper: 256)."""
    n_encoder_layers: int = 1
    """Layers of the contextual encoder, which models without interests do not have."""
    n_decoder_layers: int = 2
    """Layers of the interest-aware decoder (paper: 1; ours: the second one costs what the interests did)."""
    dropout: float = 0.3
    """Dropout of hidden states and of attention weights (paper: 0.5, which costs larger data sets quality)."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in every LayerNorm (paper: 1e-12)."""
    max_sequence_length: int = 50
    """Items of a session that the model reads, the most recent ones (paper: 50)."""
    attention: Attention = "causal"
    """``bidirectional``: one example is one prefix, as published. ``causal``: every position of a session is trained
    in one pass, several times faster; exact without interest tokens and with one decoder layer (docs/equations.md)."""
    sequence_fusion: SequenceFusion = "add"
    """``add``: the sum of an item's modality embeddings enters the decoder. ``contextual``: every modality of an item
    is a position of its own."""
    contextual_readout: ContextualReadout = "mean"
    """Which output is the session vector under ``contextual`` fusion: the ``mean`` over the last item's modalities
    (ours), or that of the ``first`` modality, as in the authors' release."""
    candidate_fusion: CandidateFusionName = "static"
    """Weights of a candidate's modality scores. ``static``: equal ones (ours: the learned ones stay near equal, for
    twice the work). ``dynamic_shared`` and ``dynamic_instance``: computed per session and candidate, with one sharpness
    for all items or one per item (paper: dynamic candidate fusion)."""
    single_modality: SingleModality = "fused"
    """With one modality and IDs. ``fused``: both are scored separately and the modality counts twice, as with several
    modalities (ours). ``summed``: the score is the cosine with the sum of both, as in the authors' release."""
    item_ids: bool = True
    """True: transductive, items also have a learned ID embedding. False: inductive, any item with a modality vector can
    be scored."""
    candidate_ids: CandidateIds = "shared"
    """ID embeddings that score candidates. ``shared``: those that enter the sessions (paper). ``own``: others, which
    start as a copy (ours: by shared ones an item is most similar to itself, but what follows it is wanted)."""
    interest_ratio: float = 0.0
    """Interest clusters per modality embedding of the catalogue (paper: 0.5 fine-tuning, 0.02 pre-training). 0: a model
    without interests, that is without contextual encoder and attention to its memory (ours: interests made no
    difference on our data sets, and without them the model trains and serves faster)."""
    interest_algorithm: InterestAlgorithm = "kmeans"
    """``kmeans``: k-means on all embeddings of the catalogue (published logs: on mini-batches). ``dpc_knn``: density
    peaks, small catalogues only."""
    missing_modality: MissingModality = "masked"
    """``masked``: a missing modality is excluded from attention, clustering and scores. ``zero_row``: as published, its
    embedding is the adapter's bias."""
    padding_candidate: bool = False
    """True: the padding row, embedded as the adapters' biases, is one more class of the training softmax, as in the
    authors' release; it is never recommended. Needs ``missing_modality: zero_row``."""
    initialisation: Initialisation = "normal"
    """``normal``: normal(0, 0.02), biases 0. ``release``: that of the authors' code, which leaves the projections of
    queries, keys and values Xavier-uniform and the adapters at torch's default."""
    feature_scaling: FeatureScaling = "l2"
    """``l2``: modality vectors are scaled to unit length before the adapters, so that encoders of any scale train alike
    (ours). ``none``: as published."""
    history_bias: bool = True
    """Learn one number that is added to the score of items already in the session (ours: 1 % of targets repeat)."""
    n_neighbours: int = 128
    """Co-occurring items per item in the item-kNN term, which is added to the score at ranking time with a blend weight
    tuned on validation (ours: item-kNN alone is the strongest method on small data sets); 0 removes the term."""
    n_similar_items: int = 32
    """Most similar items by content per candidate in the content-kNN term, which is added to the score at ranking time
    with a blend weight tuned on validation (ours: the adapters lose part of the raw vectors' information); 0 removes
    the term."""
    cold_start_exposure: float = 0.0
    """Target share of the top 10 for cold-start items, those without training events, relative to their share of
    validation targets; warm items lose it (ours). The cold-start bias is calibrated on validation. 0 ranks cold items
    below all warm ones (docs/howto/train.md)."""
    rare_item_cost: float = 0.005
    """Share of the overall NDCG@10 on validation that the ranking of rare and cold items may cost at most (ours). The
    rare-item term weighs content by an item's number of training events, for items with fewer than five; it needs
    ``n_neighbours``. 0 removes the term."""
    temperature: float = 0.07
    """Divides scores before the softmax; > 0 (paper: 0.07)."""
    orthogonality: Orthogonality = "cosine"
    """``cosine``: mean squared cosine between different interest tokens of a session (ours). ``faithful``: the authors'
    regulariser, which depends on padding."""
    orthogonality_weight: float = 1e-4
    """Weight of the regulariser (paper: 1e-4)."""
    modality_dropout: float = 0.2
    """Probability that a training item loses one of its modalities, never its last one (ours: keeps recommendations
    useful for items that lack a modality)."""
    mask_untrained_ids: bool = True
    """Score an item that does not occur in training by its modalities alone (ours); False also uses its untrained ID
    embedding, as published."""
    id_dropout: float = 0.1
    """Probability that a training item is used without its ID embedding (ours: keeps recommendations useful for items
    without history)."""
    event_features: str = "auto"
    """Event columns that are added to the item embeddings: ``auto`` for every input column of the schema, ``none``, or
    names separated by commas (ours; the paper has none)."""
    event_feature_width: int = 32
    """Width of each event feature's embedding before it is projected to ``d_model``."""
    event_feature_dropout: float = 0.3
    """Probability that a training session loses all its event features, and again each single one: requests may come
    without them (docs/experiments.md: between 0.1 and 0.3 validation shows no difference)."""

    def __post_init__(self) -> None:
        check_types(self)
        sizes = ("d_model", "n_head", "d_feedforward", "n_decoder_layers", "max_sequence_length", "event_feature_width")
        amounts = ("n_encoder_layers", "n_neighbours", "n_similar_items", "cold_start_exposure", "orthogonality_weight")
        shares = ("dropout", "modality_dropout", "id_dropout", "event_feature_dropout", "rare_item_cost")
        limits = {
            "is below 1": sizes,
            "is negative": amounts,
            "is outside [0, 1)": shares,
            "is outside [0, 1]": ("interest_ratio",),
            "is not positive": ("temperature",),
        }
        contradictions = [
            (
                self.d_model % max(self.n_head, 1) != 0,
                f"model.d_model {self.d_model} is no multiple of model.n_head {self.n_head}",
            ),
            (
                self.attention == "causal" and self.sequence_fusion == "contextual",
                "model.sequence_fusion contextual needs model.attention bidirectional",
            ),
            (
                self.padding_candidate and self.missing_modality == "masked",
                "model.padding_candidate needs model.missing_modality zero_row",
            ),
        ]
        check_limits(self, "model", limits, contradictions)

    @property
    def has_interests(self) -> bool:
        """Whether the model has interests, a contextual encoder and attention to its memory."""
        return self.interest_ratio > 0

    @classmethod
    def paper(cls, **changes: Any) -> MISSRecConfig:
        """Return the published configuration: the model of the recipe ``paper``, with ``changes`` if any.

        Examples
        --------
        >>> MISSRecConfig.paper().attention
        'bidirectional'
        """
        from missrec_t4r.config.recipe import Recipe

        return dataclasses.replace(Recipe.load("paper").model, **changes)
