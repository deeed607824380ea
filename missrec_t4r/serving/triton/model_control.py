"""The operator's way into a server whose model control is closed to clients: a key that is drawn at every start.

Triton checks the key as a header of the closed parts of its API (HTTP and gRPC). Beside a deployment folder it is kept
in `.server.json`, which only the owner of the folder may read; clients never need it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from missrec_t4r.errors import ServingError, UnavailableError

CLOSED = ("model-repository", "shared-memory", "trace", "logging")
"""Parts of Triton's API that clients have no use for: loading code, naming memory of the machine, writing files."""
HEADER = "missrec-control"
SERVER_FILE = ".server.json"
DEPLOYMENT_FILE = "deployment.json"
"""Marks a folder of versioned models, as `missrec deploy` writes it."""

_LOAD_SECONDS = 600.0


def restrictions(key: str) -> list[str]:
    """Return the arguments of ``tritonserver`` that close these parts."""
    closed = ",".join(CLOSED)
    return [f"--{door}={closed}:{HEADER}={key}" for door in ("http-restricted-api", "grpc-restricted-protocol")]


def is_deployment(repository: Path) -> bool:
    """Return whether a model repository is one that `missrec deploy` keeps."""
    return (repository / DEPLOYMENT_FILE).is_file()


def current_version(repository: str | Path) -> int | None:
    """Return the version that a deployment folder's door leads to, None before the first one."""
    file = Path(repository) / "missrec" / "config.pbtxt"
    found = (
        re.search(r"model_name: \"missrec_\w+_v(\d+)\"", file.read_text(encoding="utf-8")) if file.is_file() else None
    )
    return int(found[1]) if found else None


def bundle_of(repository: str | Path, version: int) -> Path:
    """Return where a deployment folder keeps the bundle of a version."""
    return Path(repository) / f"missrec_ranker_v{version}" / "1" / "bundle"


def start_arguments(repository: Path) -> list[str]:
    """Return the arguments of ``tritonserver`` that load a deployment folder's door and the version behind it.

    Strict readiness is off: with it, one candidate that fails to load would make a server unready that answers as
    before. Whether a deployment is ready is asked of its door: ``/v2/models/missrec/ready``.
    """
    doors = ("missrec", f"missrec_v{current_version(repository)}")
    loaded = [f"--load-model={door}" for door in doors]
    return ["--model-control-mode=explicit", "--strict-readiness=false", *loaded]


@dataclass(frozen=True)
class Control:
    """Explicit model control of one running server."""

    http_url: str
    key: str
    pid: int

    def write(self, repository: Path) -> None:
        """Leave the key beside the models, readable by the owner alone."""
        aside = repository / f"{SERVER_FILE}.{os.getpid()}"
        aside.unlink(missing_ok=True)
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
        os.replace(aside, repository / SERVER_FILE)

    @classmethod
    def find(cls, repository: Path) -> Control | None:
        """Return the control of the server that serves this folder on this machine, None when none runs."""
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
        return control if control.answers() else None

    @staticmethod
    def forget(repository: Path, pid: int) -> None:
        """Remove what `write` left, if it is about this process."""
        file = repository / SERVER_FILE
        try:
            if json.loads(file.read_text(encoding="utf-8")).get("pid") == pid:
                file.unlink()
        except (OSError, ValueError, AttributeError):
            return

    def answers(self) -> bool:
        """Return whether the server is alive and takes the key."""
        try:
            self._post("/v2/repository/index")
        except ServingError:
            return False
        return True

    def load(self, model: str) -> None:
        """Load a model, or load it again, with everything that it consists of; returns when it is ready.

        Raises
        ------
        ServingError
            It cannot be loaded; what was served before still is.
        """
        self._post(f"/v2/repository/models/{model}/load")

    def unload(self, model: str) -> None:
        """Unload a model and what only it consists of; requests under way are answered first."""
        self._post(f"/v2/repository/models/{model}/unload", {"parameters": {"unload_dependents": True}})

    def ready(self) -> dict[str, str]:
        """Return the version of every model that is ready."""
        index = self._post("/v2/repository/index")
        return {entry["name"]: entry.get("version", "") for entry in index if entry.get("state") == "READY"}

    def _post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection(self.http_url, timeout=_LOAD_SECONDS)
        try:
            connection.request("POST", path, json.dumps(body or {}), {HEADER: self.key})
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as error:
            raise UnavailableError(f"no answer from {self.http_url} ({error})", "a running server") from error
        finally:
            connection.close()
        if response.status != 200:
            raise ServingError(f"the server at {self.http_url} answered {path} with {response.status}: {text.strip()}")
        return json.loads(text) if text.strip() else {}
