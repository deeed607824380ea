"""Triton adapter of the ranker; the implementation is `missrec_t4r.serving.triton.backend`, where it is tested."""

import gc
from typing import Any

import triton_python_backend_utils as pb_utils

from missrec_t4r.serving.triton.backend import RankerBackend, bundle_folder, device_of, execute, parameter
from missrec_t4r.serving.triton.metrics import ranker_observer


class TritonPythonModel:
    """Catalogue rows to recommended items."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify and load the bundle and run the model once, so that the first request is as fast as the others."""
        bundle = bundle_folder(args)
        self.backend = RankerBackend(bundle, device_of(args), threads=int(parameter(args, "threads")))
        self.observe = ranker_observer(pb_utils, args, self.backend, bundle)
        gc.collect()
        gc.freeze()  # loaded objects are never freed: garbage collection between requests skips them

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response per request; all requests of the batch take one pass of the model."""
        return execute(self.backend, requests, pb_utils, self.observe)
