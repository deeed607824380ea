"""``missrec``: every command is one typed Python function of the same name in `missrec_t4r.commands`.

A command ends with one line of JSON on standard output; progress and tables go to standard error. What a user can cure
is one paragraph and exit code 2.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from rich.console import Console

from missrec_t4r import commands
from missrec_t4r.errors import ConfigError, MISSRecError
from missrec_t4r.progress import TerminalProgress

app = typer.Typer(
    help="Multi-modal sequential recommendation for NVIDIA Merlin: ETL, training, evaluation, Triton.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Upstream says these at every start, whatever a user does; anything else still shows.
for _words in (
    "The legacy Dask DataFrame implementation",
    "Tensorflow dtype mappings did not load",
    "Initializing an NVTabular Dataset in CPU mode",
):
    warnings.filterwarnings("ignore", message=_words)

F = TypeVar("F", bound=Callable[..., Any])

_EXTRA = {
    **dict.fromkeys(("nvtabular", "merlin", "transformers4rec", "transformers", "pandas", "dask"), "merlin"),
    **dict.fromkeys(("sklearn", "PIL"), "features"),
}
"""Package that the base installation lacks -> extra that brings it."""


def command(function: F) -> F:
    """Register a command that prints its result as JSON and its curable errors as a paragraph."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            result = _with_extras_named(function, *args, **kwargs)
        except MISSRecError as error:
            Console(stderr=True).print(f"{type(error).__name__}: {error}", style="red", highlight=False, markup=False)
            raise typer.Exit(2) from None
        print(json.dumps(result, default=_plain))

    app.command(name=function.__name__.replace("_", "-"))(run)
    return function


def _with_extras_named(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        cure = f"pip install 'missrec-t4r[{_EXTRA[package]}]'"
        raise ConfigError(f"the package {package} is not installed", "it, for this command", cure) from error


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


Out = Annotated[Path, typer.Option(help="Folder to write.")]
Data = Annotated[Path, typer.Option(help="Data folder written by `missrec etl`.")]
Run = Annotated[Path, typer.Option(help="Run folder written by `missrec train`.")]


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
    interactions: Annotated[list[str], typer.Option(help="Parquet or csv: file, folder or pattern; repeatable.")],
    items: Annotated[Path, typer.Option(help="Item table, parquet or csv.")],
    out: Out,
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
    max_sequence_length: Annotated[int, typer.Option(help="Items of a request that count.")] = 50,
    max_events: Annotated[int | None, typer.Option(help="Cut sessions to their last events.")] = None,
    partitions: Annotated[int | None, typer.Option(help="Dask partitions; chosen by size if not given.")] = None,
) -> dict[str, Any]:
    """Turn raw interactions and an item table into sessions, schema and catalogue (NVTabular)."""
    return commands.etl(
        interactions,
        items,
        out,
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
        modality={name: Path(file) for name, file in _pairs(modality, "--modality").items()},
        max_sequence_length=max_sequence_length,
        partitions=partitions,
        progress=TerminalProgress(),
    )


@command
def features(
    data: Data,
    text_columns: Annotated[str, typer.Option(help="Columns of the item table, joined; comma-separated.")] = "",
    image_column: Annotated[str | None, typer.Option(help="Column with the picture's file name.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the file names are relative to.")] = None,
) -> dict[str, Any]:
    """Make modality vectors from texts and pictures with the built-in classical encoders."""
    columns = [name.strip() for name in text_columns.split(",") if name.strip()]
    return commands.features(
        data, text_columns=columns, image_column=image_column, images=images, progress=TerminalProgress()
    )


@command
def train(
    data: Data,
    out: Out,
    recipe: Annotated[str, typer.Option(help="Shipped recipe or YAML file.")] = "default",
    set_: Annotated[list[str], typer.Option("--set", help="Override, such as model.d_model=128; repeatable.")] = [],  # noqa: B006 - typer copies it
    trainer: Annotated[str, typer.Option(help="native: ours. t4r: Transformers4Rec's Trainer.")] = "native",
    restart: Annotated[bool, typer.Option("--restart", help="Discard an interrupted run instead of resuming.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> dict[str, Any]:
    """Train the model; an interrupted run is continued."""
    settings = {key: yaml.safe_load(value) for key, value in _pairs(set_, "--set").items()}
    return commands.train(
        data,
        out,
        recipe=recipe,
        settings=settings,
        trainer=trainer,
        resume=not restart,
        device=device,
        progress=TerminalProgress(),
    )


@command
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Data folder, if it was moved since training.")] = None,
    baselines: Annotated[bool, typer.Option(help="Rank popularity, item-kNN and content-kNN beside it.")] = True,
) -> dict[str, Any]:
    """Rank the whole catalogue for every session, in both protocols, beside the baselines."""
    console = Console(stderr=True)
    result = commands.evaluate(run, split=split, data=data, baselines=baselines, progress=TerminalProgress(console))
    console.print(commands.metrics_table(result))
    return result


@command
def export(
    run: Run,
    out: Out,
    triton: Annotated[Path | None, typer.Option(help="Also write a Triton model repository here.")] = None,
) -> dict[str, Any]:
    """Write the serving bundle; refused if its answers differ from the run's."""
    return commands.export(run, out, triton=triton, progress=TerminalProgress())


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
    catalogue: Annotated[Path | None, typer.Option(help="Bundle or catalogue folder, to show titles.")] = None,
) -> dict[str, Any]:
    """Ask a running server for recommendations."""
    session = [item.strip() for item in items.split(",") if item.strip()]
    answer = commands.recommend(url, session, top_k, protocol=protocol, exclude_seen=exclude_seen, catalogue=catalogue)
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


def _pairs(options: list[str], name: str) -> dict[str, str]:
    pairs = dict(option.partition("=")[::2] for option in options)
    for option in options:
        if "=" not in option:
            raise ConfigError(f"{name} {option!r}", f"{name} NAME=VALUE")
    return pairs


if __name__ == "__main__":
    app()
