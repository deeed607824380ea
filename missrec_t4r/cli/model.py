"""Commands that make and judge a run: pretrain, train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from missrec_t4r import commands
from missrec_t4r.cli.app import Data, DryRun, Out, Run, command, pairs
from missrec_t4r.progress import TerminalProgress


@command
def pretrain(
    data: Annotated[list[str], typer.Option(help="Data folder, or NAME=FOLDER; one per domain, repeatable.")],
    out: Out,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or YAML file.")] = "pretrain",
    set_: Annotated[list[str], typer.Option("--set", help="Override, such as train.epochs=10; repeatable.")] = [],  # noqa: B006 - typer copies it
    restart: Annotated[bool, typer.Option("--restart", help="Train anew: no resuming, no finding.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Pre-train on several data sets whose modalities come from the same encoders; then `missrec train --from`."""
    settings = {key: yaml.safe_load(value) for key, value in pairs(set_, "--set").items()}
    return commands.pretrain(
        data,
        out,
        recipe=recipe,
        settings=settings,
        resume=not restart,
        device=device,
        reuse=True,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command
def train(
    data: Data,
    out: Out,
    recipe: Annotated[
        str | None, typer.Option(help="Shipped recipe or YAML file; default, or that of the run to continue.")
    ] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override, such as model.d_model=128; repeatable.")] = [],  # noqa: B006 - typer copies it
    trainer: Annotated[str, typer.Option(help="native: ours. t4r: Transformers4Rec's Trainer.")] = "native",
    from_: Annotated[Path | None, typer.Option("--from", help="Start from this run of `missrec pretrain`.")] = None,
    freeze: Annotated[
        str | None, typer.Option(help="encoder_decoder (default of --from), none, or all_loaded: adapters too.")
    ] = None,
    take: Annotated[str, typer.Option(help="What --from loads: all, or adapters alone.")] = "all",
    continue_: Annotated[
        Path | None, typer.Option("--continue", help="Start from yesterday's run on this shop; items may have changed.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Train anew: no resuming, no finding.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Train the model, anew or from another run; an interrupted run is resumed, a finished one is found."""
    settings = {key: yaml.safe_load(value) for key, value in pairs(set_, "--set").items()}
    return commands.train(
        data,
        out,
        recipe=recipe,
        settings=settings,
        trainer=trainer,
        source=from_,
        freeze=freeze,
        take=take,
        earlier_run=continue_,
        resume=not restart,
        device=device,
        reuse=True,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Data folder, if it was moved since training.")] = None,
    baselines: Annotated[bool, typer.Option(help="Rank popularity, item-kNN and content-kNN beside it.")] = True,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Rank the whole catalogue for every session, in both protocols, beside the baselines."""
    console = Console(stderr=True)
    options: dict[str, Any] = {"split": split, "data": data, "baselines": baselines, "dry_run": dry_run}
    result = commands.evaluate(run, **options, progress=TerminalProgress(console))
    if not dry_run:
        console.print(commands.metrics_table(result))
    return result
