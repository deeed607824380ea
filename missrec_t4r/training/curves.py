"""A run's curves: a JSON line per epoch, and TensorBoard's event files on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from missrec_t4r.errors import ConfigError

LOG_FILE, TENSORBOARD_FOLDER = "log.jsonl", "tensorboard"


class Curves:
    """Where the numbers of a training run go.

    Parameters
    ----------
    out : Path
        Run folder.
    epoch, step : int
        Where the run goes on. What an interrupted process wrote from there on is dropped, since it comes again.
    tensorboard : bool
        Also write every step's loss and learning rate, and every epoch's line, for TensorBoard.

    Raises
    ------
    ConfigError
        TensorBoard is asked for and not installed.
    """

    def __init__(self, out: Path, epoch: int = 0, step: int = 0, *, tensorboard: bool = False) -> None:
        self.file = out / LOG_FILE
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < epoch]
            if kept != lines:
                self.file.write_text("".join(kept), encoding="utf-8")
        self.writer = _writer(out / TENSORBOARD_FOLDER, step) if tensorboard else None

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Note a step's numbers for TensorBoard."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"step/{name}", value, number)

    def epoch(self, line: Mapping[str, Any], step: int) -> None:
        """Append an epoch's line."""
        with self.file.open("a", encoding="utf-8") as log:
            log.write(json.dumps(dict(line)) + "\n")
        if self.writer is not None:
            for name, value in line.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"epoch/{name}", value, step)
            self.writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self.writer is not None:
            self.writer.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        cure = "pip install 'missrec-t4r[tensorboard]', or --set train.tensorboard=false"
        raise ConfigError("train.tensorboard is on and TensorBoard is not installed", "the package", cure) from error
    return SummaryWriter(str(folder), purge_step=step or None)
