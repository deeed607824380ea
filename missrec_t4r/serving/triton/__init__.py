"""Triton: the Python backends, their metrics, the model repository and the embedded server."""
