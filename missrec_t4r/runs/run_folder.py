"""Run folders: weights and training state in safetensors, recipe and facts in JSON; written atomically, read strictly.

`run.json` makes a folder a finished run. A new run is written beside the earlier one of its folder, which stays until
the new one is complete. Then the new files wait in one folder while they take the places of the old ones: what a killed
process left of that, the next reader or writer does (`complete`). Weights are loaded only if every tensor of the model
is there in its shape; an error lists what is missing, unexpected or of another shape.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import zlib
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.io.arrow_files import one_array, with_column
from missrec_t4r.io.atomic import atomic_write_file, recover, temporary_dir, translate_disk_errors
from missrec_t4r.io.json_files import read_json, write_json
from missrec_t4r.io.key_names import read_with_current_keys
from missrec_t4r.io.weight_names import current_names
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.runs.extend import load_extended, load_strictly, mark_rows
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, TRAIN_COUNT

log = logging.getLogger(__name__)

VOCABULARY_FILE = "vocabulary.parquet"
RECIPE_FILE, RUN_FILE, WEIGHTS_FILE, STATE_FILE = "recipe.json", "run.json", "weights.safetensors", "state.safetensors"
_CHECKSUM = "sessions_checksum"
LOG_FILE = "log.jsonl"
"""Training log, a JSON line per epoch."""
CHECKPOINT_FOLDER = "checkpoint"
"""Folder of the checkpoints of T4R's Trainer."""
UNFINISHED_FILE = "unfinished"
"""Empty file beside a finished run while, and after, a training that has not replaced it."""
_RUN_PARTS: Final = {RUN_FILE, RECIPE_FILE, STATE_FILE, LOG_FILE, UNFINISHED_FILE, CHECKPOINT_FOLDER, "tensorboard"}
"""What shows that a folder is that of a run; a killed training may have left one of them alone."""
_NEW_FOLDER: Final = ".replaced-by"
"""Folder of the files of a complete new run in its run folder, until they have their places."""
_NOTES: Final = {".log", ".txt", ".out", ".err", ".yaml", ".yml", ".json"}
"""Logs and settings, which scripts put into the folder of a run before it begins."""
_NOTE_FOLDERS: Final = {"logs", "lost+found"}
"""Folders of logs, and of a disk that is mounted there."""


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to score."""

    model: MISSRec
    """In evaluation mode."""
    catalogue: Catalogue
    recipe: Recipe
    data: Path
    """The data folder that the run was trained on, or the one given to `load_run`."""
    n_trained: int | None = None
    """Rows of the catalogue of the training, the first ones of this catalogue; None for all."""


def require_run_folder(out: Path, kind: str = "run", parts: Set[str] = _RUN_PARTS) -> None:
    """Refuse to write a run below a file, or among other files than hidden ones, logs and settings.

    Parameters
    ----------
    out : Path
    kind : str
        What is written, for the error.
    parts : set of str
        Names of which any one shows that the folder is of that kind.

    Raises
    ------
    ConfigError
        Says what is there.
    """
    if file := next((part for part in (out, *out.parents) if part.is_file()), None):
        raise ConfigError(f"--out {out}, and {file} is a file", "a folder", "choose another --out")
    there = {path.name for path in out.iterdir()} if out.exists() else set()
    others = sorted(
        name for name in there - _NOTE_FOLDERS if not name.startswith(".") and Path(name).suffix not in _NOTES
    )
    if others and parts.isdisjoint(there):
        found = f"--out {out} is no folder of a {kind}: it holds {', '.join(others[:3])}{', …' if others[3:] else ''}"
        raise ConfigError(found, f"a new folder, or that of a {kind}", "choose another --out")


def begin_training(out: Path) -> None:
    """Note in a run folder that a training has begun; a finished run in it stays until `save_run` replaces it.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    with translate_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        complete(out)
        if (out / RUN_FILE).is_file():
            (out / UNFINISHED_FILE).touch()
            log.info(f"the finished run in {out} stays until this training is complete")


def is_finished(out: Path) -> bool:
    """Whether a folder holds a finished run, and no checkpoint of a training that would have replaced it."""
    complete(out)
    if not (out / RUN_FILE).is_file():
        return False
    has_checkpoint = (out / STATE_FILE).is_file() or any((out / CHECKPOINT_FOLDER).glob("checkpoint-*"))
    return not ((out / UNFINISHED_FILE).is_file() and has_checkpoint)


def save_run(
    out: Path,
    model: MISSRec,
    recipe: Recipe,
    data: Path,
    info: Mapping[str, Any],
    catalogue: Catalogue | None = None,
    sessions: Sequence[Sessions] = (),
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write a run: weights, resolved recipe, and where it comes from.

    Parameters
    ----------
    out : Path
        Run folder; created. The files of an earlier run in it are replaced when all new ones are complete.
    model : MISSRec
    recipe : Recipe
    data : Path
        Data folder; stored relative to the run so that both can be moved together.
    info : mapping
        JSON-able facts: seconds, best epoch, validation metrics.
    catalogue : Catalogue, optional
        Its raw ids and its encoders' fingerprints are stored with the run: warm starts match another catalogue's items
        and modalities with them, when the data folder has changed meanwhile.
    sessions : sequence of Sessions
        Training and validation sessions; `trained_on` returns their checksum.
    check : function, optional
        Called with the folder of the new files before they replace others; what it raises leaves these as they are.

    Raises
    ------
    DataError
        The disk is full or read-only. An earlier run is as it was.
    """
    if sessions:
        info = {**info, _CHECKSUM: sessions_checksum(sessions)}
    if catalogue is not None:
        info = {**info, "modalities": encoders_of(catalogue)}
    where = os.path.relpath(data.resolve(), out.resolve())
    event_features = [column.to_dict() for column in model.event_columns]
    with translate_disk_errors(out), temporary_dir(out / RUN_FILE) as new:
        if catalogue is not None:
            _write_vocabulary(new / VOCABULARY_FILE, catalogue)
        save_tensors(new / WEIGHTS_FILE, model.state_dict())
        write_json(new / RECIPE_FILE, recipe.to_dict())
        write_json(new / RUN_FILE, {"data": where, "versions": versions(), "event_features": event_features, **info})
        if check is not None:
            check(new)
        complete(out)
        new.rename(out / _NEW_FOLDER)  # from here on it is the run of this folder
        complete(out)


def complete(run: Path) -> None:
    """Give the files of a new run their places, if a process was killed while it did; several may do so at once.

    Raises
    ------
    CheckpointError
        This user may not write the run folder.
    """
    new = run / _NEW_FOLDER
    if not new.is_dir():
        return
    try:
        for name in sorted(os.listdir(new), key=lambda name: name == RUN_FILE):
            if name == RUN_FILE:
                (run / UNFINISHED_FILE).unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                (new / name).replace(run / name)
        new.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(
            f"a process replaces the run {run}, or was killed while it did, and the rest cannot be done ({error})",
            "a folder that this user may write",
            f"read it once as a user who may: `missrec evaluate --run {run}`",
        ) from error


def sessions_checksum(sessions: Sequence[Sessions]) -> int:
    """Return a checksum of the items of sessions, whatever features of theirs are read."""
    checksum = 0
    for split in sessions:
        for numbers in (split.values, split.offsets):
            checksum = zlib.crc32(np.ascontiguousarray(numbers).data, checksum)
    return checksum


def trained_on(run: Path) -> int | None:
    """Return the `sessions_checksum` of a run's training and validation sessions; None for runs of earlier versions."""
    return cast("int | None", read_info(run).get(_CHECKSUM))


def read_info(run: Path) -> dict[str, Any]:
    """Return the content of the `run.json` of a run, under today's keys also where an earlier version wrote it.

    Raises
    ------
    CheckpointError
        The run is unfinished.
    """
    complete(run)
    if not (run / RUN_FILE).is_file():
        with contextlib.suppress(OSError):  # this user may not write there
            recover(run)  # where a file system cannot exchange names
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(
            f"{run} holds no {RUN_FILE}",
            "a finished run of `missrec train` or `missrec pretrain`",
            "repeat the command that writes it: it continues",
        )
    return read_with_current_keys(run / RUN_FILE)


def load_run(run: str | Path, data: str | Path | None = None) -> LoadedRun:
    """Read a run and build its model.

    The data folder may have gained events and items since the training (`missrec etl --update`): new items are scored
    by their modalities, and the catalogue's event counts are those of the training. It may have gained modalities, too,
    which are left out; those of the training must be encoded as they were then.

    Parameters
    ----------
    run : path
        Folder written by ``missrec train``.
    data : path, optional
        Data folder, if it was moved since.

    Raises
    ------
    CheckpointError
        The run is unfinished, its items are not the first ones of the catalogue, a modality is missing or encoded in
        another way, or the weights do not fit; the message lists every difference.
    """
    run = Path(run)
    info = read_info(run)
    if "pretraining" in info:
        cure = f"train on one of your data sets from it: `missrec train --from {run}`"
        raise CheckpointError(f"{run} was pre-trained on several domains", "a run of `missrec train`", cure)
    recipe = Recipe.from_stored(read_json(run / RECIPE_FILE))
    folder = Path(data) if data is not None else data_folder(run, info)
    catalogue = _as_encoded_in_training(Catalogue.load(folder / CATALOGUE_FOLDER), info.get("modalities"), run, folder)
    event_features = [EventColumn.from_dict(column) for column in info.get("event_features", [])]
    weights = load_tensors(run / WEIGHTS_FILE)
    catalogue, n_trained = _since_training(catalogue, run, folder, weights)
    model = build_missrec(recipe.model, catalogue, event_features)
    if n_trained == catalogue.n_rows:
        load_strictly(model, weights, str(run / WEIGHTS_FILE))
        mark_rows(model, catalogue, n_trained)
    else:
        n_new = catalogue.n_rows - n_trained
        log.info(f"{folder} has {n_new:,} items more than {run} was trained on; they are scored by their modalities")
        load_extended(model, weights, catalogue, n_trained, str(run / WEIGHTS_FILE))
    return LoadedRun(model.eval(), catalogue, recipe, folder, n_trained)


def _as_encoded_in_training(
    catalogue: Catalogue, trained: Mapping[str, Mapping[str, Any]] | None, run: Path, folder: Path
) -> Catalogue:
    """Return the catalogue with the modalities of the training, in their order.

    Vectors of another encoder have the same shape and give other scores without any sign of it, so fingerprints are
    compared. Parameters: ``trained`` is `encoders_of` the catalogue of the training; None in runs of early versions.
    """
    if not trained:
        return catalogue
    if missing := [name for name in trained if name not in catalogue.modalities]:
        raise CheckpointError(
            f"{folder} has no vectors of {', '.join(missing)}, which {run} was trained on",
            f"the modalities of the training: {', '.join(trained)}",
            "add them with `missrec features` or `missrec etl --modality`, as before the training",
        )
    now = encoders_of(catalogue)
    encoders = {name: (trained[name]["fingerprint"], now[name]["fingerprint"]) for name in trained}
    if changed := [name for name, (then, today) in encoders.items() if then and today and then != today]:
        told = "; ".join(f"{name}: {encoders[name][0]} then, {encoders[name][1]} now" for name in changed)
        raise CheckpointError(
            f"the {' and '.join(changed)} vectors of {folder} are of another encoder than in the training of {run}"
            f" ({told})",
            "the same encoder, options and fitted state",
            "encode again with the options of that time (new items with `missrec features --like`), or train again",
        )
    for name, (then, today) in encoders.items():
        if bool(then) != bool(today):
            log.warning(
                f"whether the {name} vectors are those {run} was trained on is unknown: {then} then, {today} now"
            )
    if more := [name for name in catalogue.modalities if name not in trained]:
        log.info(f"{folder} also has vectors of {', '.join(more)}; {run} was trained without them")
    return Catalogue(catalogue.items, {name: catalogue.modalities[name] for name in trained}, checked=True)


def _since_training(
    catalogue: Catalogue, run: Path, folder: Path, weights: Mapping[str, Tensor]
) -> tuple[Catalogue, int]:
    """Return the catalogue with the event counts of the training, 0 for new items, and the rows of the training."""
    file = run / VOCABULARY_FILE
    if not file.is_file():  # of an early version
        return catalogue, catalogue.n_rows
    earlier, ids = pq.read_table(file), one_array(catalogue.items[ITEM_ID])
    known = one_array(earlier[ITEM_ID])
    if not ids.slice(0, len(known)).equals(known):
        n_there = len({*ids.to_pylist()} & {*known.to_pylist()})  # their types may differ, as 7 and "7" do
        raise CheckpointError(
            f"{folder} has other items, or another order of items, than {run}: {n_there:,} of {len(known):,} are there",
            "the items of the training in their order, new ones after them, as `missrec etl --update` writes them",
            f"give the run's own folder with --data, or train on this one: `missrec train --warm-start {run}`",
        )
    counts = catalogue.train_count[FIRST_ITEM_ROW:].copy()
    if TRAIN_COUNT in earlier.column_names:
        counts[: len(known)] = earlier[TRAIN_COUNT].to_numpy()
    elif (frequency := weights.get("terms.item_knn.frequency")) is not None and frequency.any():
        counts[: len(known)] = frequency[FIRST_ITEM_ROW:].long().numpy()
    counts[len(known) :] = 0
    items = with_column(catalogue.items, TRAIN_COUNT, pa.array(counts, pa.int64()))
    return Catalogue(items, catalogue.modalities, checked=True), FIRST_ITEM_ROW + len(known)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically.

    Raises
    ------
    DataError
        The disk is full or read-only.
    """
    seen: set[int] = set()
    with atomic_write_file(path) as temporary:
        save_file({name: _unshared(tensor, seen) for name, tensor in tensors.items()}, temporary, dict(metadata or {}))


def _unshared(tensor: Tensor, seen: set[int]) -> Tensor:
    """Return the tensor contiguous in its own storage, as safetensors requires; copied only if it shares one."""
    tensor = tensor.detach().contiguous()
    storage = tensor.untyped_storage()
    shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
    seen.add(storage.data_ptr())
    return tensor.clone() if shared else tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; weights of an earlier version get today's names.

    Raises
    ------
    CheckpointError
        Missing or damaged file.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})", "a safetensors file", "train again") from error
    return current_names(tensors)


def load_metadata(path: Path) -> dict[str, str]:
    """Return the metadata that `save_tensors` stored with the tensors."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def data_folder(run: Path, info: Mapping[str, Any]) -> Path:
    """Return the data folder of a run; its `run.json` holds the path from the run folder."""
    return Path(os.path.normpath(run.resolve() / info["data"]))


def encoders_of(catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """Return width and encoder fingerprint of every modality, as `run.json` holds them."""
    return {
        name: {"width": modality.width, "fingerprint": modality.fingerprint}
        for name, modality in catalogue.modalities.items()
    }


def _write_vocabulary(path: Path, catalogue: Catalogue) -> None:
    """Write the raw ids and the training's event counts in row order, from row 3 on."""
    with atomic_write_file(path) as temporary:
        pq.write_table(catalogue.items.select([ITEM_ID, TRAIN_COUNT]), temporary)


def versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that a result depends on."""
    installed = {"python": platform.python_version()}
    for package in ("missrec-t4r", "torch", "numpy", "transformers4rec", "nvtabular"):
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
