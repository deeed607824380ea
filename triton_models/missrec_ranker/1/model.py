"""Triton's view of the ranker; the work is in `missrec_t4r.serving.backend`, where it is tested."""

from typing import Any

import triton_python_backend_utils as pb_utils

from missrec_t4r.serving.backend import RankerBackend, bundle_folder, device_of, execute, parameter


class TritonPythonModel:
    """Catalogue rows to recommended items."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify and load the bundle and answer once, so that the first request finds everything warm."""
        self.backend = RankerBackend(bundle_folder(args), device_of(args), threads=int(parameter(args, "threads")))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer the requests that Triton has batched in one pass of the model."""
        return execute(self.backend, requests, pb_utils)
