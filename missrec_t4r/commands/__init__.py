"""The functions behind the command line, under the same names; each imports what it needs when it is called.

>>> from missrec_t4r.commands import train, evaluate  # doctest: +SKIP
"""

from missrec_t4r.commands.batch import score, similar, vectors
from missrec_t4r.commands.catalogue import adopt, catalogue_rollback, catalogue_update
from missrec_t4r.commands.data import etl, features, generate, report
from missrec_t4r.commands.model import evaluate, metrics_table, pretrain, train
from missrec_t4r.commands.operate import deploy, merlin, playground, rollback, shadow, verify
from missrec_t4r.commands.serve import demo, export, recommend, serve
from missrec_t4r.commands.sources import import_amazon, import_movielens

__all__ = [
    "adopt",
    "catalogue_rollback",
    "catalogue_update",
    "demo",
    "deploy",
    "etl",
    "evaluate",
    "export",
    "features",
    "generate",
    "import_amazon",
    "import_movielens",
    "merlin",
    "metrics_table",
    "playground",
    "pretrain",
    "recommend",
    "report",
    "rollback",
    "score",
    "serve",
    "shadow",
    "similar",
    "train",
    "vectors",
    "verify",
]
