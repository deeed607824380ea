"""missrec-t4r: MISSRec for NVIDIA Merlin.

The public names, resolved when they are first used: the model and the client import with torch and tritonclient alone,
Transformers4Rec and NVTabular only when a name that needs them is used.

>>> import missrec_t4r as mr
>>> mr.MISSRecConfig.paper().d_model
300
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Catalogue": "data.catalogue",
    "Modality": "data.catalogue",
    "Sessions": "data.sessions",
    "MISSRecConfig": "config",
    "TrainConfig": "config",
    "PretrainConfig": "config",
    "Recipe": "config",
    "MISSRecError": "errors",
    "MISSRec": "model.missrec",
    "build_missrec": "ranking.hybrid",
    "load_run": "runs.run_folder",
    "load_bundle": "bundle.bundle",
    "LocalTriton": "serving.triton.local_server",
    "MISSRecClient": "serving.client.client",
    "AsyncMISSRecClient": "serving.client.aio",
    "Retries": "serving.client.retry",
    "Recommendation": "serving.client.client",
    "compare": "comparison",
    "Ranker": "retrieval.ranker",
    "Shop": "recommender.shop",
    "Recommender": "recommender.recommender",
    "PrefixMasking": "t4r",
    "MultiModalSequenceFeatures": "t4r",
    "MISSRecBlock": "t4r",
    "MISSRecNextItemTask": "t4r",
    "build_model": "t4r",
    "save_run": "t4r",
    "to_core": "t4r",
    "load_schema": "t4r",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOME:
        raise AttributeError(
            f"module 'missrec_t4r' has no attribute {name!r}; public names: {', '.join(sorted(_HOME))}"
        )
    value = getattr(import_module(f"missrec_t4r.{_HOME[name]}"), name)
    if name == "compare":  # its errors are written for `missrec compare`
        value = import_module("missrec_t4r.commands.in_python").named_in_python(value)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("missrec-t4r")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
