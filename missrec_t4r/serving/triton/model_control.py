"""Admin client for Triton's model control, authorised by a random key per server start.

Loading models, shared memory, tracing and log settings are closed to clients: Triton serves these parts of its API
(HTTP and gRPC) only to requests that carry the key as a header. We use gRPC, since HTTP may be closed. Beside a
deployment folder the key is kept in ``.server.json``, which only the owner of the folder may read; clients never need
it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritonclient.utils import InferenceServerException

from missrec_t4r.errors import ServingError, UnavailableError
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.serving.triton.stubs import UNHEALTHY, write_evidence

log = logging.getLogger(__name__)

CLOSED = ("model-repository", "shared-memory", "trace", "logging")
"""Parts of Triton's API that clients do not need: loading code, naming memory of the machine, writing files."""
HEADER = "missrec-control"
SERVER_FILE = ".server.json"

_SECONDS = 10.0
_LOAD_SECONDS = 600.0
"""Loading a model of a million items takes minutes: Triton reads and verifies the whole bundle."""
_LOADS = 3
"""How often a load is tried that Triton gave up because the machine was busy."""


class SilentError(ServingError):
    """The server takes connections and does not answer in time."""


def restrictions(key: str) -> list[str]:
    """Return the ``tritonserver`` arguments that require the key for the closed parts."""
    closed = ",".join(CLOSED)
    return [f"--{api}={closed}:{HEADER}={key}" for api in ("http-restricted-api", "grpc-restricted-protocol")]


@dataclass(frozen=True)
class Control:
    """Explicit model control of one running server."""

    grpc_url: str
    """Host and port of its gRPC endpoint."""
    key: str
    pid: int
    """Process id of the server."""
    log_file: str = ""
    """Its log; empty where an earlier version started it."""

    def write(self, repository: Path) -> None:
        """Write the key beside the models, readable by the owner alone."""
        with atomic_write_file(repository / SERVER_FILE) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # never readable for others
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(asdict(self), file)

    @classmethod
    def find(cls, repository: Path) -> Control | None:
        """Return the control of the server that serves this folder on this machine, None when none runs.

        Raises
        ------
        ServingError
            The server is another user's, or is there and does not answer: a change of files alone would not reach it.
        """
        try:
            control = cls(**json.loads((repository / SERVER_FILE).read_text(encoding="utf-8")))
            os.kill(control.pid, 0)
        except (FileNotFoundError, ProcessLookupError, ValueError, TypeError):
            return None
        except PermissionError as error:
            raise ServingError(
                f"{repository / SERVER_FILE} belongs to another user",
                "the user who runs the server",
                "run this command as that user",
            ) from error
        try:
            control.ready()
        except SilentError:
            raise
        except ServingError:  # it is gone, or another one that does not know the key
            return None
        return control

    @staticmethod
    def remove(repository: Path, pid: int) -> None:
        """Remove the file of `write` if it names this process."""
        file = repository / SERVER_FILE
        try:
            if json.loads(file.read_text(encoding="utf-8")).get("pid") == pid:
                file.unlink()
        except (OSError, ValueError, AttributeError):
            return

    def load(self, model: str) -> None:
        """Load or reload a model with everything it consists of; returns when it is ready.

        Triton gives a process up that shows no sign of life for a second, as on a busy machine: then it is tried again.

        Raises
        ------
        ServingError
            It cannot be loaded; the server goes on serving what it had.
        """
        for attempt in range(1, _LOADS + 1):
            try:
                with self._client(f"loading {model}") as client:
                    client.load_model(model, headers=self._headers, client_timeout=_LOAD_SECONDS)
                return
            except ServingError as error:
                if UNHEALTHY not in str(error) or attempt == _LOADS:
                    raise
                log.warning(f"loading {model} again, as the machine was too busy for Triton's check: {error}")

    def unload(self, model: str) -> None:
        """Unload a model and what only it consists of; requests in flight are answered first."""
        with self._client(f"unloading {model}") as client:
            client.unload_model(model, headers=self._headers, unload_dependents=True, client_timeout=_LOAD_SECONDS)

    def ready(self) -> dict[str, str]:
        """Return the version of every model that is ready, by name."""
        with self._client("listing the models") as client:
            index = client.get_model_repository_index(headers=self._headers, client_timeout=_SECONDS)
        return {model.name: model.version for model in index.models if model.state == "READY"}

    @property
    def _headers(self) -> dict[str, str]:
        return {f"triton-grpc-protocol-{HEADER}": self.key}

    @contextmanager
    def _client(self, action: str) -> Iterator[Any]:
        import tritonclient.grpc as grpc

        client = grpc.InferenceServerClient(self.grpc_url, channel_args=[("grpc.enable_http_proxy", 0)])
        try:
            yield client
        except InferenceServerException as error:
            if "StatusCode.DEADLINE_EXCEEDED" in str(error.status()):
                found = f"the server at {self.grpc_url} (process {self.pid}) does not answer: {action} took too long"
                cure = "look into its log, or restart it"
                with suppress(OSError):  # no room for the file
                    evidence = write_evidence(self.pid, self.log_file)
                    cure = f"{evidence} has its log, and what its processes wait for; restart it"
                raise SilentError(found, "an answer", cure) from error
            if "StatusCode.UNAVAILABLE" in str(error.status()):
                raise UnavailableError(f"no answer from {self.grpc_url} ({error})", "a running server") from error
            raise ServingError(f"the server at {self.grpc_url} refused {action}: {error}") from error
        finally:
            client.close()
