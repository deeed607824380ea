"""`missrec train --from`: start from a pre-trained run, freeze what the paper freezes, and say what was done (8).

An adapter is taken over where the same encoder made the vectors, by fingerprint. Encoder, decoder, positions and fusion
fit any catalogue; IDs, interests and what was counted belong to the other one and start anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from missrec_t4r.config import IdInit, MISSRecConfig, Recipe
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.union import match_modalities, require_fingerprints
from missrec_t4r.errors import CheckpointError, ConfigError
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import Progress, quiet
from missrec_t4r.runs.run_folder import RECIPE_FILE, RUN_FILE, WEIGHTS_FILE, load_tensors
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training import distributed
from missrec_t4r.training.fit import train
from missrec_t4r.training.trainer import Prepare
from missrec_t4r.training.warm_start.id_init import ids_from_content
from missrec_t4r.training.warm_start.report import WeightLoadingReport, lines

Freeze = Literal["none", "encoder_decoder", "all_loaded"]
Take = Literal["all", "adapters"]

POSITIONS, NORM, ENCODER, DECODER = "position embedding", "input LayerNorm", "encoder", "decoder"
FROZEN = {"none": (), "encoder_decoder": (POSITIONS, ENCODER, DECODER), "all_loaded": (POSITIONS, ENCODER, DECODER)}
"""Parts that stay as they are; ``all_loaded`` freezes the adapters that were loaded too."""
SIZES = ("d_model", "n_head", "d_feedforward", "n_encoder_layers", "n_decoder_layers", "max_sequence_length")
MEANINGS = ("attention", "sequence_fusion", "feature_scaling", "missing_modality", "layer_norm_eps")
"""Settings under which equal weights compute something else: they must agree, as the sizes must."""


@dataclass(frozen=True)
class Source:
    """A finished run as weights to start from."""

    run: Path
    recipe: Recipe
    info: Mapping[str, Any]
    """Content of `run.json`."""
    weights: Mapping[str, Tensor]

    @property
    def fingerprints(self) -> dict[str, str | None]:
        """Fingerprint of every modality's encoder."""
        return {name: described["fingerprint"] for name, described in self.info["modalities"].items()}


def read_source(run: str | Path) -> Source:
    """Read a run to start from.

    Raises
    ------
    CheckpointError
        It is unfinished, or older than the record of its encoders and its data folder is gone.
    """
    run = Path(run)
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(f"{run} holds no {RUN_FILE}", "a finished run of missrec pretrain or train")
    info = json.loads((run / RUN_FILE).read_text(encoding="utf-8"))
    recipe = Recipe.from_stored(json.loads((run / RECIPE_FILE).read_text(encoding="utf-8")))
    if "modalities" not in info:
        catalogue = Catalogue.load(Path(os.path.normpath(run.resolve() / info["data"])) / CATALOGUE_FOLDER)
        info["modalities"] = {
            name: {"width": modality.width, "fingerprint": modality.fingerprint}
            for name, modality in catalogue.modalities.items()
        }
    return Source(run, recipe, info, load_tensors(run / WEIGHTS_FILE))


def train_from(
    data: str | Path,
    out: str | Path,
    source: str | Path,
    *,
    freeze: Freeze | None = None,
    take: Take = "all",
    recipe: str | Path | Recipe = "default",
    settings: Mapping[str, Any] | None = None,
    resume: bool = True,
    device: str = "auto",
    progress: Progress = quiet,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Fine-tune on a data folder from a pre-trained run.

    Parameters
    ----------
    data, out, recipe, settings, resume, device, progress, dry_run
        As in `missrec_t4r.training.fit.train`.
    source : path
        Run folder of ``missrec pretrain``, or of ``missrec train`` on another shop.
    freeze : {"encoder_decoder", "none", "all_loaded"}, optional
        ``encoder_decoder``: position embedding, encoder and decoder stay, as published; the default, except with
        ``take="adapters"``, where nothing of them was loaded.
    take : {"all", "adapters"}
        What is loaded; ``adapters`` starts the rest anew.

    Returns
    -------
    dict
        As `train`, with the report under ``start``.

    Raises
    ------
    CheckpointError
        The run does not fit: sizes, meanings of weights, or no modality of a common encoder. Every gap is listed.
    ConfigError
        An unknown choice, or a freeze that makes no sense.
    """
    freeze = freeze or ("encoder_decoder" if take == "all" else "none")
    for option, value, known in (("freeze", freeze, Freeze), ("take", take, Take)):
        if value not in get_args(known):
            raise ConfigError(f"--{option} {value}", f"one of {', '.join(get_args(known))}")
    read = read_source(source)
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, settings)
    if take == "all":
        require_same(resolved.model, read.recipe.model, read.run)
    elif resolved.model.d_model != read.recipe.model.d_model:
        require_same(resolved.model, read.recipe.model, read.run, ("d_model",))
    prepare = _prepare(read, freeze, take, resolved.train.id_init, Path(out), progress)
    common: dict[str, Any] = {"resume": resume, "device": device, "progress": progress, "dry_run": dry_run}
    return train(data, out, recipe=resolved, prepare=prepare, **common)


def load_pretrained(
    model: MISSRec,
    catalogue: Catalogue,
    source: Source,
    *,
    freeze: Freeze = "encoder_decoder",
    take: Take = "all",
    id_init: IdInit = "random",
) -> dict[str, Any]:
    """Load a source's weights into a model and freeze parts.

    Returns
    -------
    dict
        ``parts`` (name, status, parameters, note, frozen), ``parameters``, ``trainable_parameters``,
        ``trainable_share``.

    Raises
    ------
    CheckpointError
        No modality of a common encoder, weights of other sizes, or a frozen part that was not loaded.
    """
    report = WeightLoadingReport(model, source.weights, str(source.run))
    matched = _common_modalities(catalogue, source)
    for name in model.item_encoder.names:
        prefix, known = f"item_encoder.adapters.{name}.", catalogue.modalities[name].fingerprint
        if name in matched:
            theirs = matched[name]
            note = "" if theirs == name else f"from {theirs!r}, the same encoder under another name"
            report.copy(f"adapter {name}", prefix, theirs=f"item_encoder.adapters.{theirs}.", note=note)
        else:
            why = "no modality of this encoder there" if known else "its encoder is not stated"
            report.fresh(f"adapter {name}", why, prefix)
    everything = {
        POSITIONS: ("decoder.positions.",),
        NORM: ("decoder.norm_input.",),
        ENCODER: ("encoder.",),
        DECODER: ("decoder.layers.", "decoder.norm."),
    }
    for name, prefixes in everything.items():
        if take == "all":
            report.copy(name, *prefixes)
        else:
            report.fresh(name, "only adapters were asked for", *prefixes)
    _load_fusion(report, take)
    why = "of this catalogue's items" if id_init == "random" else "start as the items' tokens"
    report.fresh("item IDs", why, "item_encoder.id_embedding.")
    if id_init == "content":
        ids_from_content(model)
    report.fresh("interests", "discovered in this catalogue", "interests.")
    report.fresh("side features", "of this data's events", "event_features.")
    report.fresh("neighbour prior", "counted after training", "item_knn.")
    report.fresh("look-alike prior", "found after training", "content_knn.")
    frozen = FROZEN[freeze]
    if freeze == "all_loaded":
        frozen = (*frozen, *(f"adapter {name}" for name in matched))
    report.freeze(frozen)
    return report.finish()


def require_same(
    wanted: MISSRecConfig, known: MISSRecConfig, run: Path, names: tuple[str, ...] = (*SIZES, *MEANINGS)
) -> None:
    """Refuse settings under which the run's weights would not fit, or would mean something else.

    Raises
    ------
    CheckpointError
        Names them all, with the options that make them agree.
    """
    differing = [name for name in names if getattr(wanted, name) != getattr(known, name)]
    if differing:
        found = ", ".join(f"{name} {getattr(wanted, name)}" for name in differing)
        there = ", ".join(f"{name} {getattr(known, name)}" for name in differing)
        cure = " ".join(f"--set model.{name}={getattr(known, name)}" for name in differing)
        raise CheckpointError(f"the recipe has {found}", f"{there}, as in {run}", f"add {cure}")


def start_facts(kind: str, source: Source, out: Path, report: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Return what `run.json` keeps about the start, the path relative to the run."""
    where = os.path.relpath(source.run.resolve(), out.resolve())
    return {"start": {"kind": kind, "run": where, **more, **report}}


def _prepare(source: Source, freeze: Freeze, take: Take, id_init: IdInit, out: Path, progress: Progress) -> Prepare:
    said = progress if distributed.launched().rank == 0 else quiet  # under torchrun the first process speaks

    def prepare(model: MISSRec, catalogue: Catalogue) -> dict[str, Any]:
        report = load_pretrained(model, catalogue, source, freeze=freeze, take=take, id_init=id_init)
        said.say(f"starting from {source.run}, freezing {freeze}")
        for line in lines(report):
            said.say(line)
        return start_facts("from", source, out, report, freeze=freeze, take=take)

    return prepare


def _common_modalities(catalogue: Catalogue, source: Source) -> dict[str, str]:
    own = {name: modality.fingerprint for name, modality in catalogue.modalities.items()}
    matched = match_modalities(own, source.fingerprints)
    if not matched:
        require_fingerprints(catalogue.modalities, "the data folder")
        raise CheckpointError(
            f"no modality of this data comes from an encoder of {source.run}: here {_listed(own)}",
            f"one of {_listed(source.fingerprints)}",
            "encode the items with the same encoder, or train without --from",
        )
    for name, theirs in matched.items():
        if catalogue.modalities[name].width != source.info["modalities"][theirs]["width"]:
            raise CheckpointError(
                f"modality {name!r} has width {catalogue.modalities[name].width} and the same fingerprint as there",
                f"width {source.info['modalities'][theirs]['width']}",
                "state the encoder's revision and preprocessing in the fingerprint",
            )
    return matched


def _load_fusion(report: WeightLoadingReport, take: Take) -> None:
    per_item = report.model.config.candidate_fusion == "dynamic_instance"
    if take == "all" and not per_item:
        report.copy("fusion", "fusion.")
        report.copy("history bias", "history_bias")
        return
    why = "one number per item of this catalogue" if per_item else "only adapters were asked for"
    report.fresh("fusion", why, "fusion.")
    report.fresh("history bias", "starts anew", "history_bias")


def _listed(fingerprints: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} ({fingerprint or 'encoder not stated'})" for name, fingerprint in fingerprints.items())
