"""Commands around a running server: deploy, rollback, shadow, playground; bundle verify and merlin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missrec_t4r import commands
from missrec_t4r.cli.app import Data, DryRun, app, command, command_of
from missrec_t4r.progress import TerminalProgress

Repository = Annotated[Path, typer.Option(help="Deployment folder, which `missrec serve --repository` serves.")]


@command
def deploy(
    repository: Repository,
    bundle: Annotated[Path | None, typer.Option(help="Bundle that becomes a new version.")] = None,
    version: Annotated[int | None, typer.Option(help="A version that is there already, in place of a bundle.")] = None,
    no_switch: Annotated[bool, typer.Option("--no-switch", help="Load and check it; it does not answer yet.")] = False,
    keep: Annotated[int, typer.Option(help="Versions kept on disk.")] = 3,
    max_batch_size: Annotated[int | None, typer.Option(help="Sessions per pass and request; at first 64.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the ranker; at first 1, later as they are.")] = None,
    instances: Annotated[int | None, typer.Option(help="Processes of the ranker; at first 1.")] = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Let a new model or catalogue answer, without a restart and without a failed request."""
    return commands.deploy(
        repository,
        bundle=bundle,
        version=version,
        switch=not no_switch,
        keep=keep,
        max_batch_size=max_batch_size,
        threads=threads,
        instances=instances,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command
def rollback(
    repository: Repository,
    version: Annotated[int | None, typer.Option(help="By default the newest below the current one.")] = None,
) -> dict[str, Any]:
    """Let an earlier version answer again."""
    return commands.rollback(repository, version=version, progress=TerminalProgress())


@command
def shadow(
    candidate: Annotated[str, typer.Option(help="Model to ask in the shadow, such as missrec_v4.")],
    url: Annotated[str | None, typer.Option(help="Server that answers; by default on this machine.")] = None,
    candidate_url: Annotated[str | None, typer.Option(help="Another server's address, if it is there.")] = None,
    share: Annotated[float, typer.Option(help="Share of the requests, 0 to 1.")] = 0.1,
    port: Annotated[int, typer.Option(help="Where clients send their requests meanwhile; 0 takes a free port.")] = 8010,
    protocol: Annotated[str, typer.Option(help="http or grpc: what clients speak.")] = "http",
    seconds: Annotated[float | None, typer.Option(help="When to end; Ctrl-C otherwise.")] = None,
) -> dict[str, Any]:
    """Mirror a share of the traffic to a candidate; report overlap@k, score and latency differences."""
    return commands.shadow(
        url,
        candidate,
        candidate_url=candidate_url,
        share=share,
        port=port,
        protocol=protocol,
        seconds=seconds,
        progress=TerminalProgress(),
    )


@command
def playground(
    bundle: Annotated[Path, typer.Option(help="Bundle of the served model, for titles and attributes.")],
    url: Annotated[str, typer.Option(help="gRPC address of the server.")] = "localhost:8001",
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
    image_column: Annotated[str, typer.Option(help="Column with a picture's file name.")] = "image",
    port: Annotated[int, typer.Option(help="Of the page; 0 takes a free one.")] = 8020,
) -> dict[str, Any]:
    """Open a page where clicks on items change recommendations, scores and reasons."""
    return commands.playground(
        url, bundle, images=images, image_column=image_column, port=port, progress=TerminalProgress()
    )


bundles = typer.Typer(help="Look into a bundle.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bundles, name="bundle")


@command_of(bundles)
def verify(bundle: Annotated[Path, typer.Option(help="Bundle written by `missrec export`.")]) -> dict[str, Any]:
    """Refuse a damaged, truncated, oversized or manipulated bundle, with the file and the reason."""
    return commands.verify(bundle)


@command_of(bundles)
def merlin(
    bundle: Annotated[Path, typer.Option(help="Bundle written by `missrec export`.")],
    data: Data,
    out: Annotated[Path, typer.Option(help="Model repository to write.")],
    top_k: Annotated[int, typer.Option(help="Items per session.")] = 10,
) -> dict[str, Any]:
    """Write a classic Merlin Systems ensemble of it: pickles, integer ids, for teams that run such."""
    return commands.merlin(bundle, data, out, top_k=top_k)
