"""Our data loader for T4R's Trainer: every session becomes its prefixes, batched by length.

Registered beside T4R's loaders as ``missrec``: ``T4RecTrainingArguments(data_loader_engine="missrec")`` is all that a
script changes. A row is a prefix and its target, the last real item, and the batch says so (`PREFIX_ROWS`), so that the
masking does not cut it again. Order depends on the seed and the epoch alone.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from merlin.schema import Schema, Tags
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers4rec.torch.utils.data_utils import T4RecDataLoader, dataloader_registry

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batches import Examples, training_batches
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import DataError, SchemaError
from missrec_t4r.schema import NULL_ROW, UNKNOWN_ROW
from missrec_t4r.t4r.columns import as_core_schema, is_list, side_schema

PREFIX_ROWS: Final = "missrec_prefix_rows"
"""Key of a batch whose rows are a prefix and its target already; other inputs ignore it."""

Batch = tuple[dict[str, Tensor], None]


class PrefixBatches(IterableDataset[Batch]):
    """One epoch of batches per iteration; every iteration is the next epoch.

    Parameters
    ----------
    sessions : Sessions
        Known items only; side features by the name of their column.
    item_column : str
        Name under which a batch holds the items.
    batch_size : int
        Rows per batch.
    max_sequence_length : int
        Longest prefix; a row has one item more, the target.
    all_prefixes : bool
        True: every prefix of every session, in random order (training). False: every session once, its last item is
        the target, in the order of the data (evaluation).
    seed : int
        Of the order.
    per_session : int
        Prefixes drawn per session and epoch; 0 takes all.
    reverse_probability : float
        Probability that a training batch is read backwards.
    drop_last : bool
        Leave out the batch that is not full.
    rank, size : int
        Of this process among those that share the data.
    """

    def __init__(
        self,
        sessions: Sessions,
        item_column: str,
        batch_size: int,
        max_sequence_length: int,
        *,
        all_prefixes: bool,
        seed: int = 0,
        per_session: int = 0,
        reverse_probability: float = 0.0,
        drop_last: bool = False,
        rank: int = 0,
        size: int = 1,
    ) -> None:
        super().__init__()
        self.sessions, self.item_column = sessions, item_column
        self.batch_size, self.drop_last = batch_size, drop_last
        self.all_prefixes, self.seed = all_prefixes, seed
        self.rank, self.size = rank, size
        self.epoch = 0
        self._model = MISSRecConfig(attention="bidirectional", max_sequence_length=max_sequence_length)
        self._train = TrainConfig(
            batch_size=batch_size, windows_per_session=per_session, reverse_probability=reverse_probability
        )
        counted = np.maximum(sessions.lengths - 1, 0)
        if not all_prefixes:
            counted = np.minimum(counted, 1)
        elif per_session:
            counted = np.minimum(counted, per_session)
        rows = int(counted.sum())
        self._batches = (rows // batch_size if drop_last else -(-rows // batch_size)) // size
        if not self._batches:
            raise DataError(
                f"{rows} examples for {size} processes and batches of {batch_size}",
                "at least one batch per process",
                "lower the batch size, or give sessions of at least two known items",
            )

    def __len__(self) -> int:
        """Return the number of batches of this process, the same in every epoch."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the next epoch."""
        epoch, self.epoch = self.epoch, self.epoch + 1
        for examples, backwards in self._plan(epoch)[self.rank :: self.size][: self._batches]:
            yield self._collate(examples, backwards), None

    def _plan(self, epoch: int) -> list[tuple[Examples, bool]]:
        if self.all_prefixes:
            rng = np.random.default_rng([self.seed, epoch])
            plan = training_batches(self.sessions, self._model, self._train, rng)
        else:
            begin, limit = self.sessions.offsets[:-1], self.sessions.offsets[1:]
            begin, limit = begin[limit - begin >= 2], limit[limit - begin >= 2]
            begin = np.maximum(begin, limit - 1 - self._model.max_sequence_length)
            cuts = range(0, len(limit), self.batch_size)
            plan = [
                (Examples(begin[c : c + n], limit[c : c + n] - 1, limit[c : c + n]), False)
                for c in cuts
                for n in [self.batch_size]
            ]
        return [item for item in plan if not self.drop_last or len(item[0].begin) == self.batch_size]

    def _collate(self, examples: Examples, backwards: bool) -> dict[str, Tensor]:
        length = examples.lengths + 1
        steps = np.arange(int(length.max()))
        real = steps < length[:, None]
        at = examples.end[:, None] - steps if backwards else examples.begin[:, None] + steps
        at = np.where(real, at, 0)
        columns = {self.item_column: self.sessions.values, **self.sessions.features}
        batch = {
            name: torch.from_numpy(np.where(real, values[at], values.dtype.type(0))) for name, values in columns.items()
        }
        batch[PREFIX_ROWS] = torch.ones(len(length), 1, dtype=torch.bool)
        return batch


@dataloader_registry.register_with_multiple_names("missrec", "missrec_prefix")
class PrefixLoader(T4RecDataLoader, DataLoader[Batch]):
    """A `PrefixBatches` as T4R's Trainer wants its loaders. Built by `from_schema`, by us or by the Trainer."""

    def __init__(self, batches: PrefixBatches) -> None:
        DataLoader.__init__(self, batches, batch_size=None)
        self._batch_size = batches.batch_size  # T4R's Trainer reads it

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.dataset)  # type: ignore[arg-type]  # it is a PrefixBatches

    @classmethod
    def from_schema(  # type: ignore[override]  # T4R's base class leaves the keywords open
        cls,
        schema: Any,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        per_session: int = 0,
        reverse_probability: float = 0.0,
        global_rank: int | None = None,
        global_size: int | None = None,
        **_of_other_engines: Any,  # the Trainer hands every engine the same keywords (shuffle_buffer_size, device, ...)
    ) -> PrefixLoader:
        """Read session parquet.

        Parameters
        ----------
        schema : Merlin schema
            The ITEM_ID list column and the side features to read.
        paths_or_dataset : path, list of paths, merlin.io.Dataset, or Sessions
            A folder means its ``*.parquet``.
        batch_size, max_sequence_length, drop_last, seed, per_session, reverse_probability
            As in `PrefixBatches`.
        shuffle : bool
            True (the Trainer's training loader): every prefix. False (evaluation): the last item is the target.
        global_rank, global_size : int, optional
            Of this process; None for one process.
        """
        sessions = _known(read_sessions(paths_or_dataset, schema), targets=not shuffle)
        item = _item_name(as_core_schema(schema))
        rank, size = (0, 1) if global_rank is None or not global_size else (global_rank, global_size)
        return cls(
            PrefixBatches(
                sessions,
                item,
                batch_size,
                max_sequence_length,
                all_prefixes=shuffle,
                seed=seed,
                per_session=per_session,
                reverse_probability=reverse_probability,
                drop_last=drop_last,
                rank=rank,
                size=size,
            )
        )


def read_sessions(paths_or_dataset: Any, schema: Any) -> Sessions:
    """Read the item column and the side features that the schema names.

    Raises
    ------
    DataError
        No file.
    SchemaError
        A column is missing, or its lists are not as long as the items'.
    """
    if isinstance(paths_or_dataset, Sessions):
        return paths_or_dataset
    core_schema = as_core_schema(schema)
    item = _item_name(core_schema)
    side = [
        name for name in side_schema(core_schema, item).column_names if Tags.EMBEDDING not in core_schema[name].tags
    ]
    table = _read_table(paths_or_dataset, [item, *side])
    values, offsets = _flat(table[item], NULL_ROW)
    features = {}
    for name in side:
        feature, at = _flat(table[name], 0)
        if not np.array_equal(at, offsets):
            raise SchemaError(
                f"column {name!r} has lists of other lengths than {item!r}", "one value per event", "re-run the ETL"
            )
        features[name] = feature.astype(np.float32) if feature.dtype.kind == "f" else feature.astype(np.int64)
    return Sessions(values.astype(np.int64), offsets, features)


def _item_name(schema: Schema) -> str:
    names = schema.select_by_tag(Tags.ITEM_ID).column_names
    if len(names) != 1 or not is_list(schema[names[0]]):
        raise SchemaError(f"columns tagged ITEM_ID: {names}", "one list column")
    return str(names[0])


def _read_table(paths_or_dataset: Any, names: Sequence[str]) -> pa.Table:
    if hasattr(paths_or_dataset, "to_ddf"):
        return pa.Table.from_pandas(paths_or_dataset.to_ddf()[list(names)].compute(), preserve_index=False)
    given = [paths_or_dataset] if isinstance(paths_or_dataset, (str, Path)) else list(paths_or_dataset)
    files = [file for path in given for file in _files(Path(path))]
    if not files:
        raise DataError(
            f"no parquet file in {', '.join(map(str, given))}", "session parquet", "run `missrec etl` first"
        )
    tables = []
    for file in files:
        missing = set(names) - set(pq.read_schema(file).names)
        if missing:
            raise SchemaError(f"{file} lacks {sorted(missing)}", "every column that the schema names", "re-run the ETL")
        tables.append(pq.read_table(file, columns=list(names)))
    return pa.concat_tables(tables, promote_options="permissive")


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(path.glob("*.parquet"))
    if any(sign in str(path) for sign in "*?["):
        return sorted(map(Path, glob.glob(str(path))))
    if not path.is_file():
        raise DataError(f"{path} does not exist", "a parquet file or a folder of them", "check the path")
    return [path]


def _flat(column: pa.ChunkedArray, null: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Return a list column's values and offsets; a null list is an empty one, a null value becomes ``null``."""
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise SchemaError(
            f"a column of type {column.type}", "lists", "group the events into sessions with `missrec etl`"
        )
    lists = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    lengths = pc.fill_null(pc.list_value_length(lists), 0)
    offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])
    return np.asarray(pc.fill_null(lists.flatten(), null)), offsets


def _known(sessions: Sessions, *, targets: bool) -> Sessions:
    """Drop null and unknown events; with ``targets``, first the sessions whose last item is one: nothing to predict."""
    keep = sessions.values > UNKNOWN_ROW
    if targets:
        ends = sessions.offsets[1:]
        has_target = (
            (sessions.lengths > 0) & keep[np.maximum(ends - 1, 0)] if len(keep) else np.zeros(len(sessions), bool)
        )
        keep = keep & np.repeat(has_target, sessions.lengths)
    kept = np.concatenate([[0], np.cumsum(keep)])
    features = {name: feature[keep] for name, feature in sessions.features.items()}
    return Sessions(sessions.values[keep], kept[sessions.offsets], features)
