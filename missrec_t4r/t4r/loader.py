"""Data loader for T4R's Trainer: all prefixes of every session, batched by length.

Registered beside T4R's loaders as ``missrec``: ``T4RecTrainingArguments(data_loader_engine="missrec")`` is the only
change of a script. A row is a prefix and its target, the last real item; the batch is marked with `PREFIX_ROWS`, so
that the masking does not cut it again. Labels of other tasks, columns tagged TARGET with one value for a session, are
those of the session that a prefix is of. The order depends on the seed and the epoch alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from merlin.schema import Tags
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers4rec.torch.utils.data_utils import T4RecDataLoader, dataloader_registry

from missrec_t4r.config import MISSRecConfig, TrainConfig
from missrec_t4r.data.batching import Examples, training_batches
from missrec_t4r.data.sessions import Sessions, gather
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.t4r.columns import as_core_schema, is_list, item_column
from missrec_t4r.t4r.reading import read_sessions

log = logging.getLogger(__name__)

PREFIX_ROWS: Final = "missrec_prefix_rows"
"""Key of batches whose rows are a prefix and its target already; other inputs ignore it."""

Targets = Tensor | dict[str, Tensor] | None
"""Labels of other tasks as T4R's loader gives them: none, those of the one column, or of several by their names."""
Batch = tuple[dict[str, Tensor], Targets]


class PrefixBatches(IterableDataset[Batch]):
    """One epoch of batches per iteration; every iteration is the next epoch.

    Parameters
    ----------
    sessions : Sessions
        Known items only; event features, and labels of other tasks at every event, by the name of their column.
    item_column : str
        Name of the items in a batch.
    train : TrainConfig
        Its batch size and seed; for training, windows per session and probability of reading a batch backwards.
    max_sequence_length : int
        Longest prefix; a row has one item more, the target.
    all_prefixes : bool
        True: every prefix of every session, in random order (training). False: every session once, its last item is
        the target, in the order of the data (evaluation).
    drop_last : bool
        Drop the last batch if it is not full.
    rank, size : int
        Of this process among those that share the data.
    targets : sequence of str
        The columns that are labels of other tasks.
    """

    def __init__(
        self,
        sessions: Sessions,
        item_column: str,
        train: TrainConfig,
        max_sequence_length: int,
        *,
        all_prefixes: bool,
        drop_last: bool,
        rank: int,
        size: int,
        targets: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.sessions, self.item_column, self.train, self.targets = sessions, item_column, train, targets
        self.all_prefixes, self.drop_last = all_prefixes, drop_last
        self.rank, self.size, self.epoch = rank, size, 0
        self._model = MISSRecConfig(attention="bidirectional", max_sequence_length=max_sequence_length)
        most = (train.windows_per_session or None) if all_prefixes else 1  # rows of a session
        rows = int(np.clip(sessions.lengths - 1, 0, most).sum())
        batches = rows // train.batch_size if drop_last else -(-rows // train.batch_size)
        self._batches = batches // size
        if (left := batches - self._batches * size) and not all_prefixes and not rank:
            log.warning(f"{left} of {batches} batches are not evaluated: each of {size} processes takes as many")
        if not self._batches:
            raise DataError(
                f"{rows} examples for {size} processes and batches of {train.batch_size}",
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
            yield self._collate(examples, backwards), self._labels(examples)

    def _plan(self, epoch: int) -> list[tuple[Examples, bool]]:
        if self.all_prefixes:
            rng = np.random.default_rng([self.train.seed, epoch])
            plan = training_batches(self.sessions, self._model, self.train, rng)
        else:
            begin, limit = self.sessions.offsets[:-1], self.sessions.offsets[1:]
            begin, limit = begin[limit - begin >= 2], limit[limit - begin >= 2]
            begin = np.maximum(begin, limit - 1 - self._model.max_sequence_length)
            whole, size = Examples(begin, limit - 1, begin, limit), self.train.batch_size
            cuts = [slice(first, first + size) for first in range(0, len(limit), size)]
            plan = [(Examples(*(field[cut] for field in whole)), False) for cut in cuts]
        if self.drop_last:
            plan = [
                (examples, backwards) for examples, backwards in plan if len(examples.begin) == self.train.batch_size
            ]
        return plan

    def _collate(self, examples: Examples, backwards: bool) -> dict[str, Tensor]:
        length = examples.lengths + 1
        steps = np.arange(int(length.max()))
        real = steps < length[:, None]
        at = examples.end[:, None] - steps if backwards else examples.begin[:, None] + steps
        at = np.where(real, at, 0)
        columns = {self.item_column: self.sessions.values, **self.sessions.features}
        read = {name: values for name, values in columns.items() if name not in self.targets}
        batch = {name: torch.from_numpy(gather(values, at, real)) for name, values in read.items()}
        batch[PREFIX_ROWS] = torch.ones(len(length), 1, dtype=torch.bool)
        return batch

    def _labels(self, examples: Examples) -> Targets:
        labels = {name: torch.from_numpy(self.sessions.features[name][examples.begin]) for name in self.targets}
        return labels if len(labels) > 1 else next(iter(labels.values()), None)


@dataloader_registry.register_with_multiple_names("missrec", "missrec_prefix")
class PrefixLoader(T4RecDataLoader, DataLoader[Batch]):
    """`PrefixBatches` with the interface of T4R's loaders; built by `from_schema`, in a script or by T4R's Trainer."""

    def __init__(self, batches: PrefixBatches) -> None:
        DataLoader.__init__(self, batches, batch_size=None)
        self._batch_size, self._steps = batches.train.batch_size, len(batches)  # T4R's Trainer reads the former

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._steps

    @classmethod
    def from_schema(
        cls,
        schema: Any,
        paths_or_dataset: Any,
        batch_size: int,
        max_sequence_length: int | None,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
        per_session: int = 0,
        last_probability: float = 0.0,
        reverse_probability: float = 0.0,
        global_rank: int | None = None,
        global_size: int | None = None,
        **_of_other_engines: Any,  # the Trainer passes one set of keywords to all engines (shuffle_buffer_size, ...)
    ) -> PrefixLoader:
        """Read session parquet.

        Parameters
        ----------
        schema : Merlin schema
            The ITEM_ID list column, the event features, and the labels of other tasks (tagged TARGET) to read.
        paths_or_dataset : path, list of paths, merlin.io.Dataset, or Sessions
            A folder means its ``*.parquet``.
        batch_size : int
            Rows per batch.
        max_sequence_length, drop_last
            As in `PrefixBatches`.
        seed : int, optional
            Of the order of batches. By default torch's, which the Trainer sets to its argument ``seed``; 0 in several
            processes, which must agree.
        per_session : int
            Prefixes drawn per session and epoch in training; 0 takes all.
        last_probability : float
            Probability that the longest prefix is among those drawn.
        reverse_probability : float
            Probability that a training batch is read backwards.
        shuffle : bool
            True (the Trainer's training loader): every prefix. False (evaluation): the last item is the target.
        global_rank, global_size : int, optional
            Of this process; None for one process.
        """
        if max_sequence_length is None:
            raise ConfigError(
                "a missrec loader without max_sequence_length",
                "the model's, in T4RecTrainingArguments or from_schema",
                "pass max_sequence_length=50, say",
            )
        core_schema = as_core_schema(schema)
        tagged = core_schema.select_by_tag(Tags.TARGET)
        targets = [column.name for column in tagged if not is_list(column)]
        sessions = read_sessions(paths_or_dataset, schema, targets)
        targets = [name for name in targets if name in sessions.features]  # `Sessions` may have none
        if left_out := sorted({*tagged.column_names} - {*targets}):
            log.warning(
                f"batches of the loader missrec have no {', '.join(left_out)} (tagged TARGET): labels are columns of "
                "parquet files with one value for a session"
            )
        n_rows, sessions = len(sessions), sessions.known() if shuffle else sessions.with_known_target()
        if not shuffle and (left := n_rows - int((sessions.lengths > 1).sum())):
            log.warning(
                f"{left} of {n_rows} sessions are not in the batches of the loader missrec, having fewer than two "
                'known items or an unknown last one: for a prediction of every row write data_loader_engine="merlin"'
            )
        item = item_column(core_schema).name
        rank, size = (0, 1) if global_rank is None or not global_size else (global_rank, global_size)
        if seed is None:
            seed = torch.initial_seed() % (1 << 32) if size == 1 else 0
        train = TrainConfig(
            batch_size=batch_size,
            seed=seed,
            windows_per_session=per_session,
            last_window_probability=last_probability,
            reverse_probability=reverse_probability,
        )
        return cls(
            PrefixBatches(
                sessions,
                item,
                train,
                max_sequence_length,
                all_prefixes=shuffle,
                drop_last=drop_last,
                rank=rank,
                size=size,
                targets=targets,
            )
        )
