"""Triton adapter of the request transform; the implementation is `missrec_t4r.serving.triton.backend`."""

from typing import Any

import triton_python_backend_utils as pb_utils

from missrec_t4r.serving.triton.backend import SessionsBackend, bundle_folder, execute
from missrec_t4r.serving.triton.metrics import sessions_observer


class TritonPythonModel:
    """Raw item ids to catalogue rows."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify and load the bundle's vocabulary; a damaged file keeps the model from becoming ready."""
        self.backend = SessionsBackend(bundle_folder(args))
        self.observe = sessions_observer(pb_utils, args, self.backend)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return a response per request of the batch."""
        return execute(self.backend, requests, pb_utils, self.observe)
