"""What `missrec pretrain`, `train` and `evaluate` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet

if TYPE_CHECKING:
    from rich.console import RenderableType


def train(
    data: Path,
    out: Path,
    *,
    recipe: str = "default",
    settings: Mapping[str, Any] | None = None,
    trainer: str = "native",
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Train with our loop (``native``) or with Transformers4Rec's Trainer (``t4r``).

    Raises
    ------
    ConfigError
        An unknown trainer, or settings that contradict each other.
    """
    if trainer == "native":
        from missrec_t4r.training.finetune import train as native

        return native(data, out, recipe=recipe, settings=settings, resume=resume, device=device, progress=progress)
    if trainer == "t4r":
        from missrec_t4r.config import Recipe
        from missrec_t4r.t4r import train_t4r

        resolved = Recipe.load(recipe, settings)
        return train_t4r(data, resolved, out, resume=resume, device=device, progress=progress)
    raise ConfigError(f"--trainer {trainer!r}", "native or t4r")


def pretrain(
    data: Sequence[str | Path],
    out: Path,
    *,
    recipe: str = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Pre-train on several data folders; see `missrec_t4r.training.pretrain`."""
    from missrec_t4r.training.pretrain import pretrain as run

    return run(data, out, recipe=recipe, settings=settings, resume=resume, device=device, progress=progress)


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    baselines: bool = True,
    out: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Rank the whole catalogue; see `missrec_t4r.evaluation.evaluate`."""
    from missrec_t4r.evaluation.evaluate import evaluate as rank

    return rank(run, split=split, data=data, baselines=baselines, out=out, progress=progress)


def metrics_table(result: Mapping[str, Any]) -> RenderableType:
    """Return the table of an evaluation result, ready to print."""
    from missrec_t4r.evaluation.report import table

    return table(result)
