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
from safetensors.torch import load_file
from torch import Tensor

from missrec_t4r.errors import BundleError
from missrec_t4r.io.tensor_file import ALIGNED, StoredRows, TensorFile, advise_random_access, release_pages
from missrec_t4r.model.item_encoder import ItemEmbeddings
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.progress import track
from missrec_t4r.retrieval.int8_bounds import CHUNK, ROOM, SAMPLE, Int8Bounds, compress, principal, rest_of_rows
from missrec_t4r.retrieval.packed_scores import PackedItems, pack_items

_TABLE = ("tokens", "place", "modality", "several", "phi")
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

    def check(self, n_rows: int, dim: int) -> None:
        """Raise `BundleError` if the tables are not of a catalogue of ``n_rows`` and a model of width ``dim``."""
        table, quantised = self
        n_tokens = len(table.tokens)
        shapes = [
            (table.tokens, (n_tokens, dim)),
            (table.place, (len(table.place), n_rows)),
            (table.modality, tuple(table.place.shape)),
            (table.phi, (n_rows,)),
            (quantised.codes, (n_tokens, quantised.codes.shape[-1])),
            (quantised.scale, (n_tokens,)),
            (quantised.rest, (n_rows,)),
            (quantised.mean, (dim,)),
            (quantised.directions, (dim, quantised.codes.shape[-1])),
            (quantised.error, ()),
            (quantised.length, ()),
        ]
        fits = all(tuple(tensor.shape) == shape for tensor, shape in shapes)
        fits = fits and not _outside(table.place, n_tokens) and not _outside(table.several, n_rows)
        if not fits:
            found = f"search tables of {n_tokens} tokens of width {table.tokens.shape[-1]}"
            raise BundleError(found, f"those of {n_rows} rows of width {dim}", "export the bundle again")


Part = Callable[[Tensor], PackedItems]
"""Rows [row], ascending -> their packed items, as if they were a catalogue of their own."""


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
    read = [
        *item_encoder.vectors.buffers(),
        *(() if item_encoder.id_embedding is None else [item_encoder.id_embedding.weight]),
    ]

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
    with TensorFile(file, {name: (one.dtype, tuple(one.shape)) for name, one in known.items()} | computed) as out:
        for name, tensor in known.items():
            out.write(name, tensor)
        total = -(-n_rows // CHUNK) * len(frame.place)
        for first, tokens in track(_in_order(frame, part), f"search tables of {n_rows} rows", total):
            own = compress(tokens, mean, directions)
            out.write("table.tokens", tokens, first)
            out.write("quantised.codes", own.codes, first)
            out.write("quantised.scale", own.scale, first)
            rest[first : first + len(tokens)] = own.rest
            error, length = torch.maximum(error, own.error), torch.maximum(length, own.length)
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


def _outside(places: Tensor, end: int) -> bool:
    return bool(len(places)) and places.numel() > 0 and not (int(places.min()) >= -1 and int(places.max()) < end)
