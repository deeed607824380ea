"""Commands that make and judge a data folder: generate, etl, features, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missrec_t4r import commands
from missrec_t4r.cli.app import Data, DryRun, Out, command, pairs
from missrec_t4r.progress import TerminalProgress


@command
def generate(
    out: Out,
    seed: Annotated[int, typer.Option(help="Same seed, same shop.")] = 7,
    users: Annotated[int, typer.Option(help="Number of customers.")] = 3000,
    items: Annotated[int, typer.Option(help="Number of products.")] = 1200,
) -> dict[str, Any]:
    """Generate a shop: interactions, catalogue with texts and pictures."""
    return commands.generate(out, seed=seed, users=users, items=items, progress=TerminalProgress())


@command
def etl(
    out: Out,
    interactions: Annotated[list[str], typer.Option(help="Parquet or csv: file, folder or pattern; repeatable.")] = [],  # noqa: B006 - typer copies it
    items: Annotated[Path | None, typer.Option(help="Item table, parquet or csv; optional with --update.")] = None,
    update: Annotated[bool, typer.Option("--update", help="Add new events and items to the folder.")] = False,
    delta: Annotated[bool, typer.Option("--delta", help="Beside the plain files, which --compact renews.")] = False,
    compact: Annotated[bool, typer.Option("--compact", help="Bring what --delta wrote into the plain files.")] = False,
    user_column: Annotated[str, typer.Option(help="Name of the user or session id.")] = "user_id",
    item_column: Annotated[str, typer.Option(help="Name of the item id.")] = "item_id",
    time_column: Annotated[str, typer.Option(help="Name of the time: unix seconds or dates.")] = "timestamp",
    catalogue_item_column: Annotated[str | None, typer.Option(help="Name of the id in the item table.")] = None,
    drop_column: Annotated[list[str], typer.Option(help="Event column that must not become a feature.")] = ["split"],  # noqa: B006 - typer copies it
    categorical_column: Annotated[list[str], typer.Option(help="Integer event column that is a category.")] = [],  # noqa: B006 - typer copies it
    k_core: Annotated[int, typer.Option(help="Drop users and items with fewer events, repeatedly; 0 is off.")] = 0,
    min_item_count: Annotated[int, typer.Option(help="Drop items with fewer events, once; 0 is off.")] = 0,
    unknown_items: Annotated[str, typer.Option(help="Items that only events know: append or drop.")] = "append",
    drop_duplicates: Annotated[bool, typer.Option("--drop-duplicates", help="Drop repeated events.")] = False,
    split: Annotated[str, typer.Option(help="leave_one_out or time.")] = "leave_one_out",
    valid_from: Annotated[float | None, typer.Option(help="Time split: start of validation, unix seconds.")] = None,
    test_from: Annotated[float | None, typer.Option(help="Time split: start of test, unix seconds.")] = None,
    modality: Annotated[list[str], typer.Option(help="NAME=FILE.npy, rows as in the item table; repeatable.")] = [],  # noqa: B006 - typer copies it
    fingerprint: Annotated[list[str], typer.Option(help="NAME=TEXT: the encoder of those vectors; repeatable.")] = [],  # noqa: B006 - typer copies it
    max_sequence_length: Annotated[int, typer.Option(help="Items of a request that count.")] = 50,
    max_events: Annotated[int | None, typer.Option(help="Cut sessions to their last events.")] = None,
    session_gap: Annotated[str | None, typer.Option(help="Pause that ends a session, such as 30m.")] = None,
    event_weights: Annotated[str | None, typer.Option(help="TYPE=WEIGHT,… such as view=1,purchase=3.")] = None,
    event_type_column: Annotated[str, typer.Option(help="Column of the event type.")] = "event_type",
    time_features: Annotated[str | None, typer.Option(help="all, or some of gap,hour,weekday,recency.")] = None,
    engine: Annotated[str, typer.Option(help="memory, disk (bounded memory), or auto: by size.")] = "auto",
    dask_scheduler: Annotated[str, typer.Option(help="threads, processes, or tcp://host:port.")] = "threads",
    workers: Annotated[int | None, typer.Option(help="Threads or processes; by default one per core.")] = None,
    partitions: Annotated[int | None, typer.Option(help="How many pieces; chosen by size if not given.")] = None,
    save_nvtabular_workflow: Annotated[
        bool, typer.Option("--save-nvtabular-workflow", help="Also NVTabular's own format, a pickle.")
    ] = False,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Turn raw interactions and an item table into sessions, schema and catalogue (NVTabular)."""
    return commands.etl(
        interactions,
        items,
        out,
        update=update,
        delta=delta,
        compact=compact,
        user_column=user_column,
        item_column=item_column,
        time_column=time_column,
        catalogue_item_column=catalogue_item_column,
        drop_columns=drop_column,
        categorical_columns=categorical_column,
        unknown_items=unknown_items,
        drop_duplicates=drop_duplicates,
        max_events=max_events,
        k_core=k_core,
        min_item_count=min_item_count,
        split=split,  # type: ignore[arg-type]  # checked by etl, with words
        valid_from=valid_from,
        test_from=test_from,
        modality={name: Path(file) for name, file in pairs(modality, "--modality").items()},
        fingerprint=pairs(fingerprint, "--fingerprint"),
        max_sequence_length=max_sequence_length,
        session_gap=session_gap,
        event_weights=event_weights,
        event_type_column=event_type_column,
        time_features=time_features,
        engine=engine,
        dask_scheduler=dask_scheduler,
        workers=workers,
        partitions=partitions,
        save_nvtabular_workflow=save_nvtabular_workflow,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command
def features(
    data: Data,
    text_columns: Annotated[str, typer.Option(help="Columns of the item table, joined; comma-separated.")] = "",
    image_column: Annotated[str | None, typer.Option(help="Column with the picture's file name.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the file names are relative to.")] = None,
    text_encoder: Annotated[
        str, typer.Option(help="classical, or a CLIP or sentence model: folder or name.")
    ] = "classical",
    image_encoder: Annotated[str, typer.Option(help="classical, or a CLIP model: folder or name.")] = "classical",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    batch_size: Annotated[int, typer.Option(help="Texts or pictures per forward pass.")] = 64,
    width: Annotated[int, typer.Option(help="Upper bound of the classical encoders' width.")] = 128,
    whiten: Annotated[bool, typer.Option("--whiten", help="Give every direction the same variance.")] = False,
    reduce_to: Annotated[int | None, typer.Option(help="Keep so many directions of greatest variance.")] = None,
    word_drop: Annotated[float, typer.Option(help="Share of words left out in the second text of pre-training.")] = 0.0,
    like: Annotated[Path | None, typer.Option(help="Data folder whose encoders and fitted state are used.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder of cached vectors; by default DATA.features.")] = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Make modality vectors from texts and pictures: pretrained encoders, or classical ones without a download."""
    return commands.features(
        data,
        text_columns=[name.strip() for name in text_columns.split(",") if name.strip()],
        image_column=image_column,
        images=images,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        device=device,
        precision=precision,
        batch_size=batch_size,
        width=width,
        whiten=whiten,
        reduce_to=reduce_to,
        word_drop=word_drop,
        like=like,
        cache=cache,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )


@command
def report(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder of the report; the one in it is the last run's.")],
    gate: Annotated[Path | None, typer.Option(help="YAML of bounds; a broken one ends with exit code 3.")] = None,
    previous: Annotated[Path | None, typer.Option(help="report.json of the last run, if it lies elsewhere.")] = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Describe a data folder (JSON, HTML page with plots), compare it with the last run, judge it by a gate."""
    return commands.report(data, out, gate=gate, previous=previous, dry_run=dry_run, progress=TerminalProgress())
