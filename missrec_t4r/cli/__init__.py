"""``missrec``: every command is one typed Python function, listed in `missrec_t4r.commands`.

Its options are the function's parameters, their help texts its docstring (`options.py`). On a terminal a command ends
with a summary, elsewhere and with ``--json`` with one line of JSON on standard output; messages and progress go to
standard error. An error that the user can cure is one paragraph, with exit code 2.
"""

from missrec_t4r.cli.app import app

__all__ = ["app"]
