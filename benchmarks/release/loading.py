"""Import the authors' release from a checkout and build its model over our catalogue; none of its code is here.

Source: the public repository ``gimpong/MM23-MISSRec``. Its model reads a few values of its configuration and data
set, which plain objects provide; its data loaders, CUDA k-means and logging are not used.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import MISSRecError
from missrec_t4r.model.clustering import kmeans
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW

_UNUSED = ("colorlog", "colorama", "wandb", "tensorboard", "torch.utils.tensorboard", "cupy", "torchpq.clustering")
"""What the release imports and what nothing here calls: logging to terminals and services, CUDA."""


class ReleaseError(MISSRecError):
    """The checkout is not the authors' release, or cannot be imported."""


def require_release(path: Path, name: str = "missrec") -> None:
    """Raise a `ReleaseError` unless the checkout has the module."""
    if not (path / f"{name}.py").is_file():
        raise ReleaseError(f"{path} holds no {name}.py", "a checkout of gimpong/MM23-MISSRec", "see --release")


def release_module(path: Path, name: str = "missrec") -> ModuleType:
    """Import a module of the release, with empty stand-ins for the packages that are not installed.

    Raises
    ------
    ReleaseError
        No such file in the checkout, or its import fails.
    """
    require_release(path, name)
    for package in _UNUSED:
        try:
            importlib.import_module(package)
        except ImportError:
            sys.modules[package] = MagicMock(name=package)
    sys.path.insert(0, str(path.resolve()))
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise ReleaseError(
            f"the release at {path} cannot be imported ({error})",
            "a checkout whose imports are installed",
            "see --release",
        ) from error
    finally:
        sys.path.remove(str(path.resolve()))


def release_model(path: Path, catalogue: Catalogue, config: MISSRecConfig, length: int = 0) -> Any:
    """Build the release's model over the catalogue's items, in their order; its row 0 is padding, items start at 1.

    Parameters
    ----------
    path : Path
        Checkout of the release.
    catalogue : Catalogue
        Its modalities, named ``text`` and ``image``, are the release's.
    config : MISSRecConfig
        Sizes and fusions; what the release has no choice about is ignored.
    length : int
        Longest session; ``config.max_sequence_length`` by default.
    """
    names = {"text": "text", "image": "img"}
    vectors = {names[name]: modality.vectors for name, modality in catalogue.modalities.items()}
    embeddings = {name: _frozen(torch.from_numpy(table)) for name, table in vectors.items()}
    n_items = catalogue.n_items + 1
    settings: dict[str, Any] = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": length or config.max_sequence_length,
        "device": torch.device("cpu"),
        "train_stage": "transductive_ft" if config.item_ids else "inductive_ft",
        "n_layers": config.n_encoder_layers + config.n_decoder_layers,
        "n_heads": config.n_head,
        "hidden_size": config.d_model,
        "inner_size": config.d_feedforward,
        "hidden_dropout_prob": config.dropout,
        "attn_dropout_prob": config.dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": config.layer_norm_eps,
        "initializer_range": 0.02,
        "loss_type": "CE",
        "lambda": 1e-3,
        "gamma": config.orthogonality_weight,
        "id_type": "id",
        "modal_type": "_".join(sorted(vectors)),
        "plm_size": vectors["text"].shape[1] if "text" in vectors else 0,
        "img_size": vectors["img"].shape[1] if "img" in vectors else 0,
        "temperature": config.temperature,
        "seq_mm_fusion": config.sequence_fusion,
        "item_mm_fusion": config.candidate_fusion,
        "interest_ratio": config.interest_ratio,
        "knn_local_ratio": 0.1,
    }
    dataset = SimpleNamespace(
        num=lambda field: n_items, plm_embedding=embeddings.get("text"), img_embedding=embeddings.get("img")
    )
    return release_module(path).MISSRec(settings, dataset)


def release_rows(rows: Tensor) -> Tensor:
    """Return the release's item numbers of our catalogue rows: items from 1 on, 0 is padding in both.

    Examples
    --------
    >>> release_rows(torch.tensor([3, 4, 0])).tolist()
    [1, 2, 0]
    """
    return (rows - (FIRST_ITEM_ROW - 1)).clamp_min(0)


def copy_interests(ours: MISSRec, theirs: Any) -> None:
    """Copy our interests into the release's model, so that both use the same ones."""
    tables = {"text": "plm_interest_lookup_table", "image": "img_interest_lookup_table"}
    theirs.interest_embeddings.copy_(ours.interests.centroids)
    for index, name in enumerate(ours.item_encoder.names):
        getattr(theirs, tables[name])[1:] = ours.interests.assignment[index, FIRST_ITEM_ROW:]


@torch.no_grad()
def take_interests(theirs: Any, ours: MISSRec) -> None:
    """Copy the release's interests into our model."""
    tables = {"text": "plm_interest_lookup_table", "image": "img_interest_lookup_table"}
    ours.interests.centroids = theirs.interest_embeddings.clone()
    for index, name in enumerate(ours.item_encoder.names):
        ours.interests.assignment[index, FIRST_ITEM_ROW:] = getattr(theirs, tables[name])[1:]


@torch.no_grad()
def discover_release_interests(model: Any, seed: int) -> None:
    """The release's interest discovery over text and image, its CUDA k-means replaced by five passes of ours.

    Parameters
    ----------
    model : Any
        The release's.
    seed : int
        Draws the tokens that are the first centroids, as the release does anew in every epoch.
    """
    model.eval()
    parts = [model.text_adaptor(model.plm_embedding.weight[1:]), model.img_adaptor(model.img_embedding.weight[1:])]
    tokens, clusters = torch.cat(parts), len(model.interest_embeddings) - 1
    drawn = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:clusters]
    centroids, labels = kmeans(tokens, clusters, seed=seed, start=tokens[drawn])
    model.interest_embeddings[1:] = centroids
    half = len(tokens) // 2
    model.plm_interest_lookup_table[1:], model.img_interest_lookup_table[1:] = labels[:half] + 1, labels[half:] + 1


def weight_pairs(ours: MISSRec, theirs: Any) -> dict[str, tuple[nn.Parameter, nn.Parameter, slice | list[int]]]:
    """Return every trained tensor of ours with the release's corresponding tensor and its rows.

    Returns
    -------
    dict
        Name of ours -> (ours, the release's, rows of the release's tensor). Our catalogue rows 1 and 2 have no
        counterpart: `shared_part` leaves them out.
    """
    width = ours.config.d_model
    found: dict[str, tuple[nn.Parameter, nn.Parameter, slice | list[int]]] = {}

    def pair(name: str, part: nn.Module, other: nn.Module) -> None:
        for kind, weight in part.named_parameters(recurse=False):
            found[f"{name}.{kind}"] = (weight, other.get_parameter(kind), slice(None))

    def attention(name: str, part: nn.Module, other: nn.Module) -> None:
        for index, projection in enumerate(("query", "key", "value")):
            rows = slice(index * width, (index + 1) * width)
            for kind in ("weight", "bias"):
                weight = part.get_parameter(f"{projection}.{kind}")
                found[f"{name}.{projection}.{kind}"] = (weight, other.get_parameter(f"in_proj_{kind}"), rows)
        pair(f"{name}.output", part.get_submodule("output"), other.get_submodule("out_proj"))

    adapters = {"text": "text_adaptor", "image": "img_adaptor"}
    for name in ours.item_encoder.names:
        pair(f"item_encoder.adapters.{name}", ours.item_encoder.adapters[name], getattr(theirs, adapters[name]))
    if ours.item_encoder.id_embedding is not None:
        pair("item_encoder.id_embedding", ours.item_encoder.id_embedding, theirs.item_embedding)
    if ours.fusion.phi is not None and len(ours.item_encoder.names) > 1:
        found["fusion.phi"] = (ours.fusion.phi, theirs.fusion_factor, slice(None))
    pair("decoder.positions", ours.decoder.positions, theirs.position_embedding)
    pair("decoder.norm_input", ours.decoder.norm_input, theirs.LayerNorm)
    for stack, other, norms in (
        ("encoder", theirs.trm_model.encoder, ("norm_attention", "norm_feedforward")),
        ("decoder", theirs.trm_model.decoder, ("norm_self", "norm_cross", "norm_feedforward")),
    ):
        pair(f"{stack}.norm", ours.get_submodule(f"{stack}.norm"), other.norm)
        for index, block in enumerate(other.layers):
            name = f"{stack}.layers.{index}"
            layer = ours.get_submodule(name)
            attention(f"{name}.self_attention", layer.get_submodule("self_attention"), block.self_attn)
            if stack == "decoder":
                attention(f"{name}.cross_attention", layer.get_submodule("cross_attention"), block.multihead_attn)
            pair(f"{name}.feedforward.0", layer.get_submodule("feedforward.0"), block.linear1)
            pair(f"{name}.feedforward.3", layer.get_submodule("feedforward.3"), block.linear2)
            for number, norm in enumerate(norms, 1):
                pair(f"{name}.{norm}", layer.get_submodule(norm), block.get_submodule(f"norm{number}"))
    return found


def shared_part(name: str, ours: Tensor) -> Tensor:
    """Return the rows of ours that the release has: without the null and unknown rows of tables over the catalogue."""
    over_catalogue = name == "item_encoder.id_embedding.weight" or (name == "fusion.phi" and len(ours) > 1)
    return torch.cat([ours[: PADDING_ROW + 1], ours[FIRST_ITEM_ROW:]]) if over_catalogue else ours


@torch.no_grad()
def copy_weights(theirs: Any, ours: MISSRec) -> None:
    """Copy the release's weights into ours."""
    for weight, other, rows in weight_pairs(ours, theirs).values():
        source = other[rows] if other.ndim else other
        if weight.shape[:1] == source.shape[:1] or not source.ndim:
            weight.copy_(source)
        else:
            weight[PADDING_ROW] = source[0]
            weight[FIRST_ITEM_ROW:] = source[1:]


def _frozen(table: Tensor) -> nn.Embedding:
    """Return a feature table as the release has it: a frozen embedding with padding in row 0."""
    rows = torch.cat([torch.zeros_like(table[:1]), table[FIRST_ITEM_ROW:]])
    embedding = nn.Embedding(len(rows), rows.shape[1], padding_idx=0)
    embedding.weight.data.copy_(rows)
    embedding.weight.requires_grad_(False)
    return embedding
