"""What a folder is and what opens it, for the error of a call that got another kind."""

from __future__ import annotations

from pathlib import Path

from missrec_t4r.bundle.manifest import MANIFEST_FILE
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.runs.run_folder import RUN_FILE

COLUMNS_FILE = "columns.json"
"""Marker of a shop's folder."""
DATA, RUN, BUNDLE, MODELS = "data", "run", "bundle", "models"
"""Folders of a shop and of a Recommender."""


def shown(path: Path) -> str:
    """Return a path relative to the working directory if it is below, as the caller will have written it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def describe(folder: Path) -> tuple[str, str]:
    """Return what a folder is, as the first part of an error, and what to call for it."""
    if not folder.is_dir():
        return f"{folder} is not a folder" if folder.exists() else f"{folder} does not exist", ""
    if (folder / COLUMNS_FILE).is_file():
        return f"{folder} is the folder of a shop", f"open it with Shop.open({str(folder)!r})"
    if (folder / MANIFEST_FILE).is_file():
        return f"{folder} is a bundle", f"open it with Recommender.load({str(folder)!r})"
    if (folder / BUNDLE / MANIFEST_FILE).is_file():
        found = f"{folder} is the folder of a Recommender"
        return found, f"its bundle is below: Recommender.load({str(folder / BUNDLE)!r})"
    if (folder / RUN_FILE).is_file():
        if (beside := folder.parent / BUNDLE / MANIFEST_FILE).is_file():
            return f"{folder} is a run folder", f"its bundle is beside it: Recommender.load({str(beside.parent)!r})"
        return f"{folder} is a run folder", f"write its bundle: `missrec export --run {folder} --out BUNDLE`"
    if (folder / REPORT_FILE).is_file():
        if (folder.parent / COLUMNS_FILE).is_file():
            return f"{folder} is the data folder of a shop", f"open the shop with Shop.open({str(folder.parent)!r})"
        return f"{folder} is a data folder", "make a Shop of its tables: Shop.from_frames(events, items, folder=...)"
    return f"{folder} is neither a bundle nor a shop", ""
