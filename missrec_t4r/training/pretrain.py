"""Pre-training on several domains at once: contrastive objectives over a union catalogue (specification 7 and 8).

Batches mix the domains. Interests are discovered once per schedule over the union. Epochs, averaged weights, early
stopping, checkpoints and resume are those of fine-tuning: only objective, rhythm of interests and catalogue differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from missrec_t4r.config import Recipe
from missrec_t4r.data.augmentation import View, augmented_view
from missrec_t4r.data.batching import TrainingBatch
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.union import WORD_DROP, Domains, load_domains, named_folders
from missrec_t4r.errors import ConfigError, DataError
from missrec_t4r.model.contrastive import BatchEmbeddings, SequenceItemContrast, SequenceSequenceContrast, WordDrop
from missrec_t4r.model.losses import orthogonality_loss
from missrec_t4r.model.missrec import Encoded, MISSRec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.schema import UNKNOWN_ROW
from missrec_t4r.training import distributed
from missrec_t4r.training.fit import planned
from missrec_t4r.training.precision import autocast, widened
from missrec_t4r.training.step import Totals
from missrec_t4r.training.trainer import Trainer

PRETRAINING = "pretraining"
"""Key of `run.json` that marks a pre-training run."""


def pretrain(
    data: Iterable[str | Path] | Mapping[str, Path],
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "pretrain",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Pre-train on several data folders and write a run folder for ``missrec train --from``.

    Parameters
    ----------
    data : sequence of path or of ``NAME=PATH``, or mapping of str to Path
        Folders written by ``missrec etl``; a domain is called like its folder unless named.
    out : path
        Run folder. An interrupted run with the same recipe and domains is continued.
    recipe : str, path or Recipe
    settings : mapping, optional
        Overrides such as ``{"pretrain.objective": "full_softmax"}``.
    resume : bool
        False starts over.
    device : str
        ``"auto"`` takes a GPU if there is one.
    dry_run : bool
        As in `missrec_t4r.training.fit.train`.

    Returns
    -------
    dict
        As `missrec_t4r.training.fit.train`, with the domains and where each modality comes from.

    Raises
    ------
    ModalityError
        A modality does not say which encoder made it.
    DataError, ConfigError, CheckpointError
        Unusable data, contradictory settings, or a checkpoint of other settings.
    """
    folders = dict(data) if isinstance(data, Mapping) else named_folders(data)
    if not folders:
        raise ConfigError("no data folder was named", "one --data per domain")
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
    _check_settings(resolved)
    domains = load_domains(folders)
    if not (domains.splits["train"].lengths >= 2).any():
        raise DataError("no training session has two known items", "sessions to learn from", "check the ETL")
    with distributed.joined(distributed.own_device(device)):
        trainer = Pretrainer(resolved, domains, folders, Path(out), device, progress)
        if dry_run:
            return planned(trainer, next(iter(folders.values())), resume=resume)
        if resume:
            trainer.resume()
        else:
            trainer.start_over()
        return trainer.run(next(iter(folders.values())))


class Pretrainer(Trainer):
    """State of one pre-training run.

    Parameters
    ----------
    recipe : Recipe
    domains : Domains
    folders : mapping of str to Path
        Where the domains come from, for the record.
    out : Path
        Run folder.
    device : str
    progress : Progress
    """

    def __init__(
        self,
        recipe: Recipe,
        domains: Domains,
        folders: Mapping[str, Path],
        out: Path,
        device: str = "auto",
        progress: Progress = quiet,
    ) -> None:
        facts, splits = _facts(domains, folders, out), domains.splits

        def prepare(model: MISSRec, _: Catalogue) -> dict[str, Any]:
            model.item_encoder.adapters.requires_grad_(not recipe.pretrain.keep_adapters)
            return facts

        super().__init__(recipe, domains.catalogue, splits["train"], splits["valid"], out, device, progress, prepare)
        varied = {
            name: torch.from_numpy(modality.variants[WORD_DROP])
            for name, modality in domains.catalogue.modalities.items()
            if WORD_DROP in modality.variants
        }
        scaling = recipe.model.feature_scaling
        self.word_drop = WordDrop(self.model.item_encoder, varied, scaling).to(self.device) if varied else None
        self.log_frequency: Tensor | None = None
        if recipe.pretrain.popularity_correction:
            later = np.delete(splits["train"].values, splits["train"].offsets[:-1][splits["train"].lengths > 0])
            counts = torch.from_numpy(np.bincount(later, minlength=domains.catalogue.n_rows)).to(self.device)
            self.log_frequency = torch.log(counts.clamp_min(1) / counts.sum())
        for line in domains.describe():
            self.progress.say(line)
        if self.word_drop is None and recipe.pretrain.sequence_sequence_weight:
            self.progress.say(
                "no domain has texts with words left out (`missrec features`): every view leaves items out"
            )

    def refresh_interests(self, epoch: int) -> None:
        """Cluster the union's tokens at the start of the schedule, and never again unless the recipe says so."""
        if epoch == 0 or self.recipe.pretrain.refresh_interests:
            super().refresh_interests(epoch)

    def loss(self, batch: TrainingBatch, totals: Totals | None = None) -> Tensor:
        """Return the objective of a batch, or of this process's part of it."""
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
        All positions of sessions (each is contrasted with its next item) or prefixes. The contrast with the augmented
        view is made once per line, at its last item.
    recipe : Recipe
        Temperature, weights, and the views' probabilities.
    word_drop : WordDrop, optional
        Where the catalogue has texts with words left out.
    log_frequency : Tensor [row], optional
        For the correction of popularity.
    """
    settings, temperature = recipe.pretrain, recipe.model.temperature
    item_ids, targets = batch.item_ids, batch.targets[..., 0]
    wanted = (targets > 0) & model.recommendable[targets]
    positives = targets[wanted]
    everyone = distributed.gather_rows(positives)
    view = augmented_view(item_ids, settings, has_word_drop=word_drop is not None)
    with autocast(recipe.train.precision, item_ids.device):
        items = BatchEmbeddings.of(model.item_encoder, item_ids, everyone)
        encoded = _widened(model.encode(item_ids, items=items.take(item_ids), last_only=targets.ndim == 1))
        other = _widened(_encode_view(model, view, items, word_drop)) if settings.sequence_sequence_weight else None
    items = items._replace(tokens=items.tokens._replace(modality=widened(items.tokens.modality)))
    first = distributed.rows_before(len(positives), positives.device)
    contrast = SequenceItemContrast(model.fusion, temperature)
    loss = contrast(encoded.vectors[wanted], positives, everyone, items, first, log_frequency)
    regulariser = _orthogonality(model, encoded)
    if other is not None:
        vectors, targets, wanted = _last_positions(item_ids, encoded.vectors, targets, wanted)
        positives = targets[wanted]
        everyone = distributed.gather_rows(positives)
        first = distributed.rows_before(len(positives), positives.device)
        against = SequenceSequenceContrast(temperature, distributed.gather_rows)
        between = against(vectors[wanted], other.vectors[wanted], positives, everyone, first)
        loss = loss + settings.sequence_sequence_weight * between
        regulariser = regulariser + _orthogonality(model, other)
    return loss + model.config.orthogonality_weight * regulariser


def _encode_view(model: MISSRec, view: View, items: BatchEmbeddings, word_drop: WordDrop | None) -> Encoded:
    tokens = items.take(view.item_ids)
    if word_drop is not None and view.word_dropped is not None:
        tokens = word_drop(tokens, view.item_ids, view.word_dropped)
    return model.encode(view.item_ids, items=tokens, last_only=True)


def _widened(encoded: Encoded) -> Encoded:
    return encoded._replace(vectors=widened(encoded.vectors), memory=widened(encoded.memory))


def _last_positions(item_ids: Tensor, *by_position: Tensor) -> list[Tensor]:
    """Return what belongs to each line's last item, where there is one value per position."""
    if by_position[1].ndim == 1:
        return list(by_position)
    lines = torch.arange(len(item_ids), device=item_ids.device)
    last = ((item_ids > UNKNOWN_ROW).sum(1) - 1).clamp_min(0)
    return [values[lines, last] for values in by_position]


def _orthogonality(model: MISSRec, encoded: Encoded) -> Tensor:
    mask = encoded.interests.mask
    sessions = distributed.sum_((mask.sum(1) > 1).sum())
    return orthogonality_loss(encoded.memory, mask, model.config.orthogonality, sessions=sessions)


def _check_settings(recipe: Recipe) -> None:
    contrastive = recipe.pretrain.objective == "contrastive"
    wrong = [
        (recipe.model.item_ids, "model.item_ids is on, and IDs of one catalogue mean nothing in another"),
        (recipe.model.candidate_fusion == "dynamic_instance", "model.candidate_fusion has one number per item"),
        (recipe.model.event_features not in ("none", "auto"), "model.event_features belong to one domain"),
        (contrastive and recipe.train.next_items > 1, "train.next_items is above 1 with a contrastive objective"),
        (contrastive and recipe.train.accumulate > 1, "train.accumulate would make the batch's negatives fewer"),
    ]
    found = [words for bad, words in wrong if bad]
    if found:
        raise ConfigError("; ".join(found), "settings that transfer", "start from the recipe pretrain")


def _facts(domains: Domains, folders: Mapping[str, Path], out: Path) -> dict[str, Any]:
    """Return what `run.json` says about the domains; paths relative to the run, so that all can be moved together."""
    described = {
        name: {
            "data": os.path.relpath(folders[name].resolve(), out.resolve()),
            "items": int((domains.domain == index).sum()),
        }
        for index, name in enumerate(domains.names)
    }
    return {PRETRAINING: {"domains": described, "modalities": {k: dict(v) for k, v in domains.sources.items()}}}
