"""Commands of the group missrec import: amazon-2018, amazon-2023, movielens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from missrec_t4r import commands
from missrec_t4r.cli.app import DryRun, Out, app, command_of
from missrec_t4r.progress import TerminalProgress

group = typer.Typer(
    help="Turn public data sets into interactions.parquet and items.parquet for missrec etl.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(group, name="import")

_Reviews = Annotated[Path, typer.Option(help="Reviews: JSON lines, plain or gzip.")]
_Metadata = Annotated[Path, typer.Option(help="Metadata of the same category: JSON lines, plain or gzip.")]
_KCore = Annotated[int, typer.Option(help="Drop users and items with fewer events, repeatedly; 0 is off.")]
_MinRating = Annotated[float, typer.Option(help="Drop events with fewer stars.")]
_Repeats = Annotated[
    bool | None, typer.Option("--keep-repeats/--first-only", help="A user's later reviews of one item; as published.")
]
_Untitled = Annotated[
    bool | None, typer.Option("--keep-untitled/--titled-only", help="Items without a title; as published.")
]


@command_of(group)
def amazon_2018(
    reviews: _Reviews,
    metadata: _Metadata,
    out: Out,
    k_core: _KCore = 5,
    min_rating: _MinRating = 0.0,
    keep_repeats: _Repeats = None,
    keep_untitled: _Untitled = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Import a category of the Amazon reviews of 2018, as the published benchmarks prepare it."""
    return _amazon("2018", reviews, metadata, out, k_core, min_rating, keep_repeats, keep_untitled, dry_run)


@command_of(group)
def amazon_2023(
    reviews: _Reviews,
    metadata: _Metadata,
    out: Out,
    k_core: _KCore = 5,
    min_rating: _MinRating = 0.0,
    keep_repeats: _Repeats = None,
    keep_untitled: _Untitled = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Import a category of the Amazon reviews of 2023; items are the parent products."""
    return _amazon("2023", reviews, metadata, out, k_core, min_rating, keep_repeats, keep_untitled, dry_run)


@command_of(group)
def movielens(
    archive: Annotated[Path, typer.Option(help="ml-100k.zip, ml-1m.zip, ml-25m.zip or the like, or its folder.")],
    out: Out,
    k_core: _KCore = 0,
    min_item_count: Annotated[int, typer.Option(help="Drop films with fewer ratings, once; 0 is off.")] = 0,
    min_rating: _MinRating = 0.0,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """Import a MovieLens archive as GroupLens ships it."""
    options: dict[str, Any] = {"k_core": k_core, "min_item_count": min_item_count, "min_rating": min_rating}
    return commands.import_movielens(archive, out, **options, dry_run=dry_run, progress=TerminalProgress())


def _amazon(
    edition: str,
    reviews: Path,
    metadata: Path,
    out: Path,
    k_core: int,
    min_rating: float,
    keep_repeats: bool | None,
    keep_untitled: bool | None,
    dry_run: bool,
) -> dict[str, Any]:
    return commands.import_amazon(
        edition,
        reviews,
        metadata,
        out,
        k_core=k_core,
        min_rating=min_rating,
        keep_repeats=keep_repeats,
        keep_untitled=keep_untitled,
        dry_run=dry_run,
        progress=TerminalProgress(),
    )
