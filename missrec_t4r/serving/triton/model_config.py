"""Read and write Triton's ``config.pbtxt`` with its own protobuf message."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from missrec_t4r.errors import BundleError

CONFIG_FILE = "config.pbtxt"
_REFERENCE = "# Written by `missrec deploy`; triton_models/README.md explains every field.\n"


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


def config_text(config: ModelConfig) -> str:
    """Return a configuration in protobuf's text format."""
    return _REFERENCE + str(text_format.MessageToString(config))


def write_config(model_folder: Path, config: ModelConfig) -> None:
    """Write ``config.pbtxt`` of one model."""
    (model_folder / CONFIG_FILE).write_text(config_text(config), encoding="utf-8")
