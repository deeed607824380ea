"""The few names of Triton's Python module that a response is made with."""

from __future__ import annotations

from types import SimpleNamespace


class TritonError(str):
    """The message of an error, with its status."""

    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"
    status: str

    def __new__(cls, message: str, status: str) -> TritonError:
        """Keep the status beside the message."""
        error = super().__new__(cls, message)
        error.status = status
        return error


TRITON = SimpleNamespace(
    get_input_tensor_by_name=lambda request, name: (
        SimpleNamespace(as_numpy=lambda: request[name]) if name in request else None
    ),
    InferenceResponse=lambda outputs=None, error=None: (dict(outputs or ()), error),
    TritonError=TritonError,
    Tensor=lambda name, array: (name, array),
)
