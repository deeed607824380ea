"""Sampled softmax: the candidates of a step are its targets and some random items, not the catalogue (ours).

For millions of items, where even one pass over the catalogue per step is too slow. Embeddings and scores are computed
for the sampled items and the batch's own alone. With the inclusion probability ``pi[j]`` of an item,

    loss(p) = log( exp(l[p,t]) + sum over sampled j, not a target of p, of exp(l[p,j]) / pi[j] ) - l[p,t]

so that the sum under the logarithm has the full softmax's denominator as its expectation (Horvitz and Thompson, 1952;
as a correction of logits: Bengio and Senecal, 2008). ``pi`` is the probability of either: to be the target of another
position, drawn by its share of the training targets, or to be one of the uniform draws.
"""

from __future__ import annotations

import torch
from torch import Tensor

from missrec_t4r.model.fast.cross_entropy import next_item_loss
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.terms.history import first_occurrences
from missrec_t4r.training.loss.full import StepEmbeddings, TrainedPositions, candidate_rows, row_embeddings, score_rows


class SampledSoftmax:
    """The batch's targets and ``negatives`` uniform draws as candidates, corrected for how they were drawn.

    A target is an accidental hit among the candidates of its own position: there it counts once, uncorrected. With as
    many negatives as the catalogue has items this is the full softmax.

    Parameters
    ----------
    frequency : Tensor [row]
        How often a row is a target in training; any scale.
    negatives : int
        Uniform draws per step, without replacement.
    """

    def __init__(self, frequency: Tensor, negatives: int) -> None:
        self.share = (frequency.double() / frequency.sum().clamp_min(1)).clamp_max(1 - 1e-9)
        self.negatives = negatives

    def embed(self, model: MISSRec, item_ids: Tensor, targets: Tensor) -> StepEmbeddings:
        """Draw the candidates and compute their embeddings and those of the sessions' items."""
        masks = model.item_encoder.masks(dropout=model.training)
        classes = torch.nonzero(candidate_rows(model)).flatten()
        drawn = classes[torch.randperm(len(classes), device=classes.device)[: self.negatives]]
        wanted = torch.cat([drawn.new_zeros(1), targets.flatten(), drawn])  # the padding row comes first: no target
        rows, place = torch.unique(torch.cat([item_ids.flatten(), wanted]), return_inverse=True)
        pool = row_embeddings(model, rows, masks)
        own, candidates = place.split([item_ids.numel(), len(wanted)])
        return StepEmbeddings(pool.take(own.view_as(item_ids)), pool, rows, masks, candidates.unique())

    def loss(self, model: MISSRec, embeddings: StepEmbeddings, positions: TrainedPositions) -> Tensor:
        """Return the estimate of the loss over all candidates."""
        assert embeddings.candidates is not None
        vectors, history, targets, weights, counts = positions
        rows = embeddings.rows[embeddings.candidates]
        pool = embeddings.pool.take(embeddings.candidates, candidates=True)
        logits = score_rows(model, vectors, pool, rows, history).div_(model.config.temperature)
        real = targets > 0
        correction = self.log_inclusion(model, rows, int(real.sum()) - 1).to(logits.dtype)
        column = torch.searchsorted(rows, targets)
        own = correction[column] * (first_occurrences(targets) & real)
        logits = (logits - correction).scatter_add_(1, column, own)
        return next_item_loss(logits, column * real, weights, counts=counts)

    def log_inclusion(self, model: MISSRec, rows: Tensor, others: int) -> Tensor:
        """Return the logarithm of each row's probability to be a candidate of a position, [item].

        Parameters
        ----------
        model : MISSRec
        rows : Tensor [item], int64
        others : int
            Targets of the batch beside the position's own.
        """
        classes = int(candidate_rows(model).sum())
        uniform = min(self.negatives / max(classes, 1), 1.0)
        self.share = self.share.to(rows.device)
        missed = max(others, 0) * torch.log1p(-self.share[rows])
        missed = missed + torch.log1p(torch.tensor(-uniform, dtype=torch.float64, device=rows.device))
        log_probability = torch.log(-torch.expm1(missed))
        return log_probability.masked_fill(rows == 0, 0.0)  # the padding row is always there, if it is a class at all
