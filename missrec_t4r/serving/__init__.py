"""Serving: request transform, exact ranking, the embedded Triton server and its client. Needs no Merlin."""
