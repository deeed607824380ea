"""Comparison of systems on the same sessions, with a verdict: runs, Transformers4Rec models, files of lists, baselines.

`compare` is public as ``mr.compare``.
"""

from missrec_t4r.comparison.compare import compare

__all__ = ["compare"]
