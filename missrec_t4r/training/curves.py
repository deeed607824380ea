"""Training log: a JSON line per epoch, and TensorBoard's event files if ``train.tensorboard`` is on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from missrec_t4r.errors import ConfigError
from missrec_t4r.io.atomic import write_text
from missrec_t4r.runs.run_folder import LOG_FILE

TENSORBOARD_FOLDER = "tensorboard"


class Curves:
    """Writer of a run's training curves: `log.jsonl` and TensorBoard files.

    Parameters
    ----------
    out : Path
        Run folder.
    epoch, step : int
        Epoch and step from which the run is resumed. Later records of the interrupted process are removed, since these
        epochs are trained again.
    tensorboard : bool
        Also write every step's loss and learning rate, and every epoch's record, for TensorBoard.

    Raises
    ------
    ConfigError
        ``tensorboard`` is on and the package is not installed.
    """

    def __init__(self, out: Path, epoch: int = 0, step: int = 0, *, tensorboard: bool = False) -> None:
        self.file = out / LOG_FILE
        if self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            earlier = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] < epoch]
            if earlier != lines:
                write_text(self.file, "".join(earlier))
        self.writer = _writer(out / TENSORBOARD_FOLDER, step) if tensorboard else None

    def step(self, number: int, values: Mapping[str, float]) -> None:
        """Write a step's numbers to TensorBoard."""
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"step/{name}", value, number)

    def epoch(self, record: Mapping[str, Any], step: int) -> None:
        """Append an epoch's record."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(record)) + "\n")
        if self.writer is not None:
            for name, value in record.items():
                if name != "epoch" and isinstance(value, (int, float)):
                    self.writer.add_scalar(f"epoch/{name}", value, step)
            self.writer.flush()

    def seconds(self) -> float:
        """Return the seconds of the last record, 0 without one."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        return float(json.loads(lines[-1])["seconds"]) if lines else 0.0

    def close(self) -> None:
        """Close the event file."""
        if self.writer is not None:
            self.writer.close()


def _writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        cure = "pip install 'missrec-t4r[tensorboard]', or --set train.tensorboard=false"
        raise ConfigError("train.tensorboard is on and TensorBoard is not installed", "the package", cure) from error
    return SummaryWriter(str(folder), purge_step=step or None)
