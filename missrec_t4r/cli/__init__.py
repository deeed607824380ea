"""``missrec``: every command is one typed Python function of the same name in `missrec_t4r.commands`.

A command ends with one line of JSON on standard output; progress and tables go to standard error. What a user can cure
is one paragraph and exit code 2.
"""

from missrec_t4r.cli import batch, catalogue, data, model, operate, serve, sources  # each registers its commands
from missrec_t4r.cli.app import app

__all__ = ["app", "batch", "catalogue", "data", "model", "operate", "serve", "sources"]

_ORDER = (
    "demo generate etl features report pretrain train evaluate export serve recommend playground deploy rollback "
    "shadow score similar vectors"
).split()
"""The order of `missrec --help`: that of the work."""

app.registered_commands.sort(key=lambda command: _ORDER.index(command.name) if command.name in _ORDER else len(_ORDER))
