"""``python -m missrec_t4r``."""

from missrec_t4r.cli import app

app()
