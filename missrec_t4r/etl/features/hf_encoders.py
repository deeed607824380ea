"""Pretrained encoders through Hugging Face transformers: CLIP for texts and images, any sentence model for texts.

A model is a folder (``config.json``, weights, tokenizer or preprocessor) or a name in the local Hugging Face cache;
nothing is downloaded. A sentence model is loaded through ``AutoModel``; its token vectors are averaged over the tokens
that are not padding (Reimers and Gurevych, Sentence-BERT, section 3: mean pooling), or the first token is taken if the
folder's ``1_Pooling/config.json`` is set so. Vectors have unit length. No code in the folder is executed: only tensors
are read from a ``pytorch_model.bin``, whatever torch's environment variables are set to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import normalize

from missrec_t4r.arrays import Floats
from missrec_t4r.errors import ConfigError, ModalityError
from missrec_t4r.io.json_files import read_json
from missrec_t4r.io.tensors_only import tensors_only
from missrec_t4r.retrieval.device_search import exact_products

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CLIP = ("clip", "clip_text_model", "clip_vision_model")
_LONGEST = 512


class PretrainedText:
    """Text encoder: CLIP's text encoder or a sentence model.

    Parameters
    ----------
    source : str
        Folder, or a name in the local Hugging Face cache.
    device : str
        ``auto``, ``cpu``, ``cuda`` or another device of torch.
    precision : {"fp32", "bf16", "fp16"}
        Precision of the matrix products; vectors are float32.

    Raises
    ------
    ModalityError
        The model cannot be loaded.
    ConfigError
        The device is not available, or does not support the precision.
    """

    name = "transformers-text"

    def __init__(self, source: str, *, device: str = "auto", precision: str = "fp32") -> None:
        from transformers import AutoModel, AutoTokenizer, CLIPTextModelWithProjection

        self.device, self.precision = _device(device, precision), precision
        config = _config(source, "text_config")
        self.clip = config.model_type in _CLIP
        kind = CLIPTextModelWithProjection if self.clip else AutoModel
        model = _load(kind, source, config=config, trust_remote_code=False)
        self.model = model.to(self.device).eval()
        self.tokenizer = _load(AutoTokenizer, source, trust_remote_code=False)
        self.pooling = "projection" if self.clip else "mean"
        if not self.clip and _setting(source, "1_Pooling/config.json", "pooling_mode_cls_token"):
            self.pooling = "first_token"
        stated = _setting(source, "sentence_bert_config.json", "max_seq_length") or _LONGEST
        positions = getattr(self.model.config, "max_position_embeddings", _LONGEST)
        self.max_length = int(min(stated, self.tokenizer.model_max_length, positions))
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        self.identity = {
            "name": self.name,
            "architecture": config.model_type,
            "weights": weights_hash(self.model),
            "vocabulary": hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest(),
            "lower_case": bool(getattr(self.tokenizer, "do_lower_case", False)),
            "pooling": self.pooling,
            "max_length": self.max_length,
        }

    def encode(self, texts: Sequence[str]) -> Floats:
        """Return one vector per text, [text, width]."""
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode(), _autocast(self.device, self.precision):
            output = self.model(**tokens)
            if self.clip:
                vectors = output.text_embeds
            elif self.pooling == "first_token":
                vectors = output.last_hidden_state[:, 0]  # [text, width]
            else:
                vectors = mean_of_tokens(output.last_hidden_state.float(), tokens["attention_mask"])
        return _unit(vectors)


class PretrainedImage:
    """Image encoder: CLIP's image encoder; parameters and errors as in `PretrainedText`."""

    name = "transformers-image"

    def __init__(self, source: str, *, device: str = "auto", precision: str = "fp32") -> None:
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        self.device, self.precision = _device(device, precision), precision
        config = _config(source, "vision_config")
        if config.model_type not in _CLIP:
            raise ModalityError(
                f"{source} is a {config.model_type} model", "a CLIP model", "name one with --image-encoder"
            )
        self.model = _load(CLIPVisionModelWithProjection, source, config=config).to(self.device).eval()
        self.processor = _load(CLIPImageProcessor, source)
        prepared = {key: value for key, value in self.processor.to_dict().items() if not key.endswith("_type")}
        self.identity = {
            "name": self.name,
            "architecture": config.model_type,
            "weights": weights_hash(self.model),
            "preprocessing": json.loads(json.dumps(prepared, default=str)),
        }

    def encode(self, pictures: Sequence[Image.Image]) -> Floats:
        """Return one vector per RGB image, [image, width]."""
        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode(), _autocast(self.device, self.precision):
            vectors = self.model(pixel_values=pixels).image_embeds
        return _unit(vectors)


def mean_of_tokens(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over the tokens that are not padding.

    Parameters
    ----------
    tokens : Tensor [batch, seq, dim]
    mask : Tensor [batch, seq]
        1 for tokens, 0 for padding.

    Examples
    --------
    >>> mean_of_tokens(torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[3.0]]
    """
    real = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * real).sum(1) / real.sum(1).clamp_min(1)


def weights_hash(model: Module) -> str:
    """Return the SHA-256 of all parameters by name, independent of file format and storage order."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _config(source: str, part: str) -> Any:
    """Return the model's config; for CLIP that of one encoder, with the width of the shared space."""
    from transformers import AutoConfig

    model_config = _load(AutoConfig, source, trust_remote_code=False)
    config = getattr(model_config, part, model_config)
    if config is not model_config:
        config.projection_dim = model_config.projection_dim
    return config


def _load(kind: Any, source: str, **options: Any) -> Any:
    """Load a part of a model from a folder or the local cache.

    Raises
    ------
    ModalityError
        It is missing, cannot be loaded, or could execute code when it is loaded.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # only one encoder of CLIP is loaded: transformers would list the other one's weights
    try:
        with tensors_only(), _no_pickled_tokenizer():
            return kind.from_pretrained(source, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        if _is_refused(error):
            raise ModalityError(
                f"the encoder {source!r} has a file that could run code when it is read",
                "model.safetensors, or a pytorch_model.bin that holds tensors alone",
                "convert the model to safetensors where you trust it",
            ) from error
        raise ModalityError(
            f"the encoder {source!r} cannot be loaded ({' '.join(str(error).split())[:200]})",
            "a folder with config.json, weights, tokenizer or preprocessor, or a name in the local Hugging Face cache",
            "nothing is downloaded here: fetch the model once with huggingface-cli download, then name its folder",
        ) from error
    finally:
        logging.set_verbosity(level)


class _NoPickle:
    """Replacement for the module pickle inside transformers; it refuses to load."""

    @staticmethod
    def load(*_: Any) -> None:
        """Refuse to load."""
        raise _PickleError("pickles are not loaded")


class _PickleError(ValueError):
    pass


@contextmanager
def _no_pickled_tokenizer() -> Iterator[None]:
    """Block the one tokenizer that unpickles."""
    from transformers.models.transfo_xl import tokenization_transfo_xl as unpickling

    module, unpickling.pickle = unpickling.pickle, _NoPickle
    try:
        yield
    finally:
        unpickling.pickle = module


def _is_refused(error: BaseException | None) -> bool:
    """Whether torch or this module refused a pickle; transformers wraps the error in its own."""
    while error is not None:
        if isinstance(error, _PickleError) or type(error).__name__ == "UnpicklingError":
            return True
        error = error.__cause__ or error.__context__
    return False


def _setting(source: str, name: str, key: str) -> Any:
    """Return a setting in a file of sentence-transformers; None if there is none."""
    file = Path(source) / name
    return read_json(file).get(key) if file.is_file() else None


def _device(device: str, precision: str) -> torch.device:
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r}", f"one of {list(PRECISIONS)}", "choose one with --precision")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}", "auto, cpu or cuda", "choose one with --device") from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= n_gpus:
        raise ConfigError(f"device {device!r}, and torch finds {n_gpus} GPUs", "one of them", "leave --device out")
    if chosen.type == "cpu" and precision == "fp16":
        raise ConfigError("precision fp16 on a CPU", "bf16 or fp32", "choose one with --precision")
    return chosen


def _autocast(device: torch.device, precision: str) -> Any:
    kind = PRECISIONS[precision]
    return _in_fp32() if kind is None else torch.autocast(device.type, kind)


@contextmanager
def _in_fp32() -> Iterator[None]:
    """Keep convolutions and products on a GPU from TF32, which torch lets the former use unless it is told."""
    cudnn: Any = torch.backends.cudnn
    is_newer = hasattr(cudnn, "conv")  # torch from 2.9 on
    switches, name, exact = (cudnn.conv, "fp32_precision", "ieee") if is_newer else (cudnn, "allow_tf32", False)
    before = getattr(switches, name)
    setattr(switches, name, exact)
    try:
        with exact_products():
            yield
    finally:
        setattr(switches, name, before)


def _unit(vectors: Tensor) -> Floats:
    return np.asarray(normalize(vectors.float(), dim=-1).cpu().numpy(), np.float32)
