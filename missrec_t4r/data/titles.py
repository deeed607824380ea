"""Which column of an item table holds the titles: people read them in lists and on pages, the model does not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from missrec_t4r.io.json_files import read_json

TITLES: Final = ("title", "name", "product_name")
_ENCODERS: Final = ("features.json", "catalogue.json")
"""Files of a bundle and of a catalogue that say which columns the encoder of the texts has read."""


def title_column(names: Collection[str], encoders: Iterable[Mapping[str, Any]] = ()) -> str | None:
    """Return the column of the titles: by its name, in any case, else the first one that was encoded as text.

    Parameters
    ----------
    names : collection of str
        Columns of the item table.
    encoders : iterable of mapping
        What the catalogue notes on the encoder of each modality.

    Examples
    --------
    >>> title_column(["sku", "Title"]), title_column(["sku", "Titel"], [{"columns": ["Titel", "Text"]}])
    ('Title', 'Titel')
    """
    by_name = {name.lower(): name for name in names}
    known = next((by_name[title] for title in TITLES if title in by_name), None)
    return known or next((name for encoder in encoders for name in encoder.get("columns", ()) if name in names), None)


def title_column_of(folder: Path, names: Collection[str]) -> str | None:
    """Return the column of the titles in the item table of a bundle or a catalogue folder."""
    file = next((folder / name for name in _ENCODERS if (folder / name).is_file()), None)
    noted = {} if file is None else read_json(file).get("modalities", {})
    return title_column(names, [modality.get("encoder", {}) for modality in noted.values()])
