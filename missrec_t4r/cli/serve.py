"""Commands that bring a run before customers: export, serve, recommend; and the whole job, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from missrec_t4r import commands
from missrec_t4r.cli.app import DryRun, Out, Run, command, listed
from missrec_t4r.progress import TerminalProgress
from missrec_t4r.serving.client.protocol import json_option


@command
def export(
    run: Run,
    out: Out,
    triton: Annotated[Path | None, typer.Option(help="Also write a Triton model repository here.")] = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Write the serving bundle; refused if its answers differ from the run's."""
    return commands.export(run, out, triton=triton, dry_run=dry_run, progress=TerminalProgress())


@command
def serve(
    repository: Annotated[Path, typer.Option(help="Model repository written by `missrec export --triton`.")],
    http_port: Annotated[int, typer.Option(help="0 takes a free port.")] = 8000,
    grpc_port: Annotated[int, typer.Option(help="0 takes a free port.")] = 8001,
    metrics_port: Annotated[int, typer.Option(help="0 takes a free port.")] = 8002,
    log_file: Annotated[Path | None, typer.Option(help="Keeps Triton's log.")] = None,
) -> dict[str, Any]:
    """Run the embedded Triton Inference Server until Ctrl-C."""
    return commands.serve(
        repository,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        log_file=log_file,
        progress=TerminalProgress(),
    )


@command
def recommend(
    items: Annotated[str, typer.Option(help="The session's item ids, oldest first, comma-separated.")],
    url: Annotated[str, typer.Option(help="host:port of the server.")] = "localhost:8001",
    protocol: Annotated[str, typer.Option(help="grpc or http.")] = "grpc",
    top_k: Annotated[int, typer.Option(help="How many recommendations.")] = 10,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the session's own items.")] = False,
    exclude: Annotated[str | None, typer.Option(help="Ids never to recommend, comma-separated.")] = None,
    allow: Annotated[str | None, typer.Option(help="The only ids to recommend, comma-separated.")] = None,
    rules: Annotated[
        str | None, typer.Option(help='JSON: {"where": {"in_stock": true}, "at_most": {"brand": 2}}.')
    ] = None,
    reasons: Annotated[bool, typer.Option("--reasons", help="Say which item and modality weighed most.")] = False,
    side: Annotated[
        str | None, typer.Option(help='Side features as JSON: {"event_type": ["view", "cart"]}, a value per item.')
    ] = None,
    catalogue: Annotated[Path | None, typer.Option(help="Bundle, catalogue or deployment, to show titles.")] = None,
) -> dict[str, Any]:
    """Ask a running server for recommendations."""
    answer = commands.recommend(
        url,
        listed(items) or [],
        top_k,
        protocol=protocol,
        exclude_seen=exclude_seen,
        exclude=listed(exclude),
        allow=listed(allow),
        rules=json_option(rules, "--rules"),
        reasons=reasons,
        side=json_option(side, "--side"),
        catalogue=catalogue,
    )
    if answer["unknown_items"] or answer["fallback"]:
        note = "; these are the most popular items" if answer["fallback"] else ""
        Console(stderr=True).print(f"warning: {answer['unknown_items']} of the ids are unknown{note}", style="yellow")
    return answer


@command
def demo(
    data: Annotated[Path | None, typer.Option(help="Folder with interactions.parquet, items.parquet, *.npy.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("work/demo"),
    recipe: Annotated[str | None, typer.Option(help="Recipe; by default chosen by session length.")] = None,
    users: Annotated[int, typer.Option(help="Customers of the generated shop.")] = 3000,
    items: Annotated[int, typer.Option(help="Products of the generated shop.")] = 1200,
) -> dict[str, Any]:
    """Run the whole job: raw tables to answers of a real Triton server."""
    return commands.demo(data, out, recipe=recipe, users=users, items=items, console=Console(stderr=True))
