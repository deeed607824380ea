"""``missrec``: every command is one typed Python function of the same name in `missrec_t4r.commands`.

A command ends with one line of JSON on standard output; progress and tables go to standard error. What a user can cure
is one paragraph and exit code 2.
"""

from missrec_t4r.cli import (
    batch,
    catalogue,
    data,
    model,
    operate,
    serve,
    sources,
)  # each registers its commands, in the order of `missrec --help`
from missrec_t4r.cli.app import app

__all__ = ["app", "batch", "catalogue", "data", "model", "operate", "serve", "sources"]
