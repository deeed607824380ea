"""The functions of all commands under one import path; each is imported when it is first used.

Their errors name arguments, where the command line names options (`named_in_python`).

>>> from missrec_t4r import commands
>>> commands.train.__module__
'missrec_t4r.commands.training'
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from missrec_t4r.commands.in_python import named_in_python

HOME = {
    "adopt": "etl.nvt.adopt:adopt",
    "catalogue_rollback": "commands.bundles:catalogue_rollback",
    "catalogue_update": "commands.bundles:catalogue_update",
    "compare": "commands.comparing:compare",
    "demo": "cli.demo:demo",
    "deploy": "serving.deploy.blue_green:deploy",
    "etl": "etl.pipeline:etl",
    "evaluate": "runs.evaluate:evaluate",
    "export": "export.export:export",
    "features": "etl.features.pipeline:features",
    "generate": "etl.sources.synthetic.shop:generate_shop",
    "import_amazon": "etl.sources.amazon:import_amazon",
    "import_movielens": "etl.sources.movielens:import_movielens",
    "merlin": "commands.bundles:merlin",
    "metrics_table": "evaluation.report:table",
    "playground": "serving.playground.app:playground",
    "pretrain": "training.pretrain:pretrain",
    "recommend": "serving.client.client:recommend",
    "report": "etl.quality.report:report",
    "rollback": "serving.deploy.blue_green:rollback",
    "run_page": "comparison.run_page:run_page",
    "score": "serving.batch.score:score",
    "serve": "serving.triton.local_server:serve",
    "shadow": "serving.shadow.http_proxy:shadow",
    "similar": "serving.batch.similar:similar",
    "train": "commands.training:train",
    "tune_serving": "tuning.serving:tune_serving",
    "tune_train": "tuning.train:tune_train",
    "vectors": "serving.batch.export_vectors:vectors",
    "verify": "commands.bundles:verify",
}
"""Name here -> module below `missrec_t4r` and name there."""

__all__ = sorted(HOME)  # resolved by __getattr__


def __getattr__(name: str) -> Any:
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; commands: {', '.join(sorted(HOME))}")
    value = globals()[name] = named_in_python(function_of(name))
    return value


def function_of(name: str) -> Any:
    """Return the function itself, whose errors name options: for the command line."""
    module, _, function = HOME[name].partition(":")
    return getattr(import_module(f"missrec_t4r.{module}"), function)


def __dir__() -> list[str]:
    return sorted(HOME)
