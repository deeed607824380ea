"""Settings: typed, each with its default, its unit and its source; read from YAML recipes, written back to every run.

The dataclass defaults are the recipe ``default``, the configuration that the results tables measure; `recipe` reads
YAML files, which extend each other; `renamed` lists the settings that had other names.
"""

from missrec_t4r.config.model import MISSRecConfig
from missrec_t4r.config.recipe import Recipe, shipped_recipes
from missrec_t4r.config.training import PretrainConfig, TrainConfig

__all__ = ["MISSRecConfig", "PretrainConfig", "Recipe", "TrainConfig", "shipped_recipes"]
