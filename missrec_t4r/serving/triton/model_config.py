"""Read and write Triton's ``config.pbtxt`` with its own protobuf message."""

from __future__ import annotations

import os
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from missrec_t4r.errors import BundleError
from missrec_t4r.io.atomic import atomic_write_file
from missrec_t4r.serving.triton.repository import MODELS, RANKER, ServingSettings, check_settings

CONFIG_FILE = "config.pbtxt"
_REFERENCE = "# Written by missrec; triton_models/README.md explains every field.\n"


def read_config(model_folder: Path) -> ModelConfig:
    """Return the configuration of one model of a repository.

    Raises
    ------
    BundleError
        ``config.pbtxt`` is missing or is no model configuration.
    """
    file = model_folder / CONFIG_FILE
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), ModelConfig())
    except (OSError, ValueError, text_format.ParseError) as error:
        raise BundleError(
            f"{file} cannot be read ({error})",
            "Triton's model configuration in protobuf's text format",
            "deploy the bundle again, or write the repository again with `missrec export --triton`",
        ) from error


def settings_of(ranker: Path) -> ServingSettings:
    """Return the settings with which a ranker's folder was written.

    Raises
    ------
    BundleError
        ``config.pbtxt`` is missing, or is not that of a ranker.
    """
    config = read_config(ranker)
    try:
        return ServingSettings(
            config.max_batch_size,
            int(config.parameters["threads"].string_value),
            config.instance_group[0].count or 1,  # Triton reads no count as 1
            next(iter(config.dynamic_batching.preferred_batch_size), 0),
            config.dynamic_batching.max_queue_delay_microseconds,
            ModelInstanceGroup.Kind.Name(config.instance_group[0].kind),
        )
    except (ValueError, IndexError) as error:
        raise BundleError(
            f"{ranker / CONFIG_FILE} is not that of a ranker ({error})",
            "threads, and one instance_group, as this package writes them",
            "undo what was edited, or write the repository again",
        ) from error


def configure(repository: Path, settings: ServingSettings) -> None:
    """Change the settings of a model repository in place; whatever else its configurations say stays."""
    check_settings(settings)
    configs = {model: read_config(repository / model) for model in MODELS}
    for model, config in reversed(configs.items()):  # the ensemble last: its batches may not exceed those of its parts
        config.max_batch_size = settings.max_batch_size
        if model == RANKER:
            config.parameters["threads"].string_value = str(settings.threads)
            config.instance_group[0].count = settings.instances
            config.instance_group[0].kind = ModelInstanceGroup.Kind.Value(settings.kind)
            batching = config.dynamic_batching
            batching.max_queue_delay_microseconds = settings.queue_delay_us
            del batching.preferred_batch_size[:]
            if settings.preferred_batch_size:
                batching.preferred_batch_size.append(settings.preferred_batch_size)
        write_config(repository / model, config)


def write_config(model_folder: Path, config: ModelConfig) -> None:
    """Write ``config.pbtxt`` of one model: atomically, and through to the disk, as it decides what is served."""
    with atomic_write_file(model_folder / CONFIG_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(_REFERENCE + text_format.MessageToString(config))
        file.flush()
        os.fsync(file.fileno())
