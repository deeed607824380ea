"""A shop's events and items as a data folder: what `Recommender.fit` trains on."""

from __future__ import annotations

import atexit
import inspect
import os
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from missrec_t4r import commands
from missrec_t4r.commands.in_python import in_python, named_in_python
from missrec_t4r.config.checks import refuse_unknown
from missrec_t4r.config.option_names import FLAGS, option
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError, DataError, SchemaError
from missrec_t4r.etl.arrow_columns import normal_ids, normal_time, text_to_integers
from missrec_t4r.etl.outputs import REPORT_FILE
from missrec_t4r.etl.quality import checks
from missrec_t4r.etl.quality.number_texts import read_numbers
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.progress import reporting
from missrec_t4r.recommender.folders import COLUMNS_FILE, DATA, describe, shown
from missrec_t4r.recommender.frames import Frame, arrays_of, arrow_table, index_hint, write_parquet
from missrec_t4r.schema import CATALOGUE_FOLDER, ITEM_ID, TIMESTAMP, USER_ID

_EVENTS_FILE, _ITEMS_FILE = "events.parquet", "items.parquet"

_OWN_NAMES = {"user_column": "user", "item_column": "item", "time_column": "time"}
"""Parameters of `commands.etl` -> those of `Shop.from_frames`."""


class Shop:
    """Events, items and their vectors, in one folder. Made by `from_frames`, opened again by `open`.

    Attributes
    ----------
    folder : Path
        Holds the tables that were given, and ``data``, the data folder of ``missrec etl``.
    commands : list of str
        The command lines that did the same.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str], commands: Sequence[str] = ()) -> None:
        self.folder = folder.absolute()  # also after a change of the working directory
        self.columns, self.commands = dict(columns), list(commands)

    @classmethod
    def from_frames(
        cls,
        events: Frame,
        items: Frame | None = None,
        *,
        user: str = USER_ID,
        item: str = ITEM_ID,
        time: str = TIMESTAMP,
        text: Sequence[str] | str = (),
        words: Sequence[str] | str = (),
        image: str | None = None,
        images: str | Path | None = None,
        vectors: Mapping[str, npt.ArrayLike] | None = None,
        folder: str | Path | None = None,
        text_encoder: str = "classical",
        image_encoder: str = "classical",
        **etl: Any,
    ) -> Shop:
        """Build sessions, catalogue and vectors from tables.

        Parameters
        ----------
        events : DataFrame, Table or path
            One row per event. Other columns than the three become event features.
        items : DataFrame, Table or path, optional
            One row per item. Without it, the items of the events.
        user, item, time : str
            Columns of the events. The item table has its ids in ``item`` too, or in ``item_id``.
        text : str or sequence of str
            Columns of the item table that are joined to the item's text.
        words : str or sequence of str
            Columns such as title and brand whose words are a modality of their own, beside texts that a pretrained
            encoder reads and beside vectors of yours: they tell brands and model numbers.
        image : str, optional
            Column with the path of the item's picture, relative to ``images``.
        images : path, optional
            Folder of pictures; without ``image`` a picture is found by the item's id.
        vectors : mapping of str to array [item, width], optional
            Vectors by modality, rows as in ``items``; an all-zero row means "missing".
        folder : path, optional
            Where everything is kept; a temporary folder by default, which is removed with the process.
        text_encoder, image_encoder : str
            As in ``missrec features``.
        **etl
            Settings of `missrec_t4r.commands.etl`, such as ``k_core=5`` or ``split="time"``.

        Notes
        -----
        Items without text, picture and vectors get the modality ``cooccurrence`` (``missrec features --cooccurrence``),
        from the sessions of the training split that they share.

        Raises
        ------
        DataError, SchemaError, ConfigError
            As ``missrec etl`` and ``missrec features`` raise them.
        """
        refuse_unknown(etl, list(inspect.signature(commands.etl).parameters), "setting etl.")
        text, words = ([names] if isinstance(names, str) else list(names) for names in (text, words))
        arrays = arrays_of(vectors)
        event_table = arrow_table(events, "events", (user, item))
        tables = {_EVENTS_FILE: _require(event_table, (user, item, time), "events", events)}
        if items is not None:
            own = etl.get("catalogue_item_column") or item
            item_table = arrow_table(items, "items", (own, ITEM_ID))
            ids = [] if ITEM_ID in item_table.column_names else [own]
            needed = ids + text + words + ([image] if image else [])
            tables[_ITEMS_FILE] = _require(item_table, needed, "items", items)
        elif text or words or image or arrays:
            raise ConfigError(
                "text, words, image or vectors without an item table",
                "the items that they belong to",
                "write Shop.from_frames(events, items, ...), or leave them out: the sessions alone give vectors",
            )
        else:
            tables[_ITEMS_FILE] = pa.table({item: pc.drop_null(pc.unique(tables[_EVENTS_FILE][item]))})
        for name, encoded in (("text", text), ("words", words), ("image", image or images)):
            if encoded and name in arrays:
                raise ConfigError(
                    f"vectors of {name!r}, and {name.removesuffix('s')}s to encode",
                    "one of them: the encoded ones would replace yours",
                    f"leave one out, or give your vectors another name than {name!r}",
                )
        at = Path(folder) if folder is not None else temporary_folder("missrec-shop-")
        _refuse_tables_of_others(at, [*tables, *(f"{name}.npy" for name in arrays)])
        at.mkdir(parents=True, exist_ok=True)
        columns = {"user": user, "item": item, "time": time}
        options = {f"{name}_column": column for name, column in columns.items()} | etl
        features: dict[str, Any] = {}
        if text or words or image or images is not None:
            features = {"text_columns": text, "word_columns": words, "image_column": image, "images": images}
            features |= {"text_encoder": text_encoder, "image_encoder": image_encoder}
        elif not arrays:
            features = {"cooccurrence": True}
        with reporting(messages=False):
            with tempfile.TemporaryDirectory(dir=at) as refused:  # what is refused leaves an older shop as it is
                files = [write_parquet(table, Path(refused) / name) for name, table in tables.items()]
                modality = {name: Path(refused) / f"{name}.npy" for name in arrays}
                for name, values in arrays.items():
                    np.save(modality[name], values)
                etl_of_shop = named_in_python(commands.function_of("etl"), _OWN_NAMES)
                etl_of_shop(*files, at / DATA, **{"modality": modality} | options)
                events_file, items_file = (file.replace(at / file.name) for file in files)
                modality = {name: file.replace(at / file.name) for name, file in modality.items()}
            inputs = {"interactions": events_file, "items": items_file, "out": at / DATA, "modality": modality}
            done = [command_line("etl", inputs | options)]
            if features:
                commands.features(at / DATA, **features)
                done.append(command_line("features", {"data": at / DATA, **features}))
        write_json(at / COLUMNS_FILE, columns | {"commands": done})
        return cls(at, columns, done)

    @classmethod
    def open(cls, folder: str | Path) -> Shop:
        """Open the folder of an earlier `from_frames`.

        Raises
        ------
        DataError
            It is none.
        """
        folder = Path(folder)
        if not (folder / COLUMNS_FILE).is_file():
            found, cure = describe(folder)
            raise DataError(found, "a folder of Shop.from_frames(..., folder=...)", cure)
        columns = read_json(folder / COLUMNS_FILE)
        return cls(folder, columns, columns.pop("commands", ()))

    @property
    def data(self) -> Path:
        """The data folder, as ``missrec etl`` writes it."""
        return self.folder / DATA

    @property
    def findings(self) -> list[str]:
        """What was unusual in the tables, how often, and what was done about it; as in ``etl.json``."""
        return [
            f"{finding['check']}: {finding['count']:,} ({in_python(finding['message'], commands.etl, _OWN_NAMES)})"
            for finding in read_json(self.data / REPORT_FILE)["findings"]
        ]

    @property
    def catalogue(self) -> Catalogue:
        """The items and their vectors."""
        return Catalogue.load(self.data / CATALOGUE_FOLDER)

    def histories(
        self, users: Sequence[Any], event_features: Sequence[str] = ()
    ) -> tuple[list[list[Any]], list[dict[str, list[Any]]]]:
        """Return the items of every user, oldest first, and the values of event columns beside them.

        Parameters
        ----------
        users : sequence of user ids
        event_features : sequence of str
            Columns of the events; those that the table lacks are left out.

        Raises
        ------
        DataError
            A user without an event.
        """
        events = self._events(event_features)
        keys = [_key(user) for user in users]
        own = events.filter(pc.is_in(events[USER_ID].cast(pa.string()), pa.array(keys, pa.string())))
        own = own.append_column("__order", pa.array(range(own.num_rows)))  # events of the same time keep their order
        own = own.sort_by([(TIMESTAMP, "ascending"), ("__order", "ascending")])
        positions: dict[str, list[int]] = {key: [] for key in keys}
        for position, user in enumerate(own[USER_ID].to_pylist()):
            positions[str(user)].append(position)
        if unknown := [user for user, key in zip(users, keys, strict=True) if not positions[key]]:
            raise DataError(
                f"users without an event: {', '.join(map(str, unknown[:5]))}",
                "users of the shop",
                "pass sessions=[[...]] for new ones",
            )
        items = own[ITEM_ID].to_pylist()
        features = {name: own[name].to_pylist() for name in event_features if name in own.column_names}
        values = [{name: [column[at] for at in positions[key]] for name, column in features.items()} for key in keys]
        return [[items[at] for at in positions[key]] for key in keys], values

    def _events(self, event_features: Sequence[str]) -> pa.Table:
        """Return the complete events as ``missrec etl`` reads them: same types of ids, times and numbers."""
        user, item, time = (self.columns[name] for name in ("user", "item", "time"))
        file, settings = self.folder / _EVENTS_FILE, read_json(self.data / REPORT_FILE)["settings"]
        present = pq.read_schema(file).names
        features = [name for name in event_features if name in present]
        raw = pq.read_table(file, columns=[user, item, time, *features])
        ids = normal_ids(raw[item], item)
        if self.catalogue.id_type == "int64":
            ids = text_to_integers(ids) or ids
        keys = {
            USER_ID: normal_ids(raw[user], user),
            ITEM_ID: ids,
            TIMESTAMP: normal_time(raw[time], time, settings.get("time_format")),
        }
        found, categories = checks.Findings(), settings.get("categorical_columns", ())
        table = read_numbers(pa.table(keys | {name: raw[name] for name in features}), features, categories, found)
        return checks.complete_events(table, features, found)

    def __repr__(self) -> str:
        """Return sizes, modalities with the number of items where some lack them, and the number of findings."""
        catalogue = self.catalogue
        parts = [f"{pq.read_metadata(self.folder / _EVENTS_FILE).num_rows:,} events", f"{catalogue.n_items:,} items"]
        for name, modality in catalogue.modalities.items():
            n_present = int(modality.present.sum())
            parts.append(name if n_present == catalogue.n_items else f"{name} of {n_present:,}")
        if not catalogue.modalities:
            parts.append("no vectors")
        if n_findings := len(self.findings):
            parts.append(f"{n_findings} {'finding' if n_findings == 1 else 'findings'} (.findings)")
        return f"Shop({', '.join(parts)}, folder={shown(self.folder)!r})"


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """Return the command line of a call; options that are None, empty or False are left out.

    >>> command_line("train", {"data": "work/data", "settings": {"train.epochs": 3}, "resume": True})
    'missrec train --data work/data --set train.epochs=3'
    """
    words, hints = ["missrec", command], get_type_hints(commands.function_of(command))
    for name, value in options.items():
        if value is None or value is False or value == "" or (name, value) == ("resume", True):
            continue
        if value is True:
            words.append(option(name))
            continue
        is_repeated = name in FLAGS
        if isinstance(value, Mapping):
            is_repeated = str not in get_args(hints[name])  # such as --modality; event weights are one text
            values = [f"{key}={_written(part)}" for key, part in value.items()]
        else:
            values = [_written(part) for part in (value if isinstance(value, list | tuple) else [value])]
        for text in values if is_repeated else [",".join(values)] if values else []:
            words += [option(name), text]
    return shlex.join(words)


def _written(value: Any) -> str:
    return shown(value) if isinstance(value, Path) else str(value)


def temporary_folder(prefix: str) -> Path:
    """Return a new folder that is removed when this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not by a process that was forked from the owner
        shutil.rmtree(folder, ignore_errors=True)


def _key(user: Any) -> str:
    """Return an id as text; a whole float, which pandas makes of an integer beside NaN, as that integer."""
    return str(int(user)) if isinstance(user, float) and user.is_integer() else str(user)


def _refuse_tables_of_others(folder: Path, names: Sequence[str]) -> None:
    """Refuse a folder that is no shop, also none that is being made, and has files that a shop would replace."""
    if (folder / COLUMNS_FILE).is_file() or (folder / DATA / REPORT_FILE).is_file():
        return
    if own := [name for name in names if (folder / name).exists()]:
        raise DataError(
            f"{folder} holds {', '.join(own)} and is no shop",
            "a new folder, or that of a shop",
            "choose another folder",
        )


def _require(table: pa.Table, columns: Sequence[str], name: str, frame: Frame) -> pa.Table:
    """Return the table of a frame; refuse it without one of ``columns``."""
    if missing := [column for column in columns if column not in table.column_names]:
        raise SchemaError(
            f"{name} without {', '.join(missing)}",
            f"columns of the table: {', '.join(table.column_names)}",
            "name yours: Shop.from_frames(..., user=, item=, time=, text=, words=, image=); "
            + index_hint(frame, missing[0]),
        )
    return table
