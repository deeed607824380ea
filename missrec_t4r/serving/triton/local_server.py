"""A real Triton Inference Server on this machine, for the demo, for tests and for experiments.

The server listens on the loopback interface only and writes its output to a log file; when it fails, the reason in that
log becomes the error message. It never outlives the process that started it, even if that process is killed: a watchdog
stops it. Loading models, shared memory and tracing need a key that is random per start (`model_control`). Production
uses Triton's own image (docker-compose.yml).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import ServingError
from missrec_t4r.progress import track
from missrec_t4r.serving.stop_signals import UntilStopped
from missrec_t4r.serving.triton.deployment import is_deployment, start_arguments
from missrec_t4r.serving.triton.environment import EmbeddedTriton, reason_in
from missrec_t4r.serving.triton.model_control import Control, restrictions
from missrec_t4r.serving.triton.ports import LOOPBACK, choose_ports, grpc_server_name, has_metrics, server_name
from missrec_t4r.serving.triton.repository import ENSEMBLE
from missrec_t4r.serving.triton.stubs import UNHEALTHY, StubWatch

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_CHECK_SECONDS = 0.5
_STOP_SECONDS = 15.0
SHARED_BYTES = 16 << 20
"""Initial shared memory of a model. Triton's default of 1 MiB has to grow under the first requests, and growing while
another model loads has crashed the server (docs/reliability.md)."""
_ATTEMPTS = 4
"""Another process may take a free port after it was chosen and before Triton binds it: then others are chosen. A busy
machine may keep a model from answering Triton for a second while it loads (`stubs`)."""
_PORT_TAKEN = ("already in use", "failed to start", "unavailable for")
"""Fragments of Triton's log messages when it could not bind a port."""
_OTHER_VERSION = (
    "another version of missrec-t4r wrote this folder: write it again with `missrec export --triton`, or "
    "`missrec deploy --bundle` where it is a deployment folder"
)


class LocalTriton:
    """Context manager: serve a model repository while the ``with`` block runs.

    Parameters
    ----------
    repository : path
        A model repository, as `missrec export --triton` writes it.
    http_port, grpc_port, metrics_port : int
        0 chooses a free port.
    http : bool
        Whether the HTTP endpoint is open; gRPC always is.
    log_file : path, optional
        File of Triton's log; a temporary one by default.
    timeout : float
        Seconds until all models must be ready.
    arguments : sequence of str
        Further arguments of ``tritonserver``.

    Examples
    --------
    >>> with LocalTriton("model_repository") as server:                                          # doctest: +SKIP
    ...     client = MISSRecClient(server.grpc_url)
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        http_port: int = 0,
        grpc_port: int = 0,
        metrics_port: int = 0,
        http: bool = True,
        log_file: str | Path | None = None,
        timeout: float = 120.0,
        arguments: tuple[str, ...] = (),
    ) -> None:
        self.repository = Path(repository).absolute()
        self._requested_ports = {"http": http_port, "grpc": grpc_port, "metrics": metrics_port}
        if not http:
            del self._requested_ports["http"]
        self.ports: dict[str, int] = {}
        self._log_file = None if log_file is None else Path(log_file).absolute()
        self._timeout, self._arguments = timeout, arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._stub_watch: StubWatch | None = None
        self._folder: Path | None = None
        self._name = self._key = ""

    @property
    def control(self) -> Control:
        """Admin client that loads and unloads models in this server."""
        return Control(self.grpc_url, self._key, self.pid, str(self.log_file))

    @property
    def http_url(self) -> str:
        """Host and port of the HTTP endpoint."""
        if self.ports and "http" not in self.ports:
            raise ServingError("the HTTP endpoint is closed", "gRPC", "start the server with HTTP, or use grpc_url")
        return f"{LOOPBACK}:{self.ports['http']}"

    @property
    def grpc_url(self) -> str:
        """Host and port of the gRPC endpoint."""
        return f"{LOOPBACK}:{self.ports['grpc']}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{LOOPBACK}:{self.ports['metrics']}/metrics"

    @property
    def pid(self) -> int:
        """Process id of the running server, which is also its process group."""
        if self._process is None:
            raise ServingError("the server is not running", "", "enter the `with` block first")
        return self._process.pid

    @property
    def log_file(self) -> Path:
        """Triton's log."""
        return self._log_file or (self._folder or Path(tempfile.gettempdir())) / "triton.log"

    def __enter__(self) -> LocalTriton:
        if not any(self.repository.glob("*/config.pbtxt")):
            raise ServingError(
                f"{self.repository} is not a model repository",
                "a folder with one sub-folder and config.pbtxt per model",
                "write one with `missrec export --triton`",
            )
        triton = EmbeddedTriton.find()
        for attempt in range(1, _ATTEMPTS + 1):
            self.ports = choose_ports(self._requested_ports)
            self._folder = Path(tempfile.mkdtemp(prefix="missrec-triton-"))
            try:
                self._start(triton, self._folder)
                self._wait()
                break
            except BaseException as error:
                self.stop()
                if attempt == _ATTEMPTS or not (self._lost_a_port(error) or UNHEALTHY in str(error)):
                    raise
                log.warning(f"starting Triton again: {error}")
        if is_deployment(self.repository):
            self.control.write(self.repository)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server and its models, and remove temporary files; does nothing when no server runs."""
        if self._stub_watch is not None:
            self._stub_watch.stop()
            self._stub_watch = None
        if self._process is not None:
            if self._key and is_deployment(self.repository):
                Control.remove(self.repository, self._process.pid)
            _stop_group(self._process)
            self._process = None
        if self._watchdog is not None:
            self._watchdog.communicate(b"done\n")
            self._watchdog = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def check_alive(self) -> None:
        """Raise `ServingError` with the reason if the server has ended."""
        if self._process is not None and (code := self._process.poll()) is not None:
            reason = self._reason()
            cure = _OTHER_VERSION if "No module named 'missrec_t4r." in reason else self._cure()
            raise ServingError(f"Triton ended with code {code}: {reason}", "a running server", cure)

    def _start(self, triton: EmbeddedTriton, folder: Path) -> None:
        self._name, self._key = f"missrec-{secrets.token_hex(8)}", secrets.token_hex(16)
        command: list[str] = [
            str(triton.binary),
            f"--model-repository={self.repository}",
            f"--backend-directory={triton.backends(folder)}",
            "--disable-auto-complete-config",  # the configurations are complete; without it every model starts twice
            f"--backend-config=python,shm-default-byte-size={SHARED_BYTES}",
            "--exit-timeout-secs=5",
            f"--id={self._name}",
            f"--allow-http={str('http' in self.ports).lower()}",
            *restrictions(self._key),
            *(start_arguments(self.repository) if is_deployment(self.repository) else []),
        ]
        for endpoint, port in self.ports.items():
            command += [f"--{endpoint}-address={LOOPBACK}", f"--{endpoint}-port={port}"]
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=triton.environment(),
                start_new_session=True,
            )
        self._watchdog = start_watchdog(self._process.pid, folder)
        self._stub_watch = StubWatch(self._process.pid)

    def _lost_a_port(self, error: BaseException) -> bool:
        could_choose = isinstance(error, ServingError) and 0 in self._requested_ports.values()
        return could_choose and any(message in str(error) for message in _PORT_TAKEN)

    def _wait(self) -> None:
        started = time.monotonic()
        for _ in track(iter(self._is_ready, True), "starting Triton", counted=False):
            if time.monotonic() > started + self._timeout:
                raise ServingError(
                    f"Triton is not ready after {self._timeout:.0f} s; its log ends: {self._reason()}",
                    "all models loaded",
                    f"raise the timeout, or {self._cure()}",
                )
            time.sleep(_POLL_SECONDS)
        http = f"HTTP {self.http_url}" if "http" in self.ports else "HTTP is closed"
        log.info(
            f"Triton is ready after {time.monotonic() - started:.1f} s: gRPC {self.grpc_url}, {http}; "
            "it listens on the loopback interface only, so no other machine reaches it"
        )

    def _is_ready(self) -> bool:
        self.check_alive()
        model = ENSEMBLE if is_deployment(self.repository) else None
        return (
            grpc_server_name(self.ports["grpc"], model) == self._name  # not another process that took the port
            and ("http" not in self.ports or server_name(self.ports["http"]) == self._name)
            and ("--allow-metrics=false" in self._arguments or has_metrics(self.ports["metrics"]))
        )

    def _cure(self) -> str:
        return f"see {self._log_file}" if self._log_file else "start it with a log file to see Triton's whole log"

    def _reason(self) -> str:
        return reason_in(self.log_file.read_text(encoding="utf-8", errors="replace"))


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # stubs that outlived the server
        process.wait()


def serve(
    repository: str | Path,
    *,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    http: bool = True,
    log_file: str | Path | None = None,
) -> dict[str, Any]:
    """Run the embedded Triton Inference Server, on the loopback interface only, until Ctrl-C or SIGTERM.

    Parameters
    ----------
    repository : path
        Model repository written by `missrec export --triton`, or a deployment folder of `missrec deploy`.
    http_port : int
        HTTP port; 0 takes a free one.
    grpc_port : int
        gRPC port; 0 takes a free one.
    metrics_port : int
        Port of the Prometheus metrics; 0 takes a free one.
    http : bool
        --no-http keeps the HTTP endpoint closed: gRPC and metrics only.
    log_file : path, optional
        File for Triton's log.

    Returns
    -------
    dict
        Repository, ports and the seconds served.

    Raises
    ------
    ServingError
        The server cannot start, or ends by itself.
    """
    require_at_least(0, http_port=http_port, grpc_port=grpc_port, metrics_port=metrics_port)
    server = LocalTriton(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        http=http,
        log_file=log_file,
    )
    started = time.monotonic()
    with UntilStopped(), server:
        log.info(f"serving {server.repository}; the log is {server.log_file}; Ctrl-C stops")
        while True:
            server.check_alive()
            time.sleep(_CHECK_SECONDS)
    return {
        "repository": str(server.repository),
        "ports": server.ports,
        "seconds": round(time.monotonic() - started, 1),
    }


# Parent-death watchdog: a shell that waits for the end of a pipe, which the system closes when the parent dies.
# It stops the server's process group and removes the temporary folder.
_WATCHDOG = """
read -r word
[ "$word" = done ] && exit 0
kill -TERM -"$1" 2>/dev/null
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 -"$1" 2>/dev/null || break; sleep 1; done
kill -KILL -"$1" 2>/dev/null
rm -rf -- "$2"
"""


def start_watchdog(group: int, folder: Path) -> subprocess.Popen[bytes]:
    r"""Start a process that stops a process group when this process dies.

    Parameters
    ----------
    group : int
        Process group to stop.
    folder : Path
        Temporary folder to remove with it.

    Returns
    -------
    Popen
        ``communicate(b"done\n")`` ends the watchdog without stopping anything.
    """
    return subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG, "missrec-watchdog", str(group), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal to the parent's whole group must not reach the watchdog
    )
