"""Fine-tuning on one data set: the data are read and checked, then the trainer takes over (specification 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.data.side import SideColumn, fit_side_columns, load_sessions, side_columns
from missrec_t4r.errors import DataError
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training import distributed
from missrec_t4r.training.dry_run import planned
from missrec_t4r.training.trainer import Prepare, Trainer


def train(
    data: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "default",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
    prepare: Prepare | None = None,
    side: Sequence[SideColumn] | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train MISSRec on a data folder and write a run folder.

    Parameters
    ----------
    data : path
        Folder written by ``missrec etl``.
    out : path
        Run folder. An interrupted run with the same recipe is continued.
    recipe : str, path or Recipe
        Shipped name, YAML file, or the settings themselves.
    settings : mapping, optional
        Overrides such as ``{"train.epochs": 3}``.
    resume : bool
        False starts over.
    device : str
        ``"auto"`` takes a GPU if there is one; under torchrun each process its own.
    prepare : function, optional
        As in `Trainer`: loads an earlier run's weights and freezes parts (`missrec_t4r.training.transfer`).
    side : sequence of SideColumn, optional
        Side features as an earlier run measured them; by default chosen and measured here.
    dry_run : bool
        Read and check everything, say what would be trained, write nothing.

    Returns
    -------
    dict
        Validation metrics, best epoch, seconds, trained positions per second, and the prior's settings.

    Raises
    ------
    DataError, ConfigError, CheckpointError
        Unusable data, contradictory settings, or a checkpoint of another recipe or data set.
    """
    data, out = Path(data), Path(out)
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
    catalogue = Catalogue.load(data / CATALOGUE_FOLDER)
    measured = side is not None
    side = side_columns(data, resolved.model.side_features, resolved.model.side_width) if side is None else side
    splits = {name: load_sessions(data, name, side).known() for name in ("train", "valid")}
    if not (splits["train"].lengths >= 2).any():
        raise DataError(f"no training session in {data} has two known items", "sessions to learn from", "check the ETL")
    _check_rows(splits, catalogue)
    side = side if measured else fit_side_columns(side, splits["train"])
    if side and distributed.launched().rank == 0:
        progress.say(f"side features: {', '.join(column.name for column in side)}")
    with distributed.joined(distributed.own_device(device)):
        trainer = Trainer(resolved, catalogue, splits["train"], splits["valid"], out, device, progress, prepare, side)
        if dry_run:
            return planned(trainer, data, resume=resume)
        if resume:
            trainer.resume()
        else:
            trainer.start_over()
        return trainer.run(data)


def _check_rows(splits: Mapping[str, Sessions], catalogue: Catalogue) -> None:
    for name, sessions in splits.items():
        highest = int(sessions.values.max(initial=0))
        if highest >= catalogue.n_rows:
            raise DataError(
                f"split {name!r} holds row {highest}",
                f"rows below {catalogue.n_rows}",
                "the catalogue is another one's; re-run the ETL",
            )
