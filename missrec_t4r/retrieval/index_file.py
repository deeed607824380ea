"""Retrieval index of a large catalogue (packed items and int8 bounds): built once in bounded memory, mapped by servers.

It is written with the bundle, not at every start: instances share the pages, and a server of a million items starts in
the time that its checksums take. A token depends on its row and the weights alone, so that the index of a catalogue
update has the same numbers for all unchanged rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from missrec_t4r.io.tensor_checks import NOT_NEGATIVE, check_ranges, compare, header_of, refused
from missrec_t4r.io.tensor_file import ALIGNED, StoredRows, TensorFile, advise_random_access, release_pages
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.retrieval.int8_bounds import CHUNK, ROOM, SAMPLE, Int8Bounds, compress, principal, rest_of_rows
from missrec_t4r.retrieval.packed_scores import PackedItems, pack_items

_TABLE = ("tokens", "place", "modality", "several", "phi")
_COMPARED = 64
"""Rows whose tokens are computed again when an index is read."""
_ROUNDING = 1e-3
"""Largest difference of a number of a token between processors, with room."""
_QUANTISED = ("codes", "scale", "rest", "error", "length", "mean", "directions")


class RetrievalIndex(NamedTuple):
    """What both passes of an exact search read."""

    table: PackedItems
    quantised: Int8Bounds

    @staticmethod
    def load(file: Path) -> RetrievalIndex:
        """Map a file of `write_index`; only pages that are read take memory, and processes share them."""
        stored = {name: _aligned(tensor) for name, tensor in load_file(file).items()}
        rows = StoredRows(file, "table.tokens")
        table = PackedItems(**{name: stored[f"table.{name}"] for name in _TABLE}, stored=rows)
        advise_random_access([table.tokens])
        return RetrievalIndex(table, Int8Bounds(**{name: stored[f"quantised.{name}"] for name in _QUANTISED}))


Part = Callable[[Tensor], PackedItems]
"""Rows [row], ascending -> their packed items, as if they were a catalogue of their own."""


def check_index(file: Path, n_rows: int, dim: int, n_modalities: int) -> None:
    """Check a file of `write_index` before it is mapped: shapes, numbers, and which token belongs to which row.

    Raises
    ------
    BundleError
        It is not the index of a catalogue of ``n_rows`` in ``n_modalities`` and of a model of width ``dim``.
    """
    header = header_of(file)
    n_tokens, n_levels, n_several, n_directions = (
        header[name].shape[axis] if name in header and len(header[name].shape) > axis else 0
        for name, axis in (("table.tokens", 0), ("table.place", 0), ("table.several", 0), ("quantised.codes", 1))
    )
    compare(
        file,
        header,
        {
            "table.tokens": ("F32", (n_tokens, dim)),
            "table.place": ("I64", (n_levels, n_rows)),
            "table.modality": ("I64", (n_levels, n_rows)),
            "table.several": ("I64", (n_several,)),
            "table.phi": ("F32", (n_rows,)),
            "quantised.codes": ("I8", (n_tokens, n_directions)),
            "quantised.scale": ("BF16", (n_tokens,)),
            "quantised.rest": ("F32", (n_rows,)),
            "quantised.error": ("F32", ()),
            "quantised.length": ("F32", ()),
            "quantised.mean": ("F32", (dim,)),
            "quantised.directions": ("F32", (dim, n_directions)),
        },
    )
    if not 1 <= n_levels <= n_modalities:
        raise refused(file, f"holds {n_levels} tokens per row", f"1 to {n_modalities}, the number of modalities")
    limits = {"table.place": (-1.0, n_tokens - 1.0), "table.modality": (-1.0, n_modalities - 1.0)}
    limits |= {"table.several": (0.0, n_rows - 1.0)}
    lengths = ("quantised.scale", "quantised.rest", "quantised.error", "quantised.length")
    check_ranges(file, header, limits | dict.fromkeys(lengths, NOT_NEGATIVE))
    _check_places(file, n_tokens)


def _check_places(file: Path, n_tokens: int) -> None:
    """Refuse tables that name the tokens of other rows: a row's tokens stand where `pack_items` puts them."""
    with safe_open(file, "pt") as stored:
        place, several = stored.get_tensor("table.place"), stored.get_tensor("table.several")
    taken = place.shape[1]
    right = torch.equal(place[0], torch.arange(taken))
    owners = torch.nonzero(place[1] >= 0).flatten() if len(place) > 1 else several[:0]
    right = right and torch.equal(owners, several)
    for level in place[1:]:
        own = level[level >= 0]
        right = right and torch.equal(own, torch.arange(taken, taken + len(own)))
        taken += len(own)
    if not right or taken != n_tokens:
        raise refused(file, "names the tokens of other rows in table.place", "tokens in the order of their rows")


@torch.inference_mode()
def check_belongs(index: RetrievalIndex, model: MISSRec, file: Path) -> None:
    """Compute some items' tokens and compare them with those of an index, and with its bounds.

    Raises
    ------
    BundleError
        The index is that of another model or catalogue of the same size: its answers would be other items.
    """
    table, quantised = index
    rows = torch.linspace(0, table.n_rows - 1, min(_COMPARED, table.n_rows)).long().unique()
    item_encoder = model.item_encoder
    own = pack_items(model.fusion, item_encoder.candidates(item_encoder(rows), rows), rows)
    right = torch.allclose(own.phi, table.phi[rows], atol=_ROUNDING)
    for level, at in enumerate(own.place):
        has = at >= 0
        places = table.place[min(level, len(table.place) - 1), rows[has]]
        tokens = table.tokens[places]
        codes = quantised.codes[places].float() * quantised.scale[places].float()[:, None]
        off = (tokens - quantised.mean - codes @ quantised.directions.T).norm(dim=1)
        right = right and bool((places >= 0).all()) and torch.allclose(own.tokens[at[has]], tokens, atol=_ROUNDING)
        right = right and bool((off <= quantised.rest[rows[has]] + quantised.error + _ROUNDING).all())
    if not right:
        raise refused(file, "holds the tokens of another model or catalogue", "those of the weights beside it")


def write_index(model: MISSRec, file: Path) -> None:
    """Compute a model's retrieval index, some rows at a time, and write it to a file.

    Parameters
    ----------
    model : MISSRec
        In evaluation mode, on the CPU.
    file : Path
        Replaced.
    """
    fusion, item_encoder = model.fusion, model.item_encoder
    mask, attended, id_mask = item_encoder.masks(dropout=False)
    ids = None if id_mask is None else torch.zeros(len(id_mask), 0)
    read = [*item_encoder.vectors.buffers(), *item_encoder.id_tables]

    def part(rows: Tensor) -> PackedItems:
        table = pack_items(fusion, item_encoder.candidates(item_encoder(rows), rows), rows)
        release_pages(read)  # else all mapped vectors would end up in this process's memory
        return table

    with torch.inference_mode():
        hollow = ItemEmbeddings(torch.zeros(*mask.shape, 0), mask, attended, ids, id_mask)
        frame = pack_items(fusion, item_encoder.candidates(hollow))
    write_tables(file, frame, part)


@torch.inference_mode()
def write_tables(file: Path, frame: PackedItems, part: Part) -> None:
    """Write the index of a catalogue that is given in parts.

    Parameters
    ----------
    file : Path
        Replaced.
    frame : PackedItems
        The whole catalogue's, with tokens of width 0: everything but the tokens.
    part : callable
        Returns the packed items of some rows.
    """
    n_rows, n_tokens = frame.n_rows, len(frame.tokens)
    sample = part(torch.arange(0, n_rows, max(n_rows // SAMPLE, 1))).tokens
    mean, directions = principal(sample)
    known = {f"table.{name}": getattr(frame, name) for name in _TABLE if name != "tokens"}
    known |= {"quantised.mean": mean, "quantised.directions": directions}
    computed = {
        "table.tokens": (torch.float32, (n_tokens, len(mean))),
        "quantised.codes": (torch.int8, (n_tokens, directions.shape[1])),
        "quantised.scale": (torch.bfloat16, (n_tokens,)),
        "quantised.rest": (torch.float32, (n_rows,)),
        "quantised.error": (torch.float32, ()),
        "quantised.length": (torch.float32, ()),
    }
    rest, error, length = torch.empty(n_tokens), torch.zeros(()), torch.zeros(())
    kinds = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in known.items()}
    with TensorFile(file, kinds | computed) as out:
        for name, tensor in known.items():
            out.write(name, tensor)
        total = -(-n_rows // CHUNK) * len(frame.place)
        for first, tokens in track(_in_order(frame, part), f"retrieval index of {n_rows} rows", total):
            codes, scale, own_rest, own_error, own_length = compress(tokens, mean, directions)
            out.write("table.tokens", tokens, first)
            out.write("quantised.codes", codes, first)
            out.write("quantised.scale", scale, first)
            rest[first : first + len(tokens)] = own_rest
            error, length = torch.maximum(error, own_error), torch.maximum(length, own_length)
        out.write("quantised.rest", rest_of_rows(rest, frame.place))
        out.write("quantised.error", error + ROOM)
        out.write("quantised.length", length + ROOM)


def _in_order(frame: PackedItems, part: Part) -> Iterator[tuple[int, Tensor]]:
    """Yield tokens and their index in the whole table; each once or twice, the second time bit for bit the same."""
    last = max(frame.n_rows - CHUNK, 0)
    for start in [*range(0, last, CHUNK), last]:  # whole chunks, the last one overlapping: products of one shape
        rows = torch.arange(start, min(start + CHUNK, frame.n_rows))
        own = part(rows)
        for level, at in enumerate(own.place):
            has = torch.nonzero(at >= 0).flatten()
            if len(has):
                yield int(frame.place[level, rows[has[0]]]), own.tokens[at[has]]


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor where vector instructions may read it: in place if the file was written by `TensorFile`."""
    return tensor.clone() if tensor.data_ptr() % ALIGNED else tensor
