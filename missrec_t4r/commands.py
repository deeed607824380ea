"""The functions behind the command line, under the same names; each imports what it needs when it is called.

>>> from missrec_t4r.commands import train, evaluate  # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet

if TYPE_CHECKING:
    from rich.console import RenderableType


def generate(
    out: Path, *, seed: int = 7, users: int = 3000, items: int = 1200, progress: Progress = quiet
) -> dict[str, Any]:
    """Generate a shop; see `missrec_t4r.workflows.sources.generator`."""
    from missrec_t4r.workflows.sources.generator import generate_shop

    return generate_shop(out, seed=seed, users=users, items=items, progress=progress)


def etl(
    interactions: str | Path | Sequence[str | Path],
    items: Path,
    out: Path,
    *,
    split: Literal["leave_one_out", "time"] = "leave_one_out",
    modality: Mapping[str, Path] | None = None,
    progress: Progress = quiet,
    **options: Any,
) -> dict[str, Any]:
    """Build a data folder; every option is documented in `missrec_t4r.workflows.etl.etl`."""
    from missrec_t4r.workflows.etl import etl as build

    return build(interactions, items, out, split=split, modality=modality, progress=progress, **options)


def features(
    data: Path,
    *,
    text_columns: Sequence[str] = (),
    image_column: str | None = None,
    images: Path | None = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Add modality vectors to a data folder's catalogue; see `missrec_t4r.workflows.features`."""
    from missrec_t4r.workflows.features import features as extract

    return extract(data, text_columns=list(text_columns), image_column=image_column, images=images, progress=progress)


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


def export(run: Path, out: Path, *, triton: Path | None = None, progress: Progress = quiet) -> dict[str, Any]:
    """Write the serving bundle; see `missrec_t4r.export.export`."""
    from missrec_t4r.export.export import export as write

    return write(run, out, triton=triton, progress=progress)


def serve(repository: Path, **options: Any) -> dict[str, Any]:
    """Serve until interrupted; options as in `missrec_t4r.serving.local_triton.serve`."""
    from missrec_t4r.serving.local_triton import serve as run

    return run(repository, **options)


def recommend(url: str, items: Sequence[str | int], top_k: int = 10, **options: Any) -> dict[str, Any]:
    """Ask a running server; options as in `missrec_t4r.serving.client.recommend`."""
    from missrec_t4r.serving.client import recommend as ask

    return ask(url, items, top_k, **options)


def demo(data: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Run the whole job; options as in `missrec_t4r.demo.demo`."""
    from missrec_t4r.demo import demo as run

    return run(data, out, **options)
