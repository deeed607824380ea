"""Pre-training on several domains: contrastive objectives over a union catalogue (arXiv:2308.11175).

    loss = sequence-item contrast + lambda * sequence-sequence contrast + gamma * orthogonality of both views

(`docs/equations.md`, E14 to E17). Batches mix the domains. Interests are discovered over the union, once unless the
recipe sets it otherwise. Epochs, averaged weights, early stopping, checkpoints and resume are those of fine-tuning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.augmentation import View, augmented_view
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import target_counts
from missrec_t4r.data.union import WORD_DROP, Domains, load_domains, named_folders
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.model.contrastive import (
    BatchEmbeddings,
    Positives,
    WordDrop,
    sequence_item_contrast,
    sequence_sequence_contrast,
)
from missrec_t4r.model.item_encoder import to_fp32
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import Encoded, MISSRec
from missrec_t4r.runs.run_folder import require_run_folder
from missrec_t4r.schema import UNKNOWN_ROW
from missrec_t4r.training import distributed
from missrec_t4r.training.fit import run_or_describe
from missrec_t4r.training.memory import translate_out_of_memory
from missrec_t4r.training.precision import autocast
from missrec_t4r.training.reuse import alone, recipe_key, run_or_reuse
from missrec_t4r.training.state import TrainingData
from missrec_t4r.training.step import Totals
from missrec_t4r.training.trainer import Trainer

log = logging.getLogger(__name__)

PRETRAINING = "pretraining"
"""Key of `run.json` that only pre-training runs have."""


def pretrain(
    data: Sequence[str | Path] | Mapping[str, Path],
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    reuse: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Pre-train on several data sets whose modality vectors come from the same encoders; then `missrec train --from`.

    Parameters
    ----------
    data : sequence of path or of ``NAME=PATH``, or mapping of str to Path
        Data folder of one domain, or NAME=FOLDER; repeatable.
    out : path
        Run folder to write.
    recipe : str, path or Recipe
        Shipped recipe or YAML file.
    settings : mapping, optional
        Setting that overrides the recipe, such as train.epochs=10; repeatable.
    resume : bool
        --restart trains from the start; by default an interrupted run is resumed and a finished one returned.
    device : str
        auto (a GPU if there is one), cpu or cuda.
    reuse : bool
        As in `missrec_t4r.commands.train`.
    dry_run : bool
        Check everything, predict time and memory from a few steps, and print what would be done; write nothing.

    Returns
    -------
    dict
        As `missrec_t4r.training.fit.train`, with the domains and the sources of each modality.

    Raises
    ------
    ModalityError
        A modality has no fingerprint of its encoder.
    DataError, ConfigError, CheckpointError
        Unusable data, contradictory settings, or a checkpoint of other settings.
    """
    folders, out = dict(data) if isinstance(data, Mapping) else named_folders(data), Path(out)
    if not folders:
        raise ConfigError("no data folder was named", "one --data per domain")
    require_run_folder(out)
    resolved = Recipe.load(recipe, settings)

    def run() -> dict[str, Any]:
        _check_settings(resolved)
        domains = load_domains(folders)
        if not (domains.splits["train"].lengths >= 2).any():
            raise DataError("no training session has two known items", "sessions to learn from", "check the ETL")
        with distributed.joined(distributed.own_device(device)), translate_out_of_memory():
            trainer = Pretrainer(resolved, domains, folders, out, device)
            return run_or_describe(trainer, next(iter(folders.values())), resume=resume, dry_run=dry_run)

    start = alone(run, out, dry_run)
    if not reuse:
        return start()
    key = recipe_key(list(folders.values()), {"domains": list(folders), "device": device}, resolved, None)
    return run_or_reuse(start, out, key, resume, dry_run, resolved)


class Pretrainer(Trainer):
    """Training loop of a pre-training run.

    Parameters
    ----------
    recipe : Recipe
    domains : Domains
    folders : mapping of str to Path
        Data folders of the domains, stored in `run.json`.
    out : Path
        Run folder.
    device : str
    """

    def __init__(
        self,
        recipe: Recipe,
        domains: Domains,
        folders: Mapping[str, Path],
        out: Path,
        device: str = "auto",
    ) -> None:
        facts, splits = _facts(domains, folders, out), domains.splits

        def prepare(model: MISSRec, _: Catalogue) -> dict[str, Any]:
            model.item_encoder.adapters.requires_grad_(not recipe.pretrain.keep_adapters)
            return facts

        data = TrainingData(domains.catalogue, splits["train"], splits["valid"])
        super().__init__(recipe, data, out, device, prepare)
        word_drop_vectors = {
            name: torch.from_numpy(modality.variants[WORD_DROP])
            for name, modality in domains.catalogue.modalities.items()
            if WORD_DROP in modality.variants
        }
        scaling = recipe.model.feature_scaling
        self.word_drop: WordDrop | None = None
        if word_drop_vectors:
            self.word_drop = WordDrop(self.model.item_encoder, word_drop_vectors, scaling).to(self.device)
        self.log_frequency: Tensor | None = None
        if recipe.pretrain.popularity_correction:
            counts = torch.from_numpy(target_counts(splits["train"], domains.catalogue.n_rows)).to(self.device)
            self.log_frequency = torch.log(counts.clamp_min(1) / counts.sum())
        for line in domains.describe():
            log.info(line)
        if self.word_drop is None and recipe.pretrain.sequence_sequence_weight:
            log.info("no domain has texts with words left out (`missrec features`): every view drops items instead")

    def refresh_interests(self, epoch: int) -> None:
        """Discover interests before the first epoch, and later only with ``pretrain.refresh_interests``."""
        if epoch == 0 or self.recipe.pretrain.refresh_interests:
            super().refresh_interests(epoch)

    def can_be_recorded(self) -> bool:
        """Not with contrastive losses, which look for a batch's positives."""
        return self.recipe.pretrain.objective == "full_softmax" and super().can_be_recorded()

    def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> Tensor:
        """Return the pre-training loss of a batch, or of this process's part of it."""
        if self.recipe.pretrain.objective == "full_softmax":
            return super().loss(batch, totals)
        return contrastive_loss(self.model, batch, self.recipe, self.word_drop, self.log_frequency)


def contrastive_loss(
    model: MISSRec,
    batch: TrainingBatch,
    recipe: Recipe,
    word_drop: WordDrop | None = None,
    log_frequency: Tensor | None = None,
) -> Tensor:
    """Return sequence-item contrast + lambda * sequence-sequence contrast + gamma * orthogonality of both views.

    Parameters
    ----------
    model : MISSRec
        In training mode.
    batch : TrainingBatch
        All positions of sessions (each is contrasted with its next item) or prefixes. The sequence-sequence contrast
        takes one position per session, that of the last item.
    recipe : Recipe
        Temperature, weights, and the probabilities of item and word drop.
    word_drop : WordDrop, optional
        If the catalogue has vectors of texts with words left out.
    log_frequency : Tensor [row], optional
        Log share of each item among the targets, for the popularity correction (logQ).
    """
    settings, temperature = recipe.pretrain, recipe.model.temperature
    item_ids, targets = batch.item_ids, batch.targets[..., 0]  # [batch, seq] or, for prefixes, [batch]
    has_positive = (targets > 0) & model.recommendable[targets]
    positives = _among_everyones(targets[has_positive])
    view = augmented_view(item_ids, settings, has_word_drop=word_drop is not None)
    with autocast(recipe.train.precision, item_ids.device):
        items = BatchEmbeddings.of(model.item_encoder, item_ids, positives.everyone)
        encoded = _to_fp32(model.encode(item_ids, items=items.take(item_ids), last_only=targets.ndim == 1))
        other = _to_fp32(_encode_view(model, view, items, word_drop)) if settings.sequence_sequence_weight else None
    items = items._replace(tokens=items.tokens._replace(modality=to_fp32(items.tokens.modality)))
    vectors = encoded.vectors[has_positive]
    loss = sequence_item_contrast(model.fusion, vectors, positives, items, temperature, log_frequency)
    regulariser = _orthogonality(model, encoded)
    if other is not None:
        vectors, targets, has_positive = _last_positions(item_ids, encoded.vectors, targets, has_positive)  # [batch, …]
        sessions, views = vectors[has_positive], distributed.gather_rows(other.vectors[has_positive])
        positives = _among_everyones(targets[has_positive])
        contrast = sequence_sequence_contrast(sessions, views, positives, temperature)
        loss = loss + settings.sequence_sequence_weight * contrast
        regulariser = regulariser + _orthogonality(model, other)
    return loss + model.config.orthogonality_weight * regulariser


def _among_everyones(own: Tensor) -> Positives:
    return Positives(own, distributed.gather_rows(own), distributed.rows_before(len(own), own.device))


def _encode_view(model: MISSRec, view: View, items: BatchEmbeddings, word_drop: WordDrop | None) -> Encoded:
    """Return the encoded sessions of an augmented view, at their last items."""
    tokens = items.take(view.item_ids)
    if word_drop is not None and view.word_dropped is not None:
        tokens = word_drop(tokens, view.item_ids, view.word_dropped)
    return model.encode(view.item_ids, items=tokens, last_only=True)


def _to_fp32(encoded: Encoded) -> Encoded:
    return encoded._replace(vectors=to_fp32(encoded.vectors), memory=to_fp32(encoded.memory))


def _last_positions(item_ids: Tensor, *by_position: Tensor) -> list[Tensor]:
    """Return the values of each session's last item; prefixes have one value per session already."""
    if by_position[1].ndim == 1:
        return list(by_position)
    batch = torch.arange(len(item_ids), device=item_ids.device)
    last = ((item_ids > UNKNOWN_ROW).sum(1) - 1).clamp_min(0)  # [batch]
    return [values[batch, last] for values in by_position]


def _orthogonality(model: MISSRec, encoded: Encoded) -> Tensor:
    """Return the regulariser, as this process's part of the mean over all processes' sessions."""
    mask = encoded.interests.mask
    sessions = distributed.sum_((mask.sum(1) > 1).sum())
    return orthogonality_loss(encoded.memory, mask, model.config.orthogonality, sessions=sessions)


def _check_settings(recipe: Recipe) -> None:
    contrastive = recipe.pretrain.objective == "contrastive"
    wrong = [
        (recipe.model.item_ids, "model.item_ids is on, and ID embeddings belong to one catalogue"),
        (recipe.model.candidate_fusion == "dynamic_instance", "model.candidate_fusion has one number per item"),
        (recipe.model.event_features not in ("none", "auto"), "model.event_features belong to one domain"),
        (contrastive and recipe.train.next_items > 1, "train.next_items is above 1 with a contrastive objective"),
        (contrastive and recipe.train.accumulate > 1, "train.accumulate would reduce the in-batch negatives"),
    ]
    errors = [error for is_wrong, error in wrong if is_wrong]
    if errors:
        raise ConfigError("; ".join(errors), "settings that transfer", "start from the recipe pretrain")


def _facts(domains: Domains, folders: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Return the domains for `run.json`, with paths relative to the run, so that all folders can be moved together."""
    entries = {
        name: {
            "data": os.path.relpath(folders[name].resolve(), out.resolve()),
            "items": int((domains.domain == index).sum()),
        }
        for index, name in enumerate(domains.names)
    }
    return {PRETRAINING: {"domains": entries, "modalities": {k: dict(v) for k, v in domains.sources.items()}}}
