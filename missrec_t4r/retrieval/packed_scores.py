"""Packed items: the catalogue's embeddings laid out for one product per request, with exact scores of any few items.

    (s . e + 2 sum_m w_m s . x_m) / 3  =  sum_m w_m s . y_m,     y_m = (e + 2 x_m) / 3,  w = softmax of 1.5 phi s . y_m

With a trained ID embedding e the score (E11) equals the fused score of the vectors y under 1.5 phi: a softmax does not
change when the same number (here s . e) is added to all of its inputs. So every item is a handful of vectors, called
tokens here, and one number phi, computed once per catalogue version.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from missrec_t4r.io.tensor_file import StoredRows
from missrec_t4r.model.fast.fusion import mean_embeddings
from missrec_t4r.model.fusion import CandidateFusion
from missrec_t4r.model.item_encoder import CandidateEmbeddings

SCAN_ERROR = 2e-6
"""By how much `PackedItems.scan` may differ from `PackedItems.exact`."""

_SCANNED_AT_ONCE = 1024
"""Tokens of one product with several sessions: its result stays in the cache."""
_FEW = 4096
"""Tokens that are read one by one from a file; more are read through the mapping."""


@dataclass(frozen=True)
class PackedItems:
    """Tokens of a catalogue version; see `pack_items`."""

    tokens: Tensor
    """[token, dim]: the first token of every row, in the order of the rows, then the further ones."""
    place: Tensor
    """[modality, row], int64: index of a row's tokens in ``tokens``, -1 from its last one on."""
    modality: Tensor
    """[modality, row], int64: which modality a token is of; -1 for a row that has only an ID."""
    several: Tensor
    """[item], int64: rows with two tokens or more, ascending; their second tokens follow the first ones in order."""
    phi: Tensor
    """[row]: sharpness of the softmax over a row's votes."""
    stored: StoredRows | None = None
    """Reads ``tokens`` row by row where they are mapped from a file."""

    @property
    def n_rows(self) -> int:
        """Rows of the catalogue."""
        return int(self.place.shape[1])

    def scan(self, session: Tensor) -> Tensor:
        """Return the scores of all rows.

        Parameters
        ----------
        session : Tensor [batch, dim], float32
            Unit-length session vectors.

        Returns
        -------
        Tensor [batch, row], float32
            Up to rounding those of `CandidateFusion`; meaningless for rows that cannot be recommended.
        """
        parts = self.tokens.split(_SCANNED_AT_ONCE if len(session) > 1 else len(self.tokens))
        votes = torch.cat([session @ part.T for part in parts], 1)  # [batch, token]
        scores = votes[:, : self.n_rows]  # [batch, row]: the first token of every row
        if not len(self.several):
            return scores
        second = votes[:, self.n_rows : self.n_rows + len(self.several)]
        if len(self.place) == 2:
            fused = fuse_two(scores.index_select(1, self.several), second, self.phi[self.several])
        else:
            places = self.place[:, self.several]
            fused = fuse(votes[:, places.clamp_min(0)], places >= 0, self.phi[self.several])
        return scores.scatter_(1, self.several.expand_as(fused), fused)  # by columns, `index_copy_` is slower

    def exact(self, session: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of some rows; that of a row does not depend on the other rows of the call.

        Parameters
        ----------
        session : Tensor [batch, dim], float32
        rows : Tensor [batch, item], int64

        Returns
        -------
        Tensor [batch, item], float64
            Summed in 64 bits: equal tokens have equal scores after rounding to 32 bits, wherever they stand.
        """
        votes, present = self._votes(session.double(), rows, torch.float64)
        return votes[0] if len(votes) == 1 else fuse(votes, present, self.phi[rows].double())

    def quick(self, session: Tensor, rows: Tensor) -> Tensor:
        """Return the scores of `exact` in single precision, [batch, item]."""
        votes, present = self._votes(session.float(), rows, torch.float32)
        return votes[0] if len(votes) == 1 else fuse(votes, present, self.phi[rows])

    def leading(self, session: Tensor, rows: Tensor) -> Tensor:
        """Return the modality with the largest weight in the scores of ``rows``, [batch, item]; -1 for an ID alone."""
        votes, present = self._votes(session.double(), rows, torch.float64)
        logits = (self.phi[rows] * votes).masked_fill(~present, -torch.inf)
        return self.modality[:, rows].gather(0, logits.argmax(0, keepdim=True))[0]

    def to(self, device: torch.device) -> PackedItems:
        """Return the packed items on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("place", "modality", "several", "phi")}
        tokens = self.tokens.to(device)
        return replace(self, tokens=tokens, stored=self.stored if tokens is self.tokens else None, **moved)

    def _votes(self, session: Tensor, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        places = self.place.index_select(1, rows.flatten()).unflatten(1, rows.shape)
        few = self.stored is not None and places.numel() <= _FEW
        at = places.clamp_min(0)
        tokens = self.stored.take(at) if few and self.stored is not None else F.embedding(at, self.tokens)
        return tokens.to(dtype).mul_(session[:, None]).sum(-1), places >= 0  # a copy of the rows, no view


def fuse(votes: Tensor, present: Tensor, phi: Tensor) -> Tensor:
    """Return ``sum_m softmax(phi v)_m v_m`` over the present of the tokens; 0 where there is none.

    Parameters
    ----------
    votes : Tensor, [modality, batch, item] or [batch, modality, item]
    present : Tensor, bool, [modality, batch, item] or [modality, item]
    phi : Tensor, broadcastable to [batch, item]
    """
    axis = 0 if present.dim() == votes.dim() else 1
    logits = (phi * votes).masked_fill(~present, -torch.inf)
    weights = torch.softmax(logits, axis).masked_fill(~present, 0.0)
    return (weights * votes).sum(axis)


def fuse_two(first: Tensor, second: Tensor, phi: Tensor) -> Tensor:
    """Return `fuse` of two tokens: the softmax of two votes is a sigmoid of their difference."""
    apart = second - first
    return torch.addcmul(first, apart, torch.sigmoid(phi * apart))


def pack_items(fusion: CandidateFusion, candidates: CandidateEmbeddings, rows: Tensor | None = None) -> PackedItems:
    """Pack a catalogue's unit-length embeddings.

    Parameters
    ----------
    fusion : CandidateFusion
        Its phi; a static fusion needs one token per row, the mean.
    candidates : CandidateEmbeddings
        Of `MISSRec.candidates`, in evaluation mode.
    rows : Tensor [row], int64, optional
        The rows of the candidates, where they are not the whole catalogue.
    """
    phi = (torch.zeros(()) if fusion.phi is None else fusion.phi.detach()).float().reshape(-1)
    phi = phi[rows] if rows is not None and len(phi) > 1 else phi
    phi = phi.expand(candidates.mask.shape[1]).clone()
    has_id = candidates.id_mask if candidates.id_mask is not None else torch.zeros_like(candidates.mask[0])
    if fusion.phi is None:
        return _packed(mean_embeddings(candidates)[None], (candidates.mask.any(0) | has_id)[None], phi)
    tokens, mask = candidates.modality, candidates.mask
    if candidates.ids is not None:
        with_ids = (candidates.ids + 2 * tokens) / 3
        tokens = torch.where((has_id & mask).unsqueeze(-1), with_ids, tokens)
        alone = has_id & ~mask.any(0)
        tokens[0] = torch.where(alone.unsqueeze(-1), candidates.ids, tokens[0])
        table = _packed(tokens, torch.cat([mask[:1] | alone, mask[1:]]), phi * torch.where(has_id, 1.5, 1.0))
        return replace(table, modality=table.modality.masked_fill(alone, -1))
    return _packed(tokens, mask, phi)


def _packed(tokens: Tensor, mask: Tensor, phi: Tensor) -> PackedItems:
    n_rows = mask.shape[1]
    modality = torch.sort((~mask).int(), dim=0, stable=True).indices  # present ones first, in their order
    depth = mask.sum(0)
    place = torch.full_like(modality, -1)
    place[0] = torch.arange(n_rows, device=mask.device)
    packed, taken = [tokens[modality[0], place[0]] * mask.any(0).unsqueeze(-1)], n_rows  # [row, dim]
    for level in range(1, len(mask)):
        rows = torch.nonzero(depth > level).flatten()
        packed.append(tokens[modality[level, rows], rows])
        place[level, rows] = torch.arange(taken, taken + len(rows), device=mask.device)
        taken += len(rows)
    levels = max(int(depth.max()) if n_rows else 1, 1)
    return PackedItems(
        torch.cat(packed).contiguous(),
        place[:levels],
        modality[:levels],
        torch.nonzero(depth > 1).flatten(),
        phi,
    )
