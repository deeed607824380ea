"""SASRec: a causal Transformer over item ids, the neural baseline (Kang and McAuley, arXiv:1808.09781).

    h        = Transformer(E[i_1] + p_1, ..., E[i_n] + p_n)     E: embedding per item, p: embedding per position
    score(j) = h_n . E[j]

Trained with the softmax over the catalogue instead of the published binary loss, which makes it a strong baseline
(arXiv:2309.07602). No content, no history bias, no score term: no part of a score depends on whether the item is in the
session. Plain torch, so that it shares no code with the model that it is compared with.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from missrec_t4r.arrays import Ints
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import EXCLUDED, KEPT_STRICT, PROTOCOLS, quick_metrics
from missrec_t4r.evaluation.metrics import CRITERION
from missrec_t4r.progress import track
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.tune_baselines import MOST_SESSIONS, Tuned, sample_sessions
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW

log = logging.getLogger(__name__)

WIDTH, N_HEAD, N_LAYERS, LONGEST = 64, 2, 2, 200
"""As in the comparison of arXiv:2309.07602."""
LEARNING_RATE, BATCH_SIZE, EPOCHS, PATIENCE = 1e-3, 128, 200, 10
"""Of Adam; sessions per step; epochs at most, and without a better validation NDCG@10 under either protocol."""
DROPOUTS: Final = (0.2, 0.5)
"""Tuned on validation: little for long sessions, much for few short ones."""
MOST_CLASSES: Final = 20_000
"""A larger catalogue is trained with the batch's targets and random items as classes."""
_LOGITS_BYTES: Final = 128 * 2**20


class SASRec(nn.Module):
    """Causal Transformer encoder, input and output embeddings shared.

    Parameters
    ----------
    n_rows : int
        Rows of the catalogue.
    length : int
        Last items of a session that are read.
    dropout : float
    """

    def __init__(self, n_rows: int, length: int, dropout: float) -> None:
        super().__init__()
        self.length = length
        self.items, self.positions = nn.Embedding(n_rows, WIDTH), nn.Embedding(length, WIDTH)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(WIDTH, N_HEAD, WIDTH, dropout, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, N_LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Return [batch, seq, dim]; position t depends on the items up to t, padding (0) stands at the right."""
        seq = item_ids.shape[1]
        mask = torch.ones(seq, seq, dtype=torch.bool, device=item_ids.device).triu(1)  # torch's: True is hidden
        x = self.items(item_ids) + self.positions.weight[:seq]
        return self.layers(self.dropout(x), mask=mask, is_causal=True)


class SASRecScorer:
    """Scores of a trained model; sessions without a known item get popularity.

    Parameters
    ----------
    model : SASRec
    fallback : Popularity
    """

    def __init__(self, model: SASRec, fallback: Popularity) -> None:
        self.model, self.fallback = model.eval(), fallback

    @torch.no_grad()
    def __call__(self, histories: Sessions) -> Tensor:
        """Return scores [batch, row]."""
        device = self.model.items.weight.device
        item_ids = torch.from_numpy(histories.padded(range(len(histories)), self.model.length)).to(device)
        last = torch.from_numpy(np.minimum(histories.lengths, self.model.length) - 1).to(device)
        hidden = self.model(item_ids)[torch.arange(len(last), device=device), last.clamp_min(0)]  # [batch, dim]
        scores: Tensor = hidden @ self.model.items.weight.t()
        scores[:, :FIRST_ITEM_ROW] = -torch.inf
        return torch.where((last < 0)[:, None], self.fallback(histories).to(scores), scores)


def tuned_sasrec(train: Sessions, valid: Sessions, catalogue: Catalogue, *, seed: int = 0) -> dict[str, Tuned]:
    """Train `SASRec` once per dropout; return its best epoch per protocol.

    Parameters
    ----------
    train, valid : Sessions
        Training sessions; validation rows, history and target.
    catalogue : Catalogue
        Its contents are not read.
    seed : int
        Of initialisation, order, dropout and the sample of validation sessions.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    popular, sample = Popularity.fit(catalogue), sample_sessions(valid, MOST_SESSIONS, seed)
    sample = sample.take(np.argsort(sample.lengths, kind="stable"))  # equal lengths in a chunk: little padding
    train = train.known()
    train = train.take(np.flatnonzero(train.lengths >= 2))
    best: dict[str, Tuned] = {}
    own_gpu = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(own_gpu):  # what is trained or drawn after it does not depend on it
        for dropout in DROPOUTS:
            torch.manual_seed(seed)
            length = int(np.clip(train.lengths.max(initial=1), 1, LONGEST))
            model, bad = SASRec(catalogue.n_rows, length, dropout).to(device), 0
            optimiser, rng = torch.optim.Adam(model.parameters(), LEARNING_RATE), np.random.default_rng(seed)
            own = dict.fromkeys((EXCLUDED, KEPT_STRICT), -1.0)
            for epoch in track(range(EPOCHS), f"training sasrec, dropout {dropout}, at most {EPOCHS} epochs"):
                _epoch(model.train(), train, optimiser, rng)
                found = quick_metrics(SASRecScorer(model, popular), sample, catalogue.n_rows, protocols=list(own))
                bad += 1
                for protocol in own:
                    if (value := found[protocol][CRITERION] or 0.0) > own[protocol]:
                        own[protocol], bad = value, 0
                        if protocol not in best or value > best[protocol].criterion:
                            kept = SASRecScorer(copy.deepcopy(model), popular)
                            best[protocol] = Tuned(kept, {"dropout": dropout, "epoch": epoch + 1}, value)
                if bad == PATIENCE:
                    break
            log.info(
                f"sasrec with dropout {dropout}: {epoch + 1} epochs, validation {CRITERION} {max(own.values()):.4f}"
            )
    return {protocol: best[EXCLUDED if protocol == EXCLUDED else KEPT_STRICT] for protocol in PROTOCOLS}


def _epoch(model: SASRec, train: Sessions, optimiser: torch.optim.Optimizer, rng: np.random.Generator) -> None:
    """Train every position of every session once."""
    weights, n_rows = model.items.weight, model.items.num_embeddings
    for chosen in _batches(train, min(n_rows, MOST_CLASSES), model.length, rng):
        rows = torch.from_numpy(train.padded(chosen, model.length + 1)).to(weights.device)  # [batch, seq + 1]
        is_target = rows[:, 1:] != PADDING_ROW
        targets, classes = rows[:, 1:][is_target], torch.arange(FIRST_ITEM_ROW, n_rows, device=weights.device)
        if n_rows > MOST_CLASSES:
            drawn = torch.from_numpy(rng.integers(FIRST_ITEM_ROW, n_rows, MOST_CLASSES)).to(weights.device)
            classes = torch.unique(torch.cat([targets, drawn]))
        hidden = model(rows[:, :-1])[is_target]  # [position, dim]
        loss = F.cross_entropy(hidden @ weights[classes].t(), torch.searchsorted(classes, targets))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _batches(train: Sessions, n_classes: int, length: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Yield the sessions of every step in random order; fewer where their logits would be large.

    Not of similar length: that was quicker, and worse (validation NDCG@10 .086 for .094 on Amazon Scientific).
    """
    size = max(1, min(BATCH_SIZE, _LOGITS_BYTES // (4 * n_classes * length)))
    order = rng.permutation(len(train))
    return (order[start : start + size] for start in range(0, len(order), size))
