"""Triton's view of the session transform; the work is in `missrec_t4r.serving.backend`, where it is tested."""

import triton_python_backend_utils as pb_utils

from missrec_t4r.serving.backend import SessionsBackend, bundle_folder, execute


class TritonPythonModel:
    """Raw item ids to catalogue rows."""

    def initialize(self, args):
        """Verify and load the bundle's vocabulary; a damaged file keeps the model from becoming ready."""
        self.backend = SessionsBackend(bundle_folder(args))

    def execute(self, requests):
        """Answer the requests that Triton has batched."""
        return execute(self.backend, requests, pb_utils)
