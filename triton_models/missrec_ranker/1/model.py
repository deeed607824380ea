"""Triton's view of the ranker; the work is in `missrec_t4r.serving.backend`, where it is tested."""

import triton_python_backend_utils as pb_utils

from missrec_t4r.serving.backend import RankerBackend, bundle_folder, device_of, execute, parameter


class TritonPythonModel:
    """Catalogue rows to recommended items."""

    def initialize(self, args):
        """Verify and load the bundle and answer once, so that the first request finds everything warm."""
        self.backend = RankerBackend(bundle_folder(args), device_of(args), threads=int(parameter(args, "threads")))

    def execute(self, requests):
        """Answer the requests that Triton has batched in one pass of the model."""
        return execute(self.backend, requests, pb_utils)
