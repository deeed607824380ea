"""`missrec train --from`: fine-tune from a pre-trained run, with encoder and decoder frozen as in the paper.

An adapter is loaded if the same encoder made the vectors of both data sets (equal fingerprints). Encoder, decoder,
positions and fusion fit any catalogue; ID embeddings, interests and score terms belong to the source's catalogue and
are re-initialised. The weight-loading report lists the status of every part.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from missrec_t4r.config import MISSRecConfig, Recipe
from missrec_t4r.config.checks import require_choices
from missrec_t4r.config.training import IdInit
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.union import match_modalities, require_fingerprints
from missrec_t4r.errors import CheckpointError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.runs.run_folder import RECIPE_FILE, WEIGHTS_FILE, data_folder, encoders_of, load_tensors, read_info
from missrec_t4r.schema import CATALOGUE_FOLDER
from missrec_t4r.training.warm_start.id_init import ids_from_content
from missrec_t4r.training.warm_start.report import WeightLoadingReport, report_lines

log = logging.getLogger(__name__)

Freeze = Literal["none", "encoder_decoder", "all_loaded"]
Take = Literal["all", "adapters"]

PARTS = {
    "position embedding": ("decoder.positions.",),
    "input LayerNorm": ("decoder.norm_input.",),
    "encoder": ("encoder.",),
    "decoder": ("decoder.layers.", "decoder.norm."),
}
"""Parts that every run has, with the prefixes of their weights."""
FROZEN = ("position embedding", "encoder", "decoder")
SIZES = ("d_model", "n_head", "d_feedforward", "n_encoder_layers", "n_decoder_layers", "max_sequence_length")
SEMANTICS = ("attention", "sequence_fusion", "feature_scaling", "missing_modality", "layer_norm_eps")
"""Settings that change what the same weights compute: they must agree, as the sizes must."""


@dataclass(frozen=True)
class Source:
    """A finished run as the source of a warm start."""

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
    """Read the source run of a warm start.

    Raises
    ------
    CheckpointError
        The run is unfinished.
    DataError
        The run is too old to hold its encoders' fingerprints, and its data folder is missing.
    """
    run = Path(run)
    info, recipe = read_info(run), Recipe.from_stored(read_json(run / RECIPE_FILE))
    if "modalities" not in info:
        info["modalities"] = encoders_of(Catalogue.load(data_folder(run, info) / CATALOGUE_FOLDER))
    return Source(run, recipe, info, load_tensors(run / WEIGHTS_FILE))


def transfer_start(
    source: str | Path, out: str | Path, recipe: Recipe, *, freeze: Freeze | None = None, take: Take = "all"
) -> dict[str, Any]:
    """Return the arguments with which `missrec_t4r.training.fit.train` fine-tunes from a pre-trained run.

    Parameters
    ----------
    source : path
        Run folder of ``missrec pretrain``, or of ``missrec train`` on another shop.
    out : path
        Run folder to write; its `run.json` names the source relative to it, and has the weight-loading report.
    recipe : Recipe
    freeze : {"encoder_decoder", "none", "all_loaded"}, optional
        Loaded weights that are not trained. ``encoder_decoder``: position embedding, encoder and decoder, as published;
        the default, except with ``take="adapters"``, which loads none of them.
    take : {"all", "adapters"}
        Weights to load: all, or the modality adapters only.

    Raises
    ------
    CheckpointError
        The run does not fit: other sizes or settings; and, when the model is built, no modality of a common encoder.
        All differences are listed.
    ConfigError
        An unknown choice, or parts to freeze that are not loaded.
    """
    frozen = freeze or ("encoder_decoder" if take == "all" else "none")
    require_choices(freeze=(frozen, get_args(Freeze)), take=(take, get_args(Take)))
    source_run = read_source(source)
    same = (*SIZES, *SEMANTICS) if take == "all" else ("d_model",)
    require_same(recipe.model, source_run.recipe.model, source_run.run, same)

    def prepare(model: MISSRec, catalogue: Catalogue) -> dict[str, Any]:
        id_init = recipe.train.id_init
        report = load_pretrained(model, catalogue, source_run, freeze=frozen, take=take, id_init=id_init)
        log.info(f"starting from {source_run.run}, freezing {frozen}")
        return log_start("from", source_run, Path(out), report, freeze=frozen, take=take)

    return {"recipe": recipe, "prepare": prepare}


def load_pretrained(
    model: MISSRec,
    catalogue: Catalogue,
    source: Source,
    *,
    freeze: Freeze = "encoder_decoder",
    take: Take = "all",
    id_init: IdInit = "random",
) -> dict[str, Any]:
    """Load a source run's weights into a model and freeze parts.

    Returns
    -------
    dict
        The report, as `WeightLoadingReport.finish` returns it.

    Raises
    ------
    CheckpointError
        No modality of a common encoder, weights of other sizes, or a part to freeze that was not loaded.
    """
    report = WeightLoadingReport(model, source.weights, str(source.run))
    matched = _common_modalities(catalogue, source)
    for name in model.item_encoder.names:
        if matched.get(name, name) != name:
            note = f"from {matched[name]!r}, the same encoder under another name"
        elif name in matched:
            note = ""
        else:
            is_stated = catalogue.modalities[name].fingerprint
            note = "no modality of this encoder there" if is_stated else "its encoder is not stated"
        report.copy_adapter(name, matched.get(name), note)
    for name, prefixes in PARTS.items():
        if take == "all":
            report.copy(name, *prefixes)
        else:
            report.record_initialised(name, "only adapters are loaded", *prefixes)
    per_item = model.config.candidate_fusion == "dynamic_instance"
    if take == "all" and not per_item:
        report.copy("fusion", "fusion.")
        report.copy("history bias", "terms.history_bias.bias")
        report.record_initialised("history offset", "fitted after training", "terms.history_bias.offset")
    else:
        why = "one number per item of this catalogue" if per_item else "only adapters are loaded"
        report.record_initialised("fusion", why, "fusion.")
        report.record_initialised("history bias", "re-learned", "terms.history_bias.")
    why = "of this catalogue's items" if id_init == "random" else "initialised from the items' content"
    report.record_initialised("item IDs", why, "item_encoder.id_embedding.", "item_encoder.candidate_id_embedding.")
    if id_init == "content":
        ids_from_content(model)
    report.record_initialised("interests", "discovered in this catalogue", "interests.")
    report.record_initialised("event features", "of this data's events", "event_features.")
    return report.finish(frozen_parts(freeze, matched))


def require_same(
    config: MISSRecConfig, source: MISSRecConfig, run: Path, names: tuple[str, ...] = (*SIZES, *SEMANTICS)
) -> None:
    """Raise an error for settings under which the run's weights do not fit or compute something else.

    Raises
    ------
    CheckpointError
        Lists all differing settings, with the options that make them agree.
    """
    differing = [name for name in names if getattr(config, name) != getattr(source, name)]
    if "n_encoder_layers" in names and config.has_interests != source.has_interests:
        differing.append("interest_ratio")
    if differing:
        here = ", ".join(f"{name} {getattr(config, name)}" for name in differing)
        there = ", ".join(f"{name} {getattr(source, name)}" for name in differing)
        cure = " ".join(f"--set model.{name}={getattr(source, name)}" for name in differing)
        raise CheckpointError(f"the recipe has {here}", f"{there}, as in {run}", f"add {cure}")


def frozen_parts(freeze: Freeze, adapters: Iterable[str]) -> list[str]:
    """Return the parts that are not trained; ``all_loaded`` also freezes the loaded adapters."""
    if freeze == "none":
        return []
    return [*FROZEN, *(f"adapter {name}" for name in adapters if freeze == "all_loaded")]


def log_start(kind: str, source: Source, out: Path, report: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Log the weight-loading report; return it as ``weight_loading`` of `run.json`, with kind and source run."""
    for line in report_lines(report):
        log.info(line)
    where = os.path.relpath(source.run.resolve(), out.resolve())
    return {"weight_loading": {"kind": kind, "run": where, **more, **report}}


def _common_modalities(catalogue: Catalogue, source: Source) -> dict[str, str]:
    """Return modality -> source run's modality of the same encoder; an error if there is none."""
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


def _listed(fingerprints: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} ({fingerprint or 'encoder not stated'})" for name, fingerprint in fingerprints.items())
