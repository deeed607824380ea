"""Settings: typed, each with its default, its unit and its source; read from YAML recipes, written back to every run.

The dataclass defaults are the recipe ``default``, the configuration that the results tables measure; `recipe` reads
YAML files, which extend each other; `renamed` lists the settings that had other names.
"""

from missrec_t4r.config.model import (
    Attention,
    CandidateFusionName,
    ContextualReadout,
    FeatureScaling,
    Initialisation,
    InterestAlgorithm,
    MissingModality,
    MISSRecConfig,
    Orthogonality,
    SequenceFusion,
    SingleModality,
)
from missrec_t4r.config.recipe import Recipe, shipped_recipes
from missrec_t4r.config.training import (
    IdInit,
    Precision,
    PretrainConfig,
    PretrainObjective,
    Schedule,
    SoftmaxName,
    TrainConfig,
)

__all__ = [
    "Attention",
    "CandidateFusionName",
    "ContextualReadout",
    "FeatureScaling",
    "IdInit",
    "Initialisation",
    "InterestAlgorithm",
    "MISSRecConfig",
    "MissingModality",
    "Orthogonality",
    "Precision",
    "PretrainConfig",
    "PretrainObjective",
    "Recipe",
    "Schedule",
    "SequenceFusion",
    "SingleModality",
    "SoftmaxName",
    "TrainConfig",
    "shipped_recipes",
]
