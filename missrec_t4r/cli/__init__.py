"""``missrec``: every command is one typed Python function, listed in `missrec_t4r.commands`.

Its options are the function's parameters, their help texts its docstring (`options.py`). On a terminal a command ends
with a summary, elsewhere and with ``--json`` with one line of JSON on standard output; messages and progress go to
standard error. An error that the user can cure is one paragraph, with exit code 2.

To add a command, write a typed function whose docstring has a section Parameters, name it in `commands.HOME` and give
it a line in `app.COMMANDS`. A special summary goes into `answer.py`.
"""

from missrec_t4r.cli.app import app

__all__ = ["app"]
