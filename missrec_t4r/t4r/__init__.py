"""Transformers4Rec integration: MISSRec as inputs, block and task of a T4R model, trained by ``tr.Trainer``.

Importing this registers the masking ``prefix`` and the loader ``missrec`` in T4R's registries.
"""

from missrec_t4r import etl as _environment  # noqa: F401  # sets what Merlin needs, before anything imports it
from missrec_t4r.t4r.block import InterestRefresh, MISSRecBlock
from missrec_t4r.t4r.build import build_model, from_core, to_core
from missrec_t4r.t4r.columns import load_schema
from missrec_t4r.t4r.inputs import MultiModalSequenceFeatures
from missrec_t4r.t4r.loader import PrefixLoader
from missrec_t4r.t4r.masking import PrefixMasking
from missrec_t4r.t4r.saving import save_run
from missrec_t4r.t4r.task import MISSRecNextItemTask
from missrec_t4r.t4r.trainer import train_t4r

__all__ = [
    "InterestRefresh",
    "MISSRecBlock",
    "MISSRecNextItemTask",
    "MultiModalSequenceFeatures",
    "PrefixLoader",
    "PrefixMasking",
    "build_model",
    "from_core",
    "load_schema",
    "save_run",
    "to_core",
    "train_t4r",
]
