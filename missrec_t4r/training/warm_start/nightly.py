"""`missrec train --warm-start`: train from an earlier run on the same shop, whose catalogue has changed since.

Items are matched by raw id, never by row. Items of both catalogues keep their ID embeddings and interests; the ID
embedding of a new item is initialised and its interests are the nearest centroids; removed items are dropped. Optimiser
and early stopping start from the beginning. The weight-loading report lists the status of every part.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.config.checks import require_choices
from missrec_t4r.config.training import IdInit
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.event_features import EventColumn, encoded_values
from missrec_t4r.data.union import match_modalities
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.model.clustering import nearest_of_all
from missrec_t4r.model.missrec import MISSRec, evaluating
from missrec_t4r.runs.run_folder import VOCABULARY_FILE, data_folder
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID
from missrec_t4r.training.warm_start.id_init import ids_from_content
from missrec_t4r.training.warm_start.report import WeightLoadingReport
from missrec_t4r.training.warm_start.transfer import (
    PARTS,
    Freeze,
    Source,
    frozen_parts,
    log_start,
    read_source,
    require_same,
)

log = logging.getLogger(__name__)


def nightly_start(
    earlier_run: str | Path,
    data: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    settings: Mapping[str, Any] | None = None,
    *,
    freeze: Freeze = "none",
) -> dict[str, Any]:
    """Return the arguments with which `missrec_t4r.training.fit.train` starts from a run on earlier data of a shop.

    Parameters
    ----------
    earlier_run : path
        Run folder of the earlier run; not ``out``.
    data, out : path
        Data folder to train on, and run folder to write, which gets the weight-loading report.
    recipe : Recipe, optional
        By default the earlier run's, with ``settings``.
    freeze : {"none", "encoder_decoder", "all_loaded"}
        Loaded weights that are not trained.

    Raises
    ------
    CheckpointError
        The run does not fit: other sizes; and, when the model is built, another encoder's vectors, no common item. All
        differences are listed.
    ConfigError
        ``out`` is the earlier run itself.
    """
    if Path(out).resolve() == Path(earlier_run).resolve():
        raise ConfigError(f"--out {out} is the run to start from", "a new folder, since the old run is read")
    require_choices(freeze=(freeze, get_args(Freeze)))
    source = read_source(earlier_run)
    if "pretraining" in source.info:
        raise CheckpointError(f"{earlier_run} is a pre-training run", "a run on this shop", f"use --from {earlier_run}")
    resolved = source.recipe.changed(settings or {}) if recipe is None else recipe
    require_same(resolved.model, source.recipe.model, source.run)
    event_features = [
        _extend_values(EventColumn.from_dict(column), Path(data)) for column in source.info.get("event_features", [])
    ]

    def prepare(model: MISSRec, catalogue: Catalogue) -> dict[str, Any]:
        report, items = load_continued(model, catalogue, source, freeze=freeze, id_init=resolved.train.id_init)
        counts = ", ".join(f"{count:,} {name}" for name, count in items.items())
        log.info(f"warm start from {source.run}: items {counts}")
        return log_start("warm_start", source, Path(out), report, freeze=freeze, items=items)

    return {"recipe": resolved, "prepare": prepare, "event_features": event_features}


def load_continued(
    model: MISSRec,
    catalogue: Catalogue,
    source: Source,
    *,
    freeze: Freeze = "none",
    id_init: IdInit = "random",
) -> tuple[dict[str, Any], dict[str, int]]:
    """Load an earlier run's weights into a model over a changed catalogue.

    Returns
    -------
    report : dict
        As `WeightLoadingReport.finish` returns it.
    items : dict
        Number of items ``kept``, ``new`` and ``retired``.

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
        note = "" if name in matched else "a new modality"
        if name in matched and not (catalogue.modalities[name].fingerprint and source.fingerprints[matched[name]]):
            note = "its encoder is not stated: assumed to be the same"
        report.copy_adapter(name, matched.get(name), note)
    for name, prefixes in PARTS.items():
        report.copy(name, *prefixes)
    if id_init == "content":
        ids_from_content(model)
    kept = int((old_rows[FIRST_ITEM_ROW:] >= 0).sum())
    items = {"kept": kept, "new": catalogue.n_items - kept, "retired": len(earlier) - kept}
    note = f"{kept:,} rows by raw id, the rest new"
    _copy_rows(report, "item IDs", "item_encoder.id_embedding.weight", old_rows, note)
    _copy_rows(report, "candidate IDs", "item_encoder.candidate_id_embedding.weight", old_rows, note)
    if model.config.candidate_fusion == "dynamic_instance":
        _copy_rows(report, "fusion", "fusion.phi", old_rows, note)
    else:
        report.copy("fusion", "fusion.")
    report.copy("history bias", "terms.history_bias.bias")
    report.record_initialised("history offset", "fitted after training", "terms.history_bias.offset")
    _copy_event_features(report)
    if model.config.has_interests and model.interests.algorithm == "kmeans":
        _copy_interests(model, source, old_rows, matched)
        report.record_loaded("interests", "initial centroids, refined before the first epoch", "interests.")
    else:
        why = "density peaks have no warm start" if model.config.has_interests else "the model has none"
        report.record_initialised("interests", why, "interests.")
    return report.finish(frozen_parts(freeze, matched)), items


def read_vocabulary(source: Source) -> pa.Array:
    """Return the raw ids of a run's catalogue in row order, from row 3 on.

    Raises
    ------
    CheckpointError
        The run is too old to have a vocabulary file, and its data folder has changed.
    """
    file = source.run / VOCABULARY_FILE
    if file.is_file():
        return pq.read_table(file)[ITEM_ID].combine_chunks()
    folder = data_folder(source.run, source.info) / CATALOGUE_FOLDER
    catalogue = Catalogue.load(folder)
    rows = source.weights["interests.assignment"].shape[1]
    if catalogue.n_rows != rows:
        raise CheckpointError(
            f"{source.run} holds no item ids, and {folder} has {catalogue.n_rows} rows now",
            f"the {rows} rows that it was trained on",
            "train without --warm-start once; later runs hold their ids",
        )
    return catalogue.items[ITEM_ID].combine_chunks()


def earlier_rows(catalogue: Catalogue, earlier: pa.Array, run: Path) -> Tensor:
    """Return the row in the earlier catalogue of every row, [row], int64; -1 for new items.

    Raises
    ------
    CheckpointError
        Ids of another type, or no common item.
    """
    is_integer = pa.types.is_integer(earlier.type)
    if is_integer != (catalogue.id_type == "int64"):
        raise CheckpointError(
            f"item ids are {catalogue.id_type} here and {earlier.type} in {run}", "ids of one type", "convert them"
        )
    before = Catalogue(pa.table({ITEM_ID: earlier, "train_count": np.zeros(len(earlier), np.int64)}), {})
    rows = before.rows_of(catalogue.items[ITEM_ID].combine_chunks())
    rows = np.where(rows >= FIRST_ITEM_ROW, rows, -1)
    if not (rows >= 0).any():
        raise CheckpointError(
            f"no item of this catalogue is in that of {run}", "an earlier catalogue of the same shop", "use --from"
        )
    return torch.from_numpy(np.concatenate([np.arange(FIRST_ITEM_ROW), rows]))


def _same_modalities(catalogue: Catalogue, source: Source) -> dict[str, str]:
    """Match modalities by fingerprint, then by name if one side states none; one name for two encoders is an error."""
    own = {name: modality.fingerprint for name, modality in catalogue.modalities.items()}
    matched = match_modalities(own, source.fingerprints)
    for name, modality in catalogue.modalities.items():
        if name in matched or name not in source.fingerprints or name in matched.values():
            continue
        theirs, width = source.fingerprints[name], source.info["modalities"][name]["width"]
        if (own[name] and theirs) or modality.width != width:
            raise CheckpointError(
                f"modality {name!r} comes from another encoder than in {source.run}: "
                f"{own[name] or 'not stated'}, width {modality.width}",
                f"{theirs or 'not stated'}, width {width}",
                "encode new items as before (`missrec features --like`), or train without --warm-start",
            )
        matched[name] = name
    return matched


@torch.no_grad()
def _copy_rows(report: WeightLoadingReport, part: str, name: str, old_rows: Tensor, note: str) -> None:
    """Copy the rows of a table for the items of both catalogues."""
    table, earlier = report.model.state_dict().get(name), report.weights.get(name)
    if table is None:
        return
    if earlier is None:
        report.record_initialised(part, "the earlier run had none", name)
        return
    is_kept = old_rows >= 0
    table[is_kept] = earlier[old_rows[is_kept]].to(table)
    report.record_loaded(part, note, name)


@torch.no_grad()
def _copy_event_features(report: WeightLoadingReport) -> None:
    """Copy the event features' tables; new categories have rows at the end, which keep their initial values."""
    tables = {name: table for name, table in report.model.state_dict().items() if name.startswith("event_features.")}
    for name, table in tables.items():
        earlier = report.weights[name]
        table[: len(earlier)].copy_(earlier)
    if tables:
        report.record_loaded("event features", "scaled as in the earlier run, new categories random", "event_features.")


@torch.no_grad()
def _copy_interests(model: MISSRec, source: Source, old_rows: Tensor, matched: Mapping[str, str]) -> None:
    """Assign the interests of kept items as before, of new ones to the nearest centroid; add or drop centroids to fit.

    The number of interests follows the size of the catalogue. Additional centroids are the embeddings farthest from
    all others'; of too many, those with most members stay.
    """
    with evaluating(model):
        items = model.item_encoder.catalogue()  # [modality, row, dim]
    centroids, their_names = source.weights["interests.centroids"][1:], list(source.fingerprints)
    assignment = torch.zeros_like(model.interests.assignment)  # [modality, row], 0: none
    is_kept = old_rows >= 0
    for index, name in enumerate(model.item_encoder.names):
        if name in matched:
            earlier = source.weights["interests.assignment"][their_names.index(matched[name])]
            assignment[index, is_kept] = earlier[old_rows[is_kept]]
    assignment *= items.mask
    n_interests = model.interests.n_interests
    if n_interests < len(centroids):
        centroids, assignment = _largest(centroids, assignment, n_interests)
    is_open = items.mask & (assignment == 0)
    points = items.modality[is_open].float()  # [embedding, dim]
    nearest, distance = nearest_of_all(points, centroids)
    if n_interests > len(centroids) and len(points):
        farthest = distance.argsort(descending=True, stable=True)[: n_interests - len(centroids)]
        centroids = torch.cat([centroids, points[farthest]])
        nearest, _ = nearest_of_all(points, centroids)
    assignment[is_open] = nearest + 1
    model.interests.centroids[1 : len(centroids) + 1] = centroids
    model.interests.assignment.copy_(assignment)


def _largest(centroids: Tensor, assignment: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Keep the ``size`` interests with most members; members of the others become unassigned."""
    counts = torch.bincount(assignment.flatten(), minlength=len(centroids) + 1)[1:]
    largest = counts.argsort(descending=True, stable=True)[:size].sort().values
    new_label = assignment.new_zeros(len(centroids) + 1)
    new_label[largest + 1] = torch.arange(1, size + 1)
    return centroids[largest], new_label[assignment]


def _extend_values(column: EventColumn, data: Path) -> EventColumn:
    """Return an event feature as the earlier run fitted it, with new categories appended."""
    data_values: Sequence[str | float] = encoded_values(data).get(column.name, ())
    if column.kind != "categorical" or not column.values:
        return column
    known = set(column.values)
    values = (*column.values, *(value for value in data_values if value not in known))
    return dataclasses.replace(column, values=values, size=max(column.size, FIRST_ITEM_ROW + len(values)))
