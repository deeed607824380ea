"""Commands of the group missrec catalogue: adopt, update, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missrec_t4r import commands
from missrec_t4r.cli.app import DryRun, Out, app, command_of, pairs
from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import TerminalProgress

group = typer.Typer(help="Make and change the catalogue.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="catalogue")

_Files = Annotated[list[str], typer.Option(help="Session parquet: file, folder or pattern; repeatable.")]


@command_of(group)
def adopt(
    workflow: Annotated[Path, typer.Option(help="Folder of an NVTabular Workflow.save, or a unique.<column>.parquet.")],
    out: Out,
    sessions: _Files = [],  # noqa: B006 - typer copies it
    train: _Files = [],  # noqa: B006 - typer copies it
    valid: _Files = [],  # noqa: B006 - typer copies it
    test: _Files = [],  # noqa: B006 - typer copies it
    items: Annotated[Path | None, typer.Option(help="Raw item table: parquet, csv or json lines.")] = None,
    item_column: Annotated[str, typer.Option(help="Name of the raw id in the item table.")] = "item_id",
    vocabulary_column: Annotated[str, typer.Option(help="Name of the column that the workflow encoded.")] = "item_id",
    schema: Annotated[Path | None, typer.Option(help="schema.pbtxt, if it is not beside the sessions.")] = None,
    modality: Annotated[list[str], typer.Option(help="NAME=FILE.npy, rows as in the item table; repeatable.")] = [],  # noqa: B006 - typer copies it
    fingerprint: Annotated[list[str], typer.Option(help="NAME=TEXT: the encoder of those vectors; repeatable.")] = [],  # noqa: B006 - typer copies it
    new_items: Annotated[str, typer.Option(help="Items that the workflow never saw: append or drop.")] = "append",
    max_sequence_length: Annotated[int, typer.Option(help="Items of a request that count.")] = 50,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Build a data folder on the rows of an existing NVTabular workflow and its session parquet."""
    if new_items not in ("append", "drop"):
        raise ConfigError(f"--new-items {new_items!r}", "append or drop")
    given = {"train": train, "valid": valid, "test": test}
    return commands.adopt(
        workflow,
        out,
        sessions_files=sessions,
        split_files={name: files for name, files in given.items() if files},
        items=items,
        item_column=item_column,
        vocabulary_column=vocabulary_column,
        schema=schema,
        modality={name: Path(file) for name, file in pairs(modality, "--modality").items()},
        fingerprint=pairs(fingerprint, "--fingerprint"),
        new_items=new_items,
        max_sequence_length=max_sequence_length,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


_Bundle = Annotated[Path | None, typer.Option(help="A bundle of missrec export.")]
_Deployment = Annotated[Path | None, typer.Option(help="Folder of missrec deploy; its server answers with the change.")]


@command_of(group)
def update(
    items: Annotated[Path, typer.Option(help="Parquet: item_id, any columns, and retired true or false.")],
    bundle: _Bundle = None,
    repository: _Deployment = None,
    modality: Annotated[list[str], typer.Option(help="NAME=FILE.npy, one line per item; repeatable.")] = [],  # noqa: B006 - typer copies it
    data: Annotated[
        Path | None, typer.Option(help="Data folder, whose encoders shall read the items' texts and pictures.")
    ] = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Add, change and retire items without training or restart; the version before is kept."""
    return commands.catalogue_update(
        items,
        bundle=bundle,
        repository=repository,
        modality={name: Path(file) for name, file in pairs(modality, "--modality").items()},
        data=data,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command_of(group)
def rollback(bundle: _Bundle = None, repository: _Deployment = None) -> dict[str, Any]:
    """Go back to the catalogue before the last update."""
    return commands.catalogue_rollback(bundle=bundle, repository=repository)
