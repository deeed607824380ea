"""Commands that answer without a server, for batch jobs: score, similar, vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missrec_t4r import commands
from missrec_t4r.cli.app import command, listed
from missrec_t4r.progress import TerminalProgress
from missrec_t4r.serving.client.protocol import json_option

Bundle = Annotated[Path | None, typer.Option(help="Bundle written by `missrec export`.")]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Run folder, in place of a bundle.")]
ItemsColumn = Annotated[str, typer.Option(help="List column of raw item ids, oldest first.")]
Threads = Annotated[int, typer.Option(help="Threads of torch.")]


@command
def score(
    sessions: Annotated[Path, typer.Option(help="Parquet file or folder, one row per session.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    bundle: Bundle = None,
    run: RunFolder = None,
    top_k: Annotated[int, typer.Option(help="Recommendations per session.")] = 10,
    exclude_seen: Annotated[bool, typer.Option("--exclude-seen", help="Leave out the session's own items.")] = False,
    exclude: Annotated[str | None, typer.Option(help="Ids never to recommend, comma-separated.")] = None,
    rules: Annotated[
        str | None, typer.Option(help='JSON: {"where": {"in_stock": true}, "at_most": {"brand": 2}}.')
    ] = None,
    items_column: ItemsColumn = "items",
    rules_column: Annotated[str | None, typer.Option(help="Text column: rules of the session, as JSON.")] = None,
    exclude_column: Annotated[str | None, typer.Option(help="List column: ids not for this session.")] = None,
    layout: Annotated[str, typer.Option(help="lists: a row per session. long: a row per item.")] = "lists",
    threads: Threads = 1,
) -> dict[str, Any]:
    """Write the recommendations for every session of a file; the server's answers, without a server."""
    return commands.score(
        sessions,
        out,
        bundle=bundle,
        run=run,
        top_k=top_k,
        exclude_seen=exclude_seen,
        exclude=listed(exclude),
        rules=json_option(rules, "--rules"),
        items_column=items_column,
        rules_column=rules_column,
        exclude_column=exclude_column,
        layout=layout,
        threads=threads,
        progress=TerminalProgress(),
    )


@command
def similar(
    items: Annotated[str | None, typer.Option(help="Item ids, comma-separated; all items without it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Parquet file to write, in place of the answer.")] = None,
    bundle: Bundle = None,
    run: RunFolder = None,
    top_k: Annotated[int, typer.Option(help="Similar items per item.")] = 10,
    by: Annotated[str, typer.Option(help="session: what people go on to. content: texts, pictures.")] = "session",
    threads: Threads = 1,
) -> dict[str, Any]:
    """Find the items that are similar to an item."""
    return commands.similar(
        listed(items), bundle=bundle, run=run, out=out, top_k=top_k, by=by, threads=threads, progress=TerminalProgress()
    )


@command
def vectors(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    bundle: Bundle = None,
    run: RunFolder = None,
    sessions: Annotated[Path | None, typer.Option(help="Parquet of sessions, for their vectors too.")] = None,
    items_column: ItemsColumn = "items",
    threads: Threads = 1,
) -> dict[str, Any]:
    """Write item and session vectors for another index."""
    return commands.vectors(
        out,
        bundle=bundle,
        run=run,
        sessions=sessions,
        items_column=items_column,
        threads=threads,
        progress=TerminalProgress(),
    )
