"""Build data folders from raw benchmark folders, with the same ETL as for users, once per benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from missrec_t4r import commands
from missrec_t4r.cli.demo import find_inputs, leave_out_words_without_gain
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.etl.features.pipeline import WORDS
from missrec_t4r.io.hashing import data_digest
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.schema import CATALOGUE_FOLDER

INTERACTIONS = "interactions.parquet"
_DONE = "prepared.json"


def prepare(
    raw: Path,
    out: Path,
    *,
    interactions: str = INTERACTIONS,
    modality: dict[str, str] | None = None,
    words: bool = True,
) -> Path:
    """Run the ETL on a benchmark folder unless it ran with the same settings before.

    ``out`` says what it was made of: runs beside it are of these data, and are never mixed with runs of others.

    Parameters
    ----------
    raw : Path
        Folder with interactions, ``items.parquet`` and modality vectors whose rows follow it. A data folder of
        ``missrec etl`` is taken as it is; its digest is kept in ``out``.
    out : Path
        Data folder.
    interactions : str
        File of the folder. Another one than ``interactions.parquet`` is a subset: only items that occur in it are
        candidates.
    modality : dict, optional
        Name to file of the folder; by default the best-covering file of every name, as in ``missrec demo``.
    words : bool
        Whether the words of titles and brands are one more modality where that helps, as in ``missrec demo``.

    Returns
    -------
    Path
        ``out``, or ``raw`` where that is a data folder.

    Raises
    ------
    ConfigError
        A data folder that has words is to be taken without them.
    DataError
        A file is missing, or ``out`` was made of other data or with other settings.
    """
    if (raw / CATALOGUE_FOLDER).is_dir() and interactions == INTERACTIONS and not modality:
        if not words and WORDS in Catalogue.load(raw / CATALOGUE_FOLDER).modalities:
            raise ConfigError(f"--no-words, and the data folder {raw} has them", "a raw folder, or one without words")
        if not _is_prepared(out, facts := {"raw": raw.name, "data_folder": data_digest(raw)}):
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / _DONE, facts)
        return raw
    inputs = find_inputs(raw)
    files = {name: raw / file for name, file in modality.items()} if modality else dict(inputs.modality)
    for file in (raw / interactions, *files.values()):
        if not file.is_file():
            raise DataError(
                f"{file} does not exist", "a file of the benchmark folder", "see --interactions, --modality"
            )
    features = inputs.features if words else {}
    facts = {"raw": raw.name, "interactions": interactions, "modality": {k: f.name for k, f in files.items()}}
    facts |= features
    if _is_prepared(out, facts):
        return out
    items = inputs.items
    if interactions != INTERACTIONS:
        items, files = _only_interacted(raw / interactions, items, files, out.with_name(out.name + "-raw"))
    commands.etl(
        [raw / interactions],
        items,
        out,
        modality=files,
        min_item_count=inputs.min_item_count if interactions == INTERACTIONS else 0,
    )
    if features:
        commands.features(out, **features)
        leave_out_words_without_gain(out)
    write_json(out / _DONE, facts)
    return out


def prepare_named(raw: Path, out: Path, *, name: str | None = None, words: bool = True, **how: Any) -> tuple[str, Path]:
    """Return the name of a data set in results, and its data folder below ``out``, made by `prepare`."""
    name = name or raw.resolve().name + ("" if words else "-without-words")  # each has a folder of its own
    return name, prepare(raw, out / name / "data", words=words, **how)


def is_recorded(out: Path) -> bool:
    """Whether it is recorded what the data folder ``out`` was made of, and so of which data the runs beside it are."""
    return (out / _DONE).is_file()


def _is_prepared(out: Path, facts: dict[str, Any]) -> bool:
    """Whether ``out`` was made of these data with these settings; False if it was not made yet.

    Raises
    ------
    DataError
        It was made otherwise.
    """
    stored = read_json(out / _DONE) if is_recorded(out) else None
    if stored in (None, facts):
        return stored is not None
    keys = [key for key in {**stored, **facts} if stored.get(key) != facts.get(key)]
    raise DataError(
        f"{out} was prepared otherwise: "
        + "; ".join(f"{key} was {stored.get(key, 'none')}, now {facts.get(key, 'none')}" for key in keys),
        "the data of the runs that are kept beside it",
        f"give another --out or name, or remove {out.parent} to prepare and train anew",
    )


def _only_interacted(
    interactions: Path, items: Path, files: dict[str, Path], out: Path
) -> tuple[Path, dict[str, Path]]:
    """Write the item table and vectors of the items that occur in the interactions."""
    out.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(items)
    occurring = set(pq.read_table(interactions, columns=["item_id"])["item_id"].to_pylist())
    keep = np.array([item in occurring for item in table["item_id"].to_pylist()])
    pq.write_table(table.filter(pa.array(keep)), out / items.name)
    kept = {}
    for name, file in files.items():
        kept[name] = out / file.name
        np.save(kept[name], np.load(file, allow_pickle=False)[keep])
    return out / items.name, kept
