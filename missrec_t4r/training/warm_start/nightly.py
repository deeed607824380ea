"""`missrec train --continue`: tonight's run starts from yesterday's, whatever became of the catalogue's rows meanwhile.

Items are recognised by raw id, never by row: known ones keep their ID embeddings and interests, new ones start at
random and at the nearest centroid, retired ones are forgotten. Optimiser and early stopping start anew.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from missrec_t4r.config import IdInit, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn, encoded_values
from missrec_t4r.data.union import match_modalities
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.runs.run_folder import VOCABULARY_FILE
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID
from missrec_t4r.training import distributed
from missrec_t4r.training.fit import train
from missrec_t4r.training.trainer import Prepare
from missrec_t4r.training.warm_start.id_init import ids_from_content
from missrec_t4r.training.warm_start.report import WeightLoadingReport, lines
from missrec_t4r.training.warm_start.transfer import (
    DECODER,
    ENCODER,
    FROZEN,
    NORM,
    POSITIONS,
    Freeze,
    Source,
    read_source,
    require_same,
    start_facts,
)

_DISTANCES_AT_ONCE = 1 << 24


def continue_training(
    data: str | Path,
    out: str | Path,
    earlier_run: str | Path,
    *,
    freeze: Freeze = "none",
    recipe: str | Path | Recipe | None = None,
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Train on, on today's data folder, from a finished run on an earlier one of the same shop.

    Parameters
    ----------
    data, out, settings, resume, device, progress, dry_run
        As in `missrec_t4r.training.fit.train`.
    yesterday : path
        Run folder; another one than ``out``.
    freeze : {"none", "encoder_decoder", "all_loaded"}
    recipe : str, path or Recipe, optional
        By default the earlier run's, with ``settings`` on top.

    Returns
    -------
    dict
        As `train`, with the report under ``start``.

    Raises
    ------
    CheckpointError
        The run does not fit: other sizes, another encoder's vectors, no common item. Every gap is listed.
    ConfigError
        ``out`` is the run itself.
    """
    if Path(out).resolve() == Path(earlier_run).resolve():
        raise ConfigError(f"--out {out} is the run to continue", "a new folder, since the old run is read")
    if freeze not in get_args(Freeze):
        raise ConfigError(f"--freeze {freeze}", f"one of {', '.join(get_args(Freeze))}")
    source = read_source(earlier_run)
    if "pretraining" in source.info:
        raise CheckpointError(f"{earlier_run} is a pre-training run", "a run on this shop", f"use --from {earlier_run}")
    resolved = _recipe(recipe, settings, source)
    require_same(resolved.model, source.recipe.model, source.run)
    event_features = [
        _grown(EventColumn.from_dict(column), Path(data)) for column in source.info.get("side_features", [])
    ]
    prepare = _prepare(source, freeze, resolved.train.id_init, Path(out), progress)
    common: dict[str, Any] = {"resume": resume, "device": device, "progress": progress, "dry_run": dry_run}
    return train(data, out, recipe=resolved, prepare=prepare, event_features=event_features, **common)


def load_continued(
    model: MISSRec,
    catalogue: Catalogue,
    source: Source,
    *,
    freeze: Freeze = "none",
    id_init: IdInit = "random",
) -> tuple[dict[str, Any], dict[str, int]]:
    """Load an earlier run's weights into a model over a grown catalogue.

    Returns
    -------
    report : dict
        As `missrec_t4r.training.warm_start.transfer.load_pretrained`.
    items : dict
        ``kept``, ``new`` and ``retired``.

    Raises
    ------
    CheckpointError
        Another encoder's vectors, no common item, or weights of other sizes.
    """
    earlier = read_vocabulary(source)
    old_rows = earlier_rows(catalogue, earlier, source.run)
    matched = _same_modalities(catalogue, source)
    report = WeightLoadingReport(model, source.weights, str(source.run))
    for name in model.item_encoder.names:
        prefix = f"item_encoder.adapters.{name}."
        if name in matched:
            stated = catalogue.modalities[name].fingerprint and source.fingerprints[matched[name]]
            note = "" if stated else "its encoder is not stated: taken to be the same"
            report.copy(f"adapter {name}", prefix, theirs=f"item_encoder.adapters.{matched[name]}.", note=note)
        else:
            report.fresh(f"adapter {name}", "a new modality", prefix)
    report.copy(POSITIONS, "decoder.positions.")
    report.copy(NORM, "decoder.norm_input.")
    report.copy(ENCODER, "encoder.")
    report.copy(DECODER, "decoder.layers.", "decoder.norm.")
    if id_init == "content":
        ids_from_content(model)
    kept = int((old_rows[FIRST_ITEM_ROW:] >= 0).sum())
    items = {"kept": kept, "new": catalogue.n_items - kept, "retired": len(earlier) - kept}
    _carry_rows(
        report, "item IDs", "item_encoder.id_embedding.weight", old_rows, f"{kept:,} rows by raw id, the rest new"
    )
    if model.config.candidate_fusion == "dynamic_instance":
        _carry_rows(report, "fusion", "fusion.phi", old_rows, f"{kept:,} items by raw id, the rest new")
    else:
        report.copy("fusion", "fusion.")
    report.copy("history bias", "history_bias")
    _carry_side(report)
    if model.interests.algorithm == "kmeans":
        _carry_interests(model, source, old_rows, matched)
        report.filled("interests", "warm start: refined before the first epoch", "interests.")
    else:
        report.fresh("interests", "density peaks know no warm start", "interests.")
    report.fresh("neighbour prior", "counted after training", "item_knn.")
    report.fresh("look-alike prior", "found after training", "content_knn.")
    frozen = FROZEN[freeze]
    report.freeze((*frozen, *(f"adapter {name}" for name in matched)) if freeze == "all_loaded" else frozen)
    return report.finish(), items


def read_vocabulary(source: Source) -> pa.Array:
    """Return the raw ids of a run's catalogue in row order, from row 3 on.

    Raises
    ------
    CheckpointError
        The run is older than its vocabulary file, and its data folder has changed.
    """
    file = source.run / VOCABULARY_FILE
    if file.is_file():
        return pq.read_table(file)[ITEM_ID].combine_chunks()
    folder = Path(os.path.normpath(source.run.resolve() / source.info["data"])) / CATALOGUE_FOLDER
    catalogue = Catalogue.load(folder)
    rows = source.weights["interests.assignment"].shape[1]
    if catalogue.n_rows != rows:
        raise CheckpointError(
            f"{source.run} does not hold its item ids, and {folder} has {catalogue.n_rows} rows by now",
            f"the {rows} rows that it was trained on",
            "train without --continue once; later runs hold their ids",
        )
    return catalogue.items[ITEM_ID].combine_chunks()


def earlier_rows(catalogue: Catalogue, earlier: pa.Array, run: Path) -> Tensor:
    """Return the earlier row of every row, -1 for new items; [row], int64.

    Raises
    ------
    CheckpointError
        Ids of another type, or no common item.
    """
    numbers = pa.types.is_integer(earlier.type)
    if numbers != (catalogue.id_type == "int64"):
        raise CheckpointError(
            f"item ids are {catalogue.id_type} here and {earlier.type} in {run}", "ids of one type", "convert them"
        )
    before = Catalogue(pa.table({ITEM_ID: earlier, "train_count": np.zeros(len(earlier), np.int64)}), {})
    rows = before.rows_of(catalogue.items[ITEM_ID].combine_chunks())
    rows = np.where(rows >= FIRST_ITEM_ROW, rows, -1)
    if not (rows >= 0).any():
        raise CheckpointError(
            f"no item of this catalogue was in that of {run}", "the same shop on another day", "use --from"
        )
    return torch.from_numpy(np.concatenate([np.arange(FIRST_ITEM_ROW), rows]))


def _prepare(source: Source, freeze: Freeze, id_init: IdInit, out: Path, progress: Progress) -> Prepare:
    said = progress if distributed.launched().rank == 0 else quiet  # under torchrun the first process speaks

    def prepare(model: MISSRec, catalogue: Catalogue) -> dict[str, Any]:
        report, items = load_continued(model, catalogue, source, freeze=freeze, id_init=id_init)
        counts = ", ".join(f"{count:,} {name}" for name, count in items.items())
        said.say(f"continuing {source.run}: items {counts}")
        for line in lines(report):
            said.say(line)
        return start_facts("continue", source, out, report, freeze=freeze, items=items)

    return prepare


def _recipe(recipe: str | Path | Recipe | None, settings: Mapping[str, Any] | None, source: Source) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        return Recipe.load(recipe, settings)
    return source.recipe.changed(settings or {})


def _same_modalities(catalogue: Catalogue, source: Source) -> dict[str, str]:
    """Match by fingerprint, then by name where one of the two is silent; one name for two encoders is refused."""
    own = {name: modality.fingerprint for name, modality in catalogue.modalities.items()}
    matched = match_modalities(own, source.fingerprints)
    for name, modality in catalogue.modalities.items():
        if name in matched or name not in source.fingerprints or name in matched.values():
            continue
        there, width = source.fingerprints[name], source.info["modalities"][name]["width"]
        if (own[name] and there) or modality.width != width:
            raise CheckpointError(
                f"modality {name!r} comes from another encoder than in {source.run}: "
                f"{own[name] or 'not stated'}, width {modality.width}",
                f"{there or 'not stated'}, width {width}",
                "encode new items as before (`missrec features --like`), or train without --continue",
            )
        matched[name] = name
    return matched


@torch.no_grad()
def _carry_rows(report: WeightLoadingReport, part: str, name: str, old_rows: Tensor, note: str) -> None:
    own, theirs = report.model.state_dict().get(name), report.weights.get(name)
    if own is None:
        return
    if theirs is None:
        report.fresh(part, "the earlier run had none", name)
        return
    known = old_rows >= 0
    own[known] = theirs[old_rows[known]].to(own)
    report.filled(part, note, name)


@torch.no_grad()
def _carry_side(report: WeightLoadingReport) -> None:
    """Copy the side features' tables; categories that are new have rows at the end, which stay as initialised."""
    own = {name: tensor for name, tensor in report.model.state_dict().items() if name.startswith("event_features.")}
    for name, tensor in own.items():
        theirs = report.weights[name]
        (tensor[: len(theirs)] if tensor.ndim else tensor).copy_(theirs)
    if own:
        report.filled("side features", "as measured then; new categories start at random", "event_features.")


@torch.no_grad()
def _carry_interests(model: MISSRec, source: Source, old_rows: Tensor, matched: Mapping[str, str]) -> None:
    """Put every known token where it was and every new one at its nearest centroid; grow or shrink to this size."""
    was_training = model.training
    tokens = model.eval().item_encoder.catalogue()
    model.train(was_training)
    centroids, there = source.weights["interests.centroids"][1:], list(source.fingerprints)
    assigned = torch.zeros_like(model.interests.assignment)
    known = old_rows >= 0
    for index, name in enumerate(model.item_encoder.names):
        if name in matched:
            row = source.weights["interests.assignment"][there.index(matched[name])]
            assigned[index, known] = row[old_rows[known]]
    assigned *= tokens.mask
    size = len(model.interests.centroids) - 1
    if size < len(centroids):
        centroids, assigned = _largest(centroids, assigned, size)
    waiting = tokens.mask & (assigned == 0)
    points = tokens.modality[waiting].float()
    distance, nearest = _nearest(points, centroids)
    if size > len(centroids) and len(points):
        farthest = distance.argsort(descending=True, stable=True)[: size - len(centroids)]
        centroids = torch.cat([centroids, points[farthest]])
        distance, nearest = _nearest(points, centroids)
    assigned[waiting] = nearest + 1
    model.interests.centroids[1 : len(centroids) + 1] = centroids
    model.interests.assignment.copy_(assigned)


def _largest(centroids: Tensor, assigned: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Keep the interests with most tokens; tokens of the others wait for a new place."""
    counts = torch.bincount(assigned.flatten(), minlength=len(centroids) + 1)[1:]
    kept = counts.argsort(descending=True, stable=True)[:size].sort().values
    label = assigned.new_zeros(len(centroids) + 1)
    label[kept + 1] = torch.arange(1, size + 1)
    return centroids[kept], label[assigned]


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance to the nearest centroid and which it is."""
    step = max(_DISTANCES_AT_ONCE // max(len(centroids), 1), 1)
    found = [torch.cdist(part, centroids).min(1) for part in points.split(step)]
    if not found:
        return points.new_zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def _grown(column: EventColumn, data: Path) -> EventColumn:
    """Return a side feature as it was measured, with the categories that are new since at the end."""
    today: Sequence[str | int] = encoded_values(data).get(column.name, ())
    if column.kind != "categorical" or not column.values:
        return column
    known = set(column.values)
    values = (*column.values, *(value for value in today if value not in known))
    return dataclasses.replace(column, values=values, size=max(column.size, FIRST_ITEM_ROW + len(values)))
