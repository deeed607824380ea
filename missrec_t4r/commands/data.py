"""What `missrec generate`, `etl`, `features` and `report` do."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from missrec_t4r.errors import ConfigError
from missrec_t4r.progress import Progress, quiet


def generate(
    out: Path, *, seed: int = 7, users: int = 3000, items: int = 1200, progress: Progress = quiet
) -> dict[str, Any]:
    """Generate a shop; see `missrec_t4r.etl.sources.synthetic.shop`."""
    from missrec_t4r.etl.sources.synthetic.shop import generate_shop

    return generate_shop(out, seed=seed, users=users, items=items, progress=progress)


def etl(
    interactions: str | Path | Sequence[str | Path],
    items: Path | None,
    out: Path,
    *,
    split: Literal["leave_one_out", "time"] = "leave_one_out",
    modality: Mapping[str, Path] | None = None,
    update: bool = False,
    delta: bool = False,
    compact: bool = False,
    progress: Progress = quiet,
    **options: Any,
) -> dict[str, Any]:
    """Build a data folder, add to one (``update``, ``delta``), or write its splits anew (``compact``).

    Every option is documented in `missrec_t4r.etl.pipeline.etl`, `missrec_t4r.etl.engine.append.update` and
    `missrec_t4r.etl.engine.compact.compact`.

    Raises
    ------
    ConfigError
        There is no item table or no event, or an update is given settings, which are those of the first run.
    """
    from missrec_t4r.etl.pipeline import etl as build

    if update or compact:
        machine = _of_this_machine({"split": split, **options}, "--update" if update else "--compact")
        if update and not compact:
            from missrec_t4r.etl.engine.append import update as add

            return add(interactions, out, items=items, modality=modality, delta=delta, progress=progress, **machine)
        if update or interactions or items or modality:
            found, cure = "--compact with new events or items", "run missrec etl --update first, then --compact"
            raise ConfigError(found, "a data folder alone", cure)
        from missrec_t4r.etl.engine.compact import compact as bring_together

        return bring_together(out, progress=progress, **machine)
    if delta:
        raise ConfigError("--delta without --update", "both", "add --update")
    if items is None:
        raise ConfigError("no item table", "--items items.parquet", "only --update goes without")
    return build(interactions, items, out, split=split, modality=modality, progress=progress, **options)


def _of_this_machine(options: Mapping[str, Any], option: str) -> dict[str, Any]:
    """Return the options that an update takes; refuse those that are the first run's to choose."""
    from missrec_t4r.etl.pipeline import etl as build

    known, allowed = inspect.signature(build).parameters, ("dask_scheduler", "workers", "dry_run")
    if changed := [
        name for name, value in options.items() if name not in allowed and _plain(value) != _plain(known[name].default)
    ]:
        cure = "leave them out, or run missrec etl on all events"
        raise ConfigError(f"{option} with {', '.join(sorted(changed))}", "the settings of the first run", cure)
    return {name: options[name] for name in allowed if name in options}


def _plain(value: Any) -> Any:
    """Return empty mappings and sequences as None, so that a default equals what the command line makes of it."""
    return (tuple(value) if isinstance(value, list | tuple | dict) else value) or None


def features(
    data: Path, *, text_columns: Sequence[str] = (), progress: Progress = quiet, **options: Any
) -> dict[str, Any]:
    """Add modality vectors to a catalogue; options as in `missrec_t4r.etl.features.pipeline.features`."""
    from missrec_t4r.etl.features.pipeline import features as extract

    return extract(data, text_columns=list(text_columns), progress=progress, **options)


def report(data: Path, out: Path, *, progress: Progress = quiet, **options: Any) -> dict[str, Any]:
    """Write a data report and judge it by a gate; options as in `missrec_t4r.etl.quality.report.report`."""
    from missrec_t4r.etl.quality.report import report as write

    return write(data, out, progress=progress, **options)
