"""A shop that is small enough to read: twelve items in two modalities, six sessions, and a model over it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.schema import FIRST_ITEM_ROW
from tests.settings import EVERY_PART

FURNITURE = ["lamp", "desk", "chair", "sofa", "rug", "shelf"]
KITCHEN = ["kettle", "mug", "teapot", "pan", "plate", "voucher"]
ITEMS = FURNITURE + KITCHEN
WIDTHS = {"text": 6, "image": 4}
WITHOUT = {"text": ["rug"], "image": ["voucher"]}

SESSIONS = [
    ["lamp", "desk", "chair"],
    ["mug", "kettle", "teapot", "mug"],
    ["voucher"],
    ["lamp", "mug", "voucher", "sofa", "rug"],
    ["kettle", "kettle"],
    ["chair", "rug", "sofa", "lamp", "desk", "mug", "pan"],
]
TARGETS = ["shelf", "pan", "mug", "kettle", "teapot", "sofa"]
"""What came after each session; nobody ever met the plate, so it is a cold item."""

SMALL = {"d_model": 8, "n_head": 2, "d_feedforward": 12, "max_sequence_length": 10, "interest_ratio": 0.3}


def row(item: str) -> int:
    """Return the catalogue row of an item."""
    return FIRST_ITEM_ROW + ITEMS.index(item)


def rows(session: list[str]) -> list[int]:
    """Return the catalogue rows of a session."""
    return [row(item) for item in session]


def catalogue(without: dict[str, list[str]] | None = None) -> Catalogue:
    """Return the shop's catalogue; ``without`` names the items that lack a modality."""
    rng = np.random.default_rng(7)
    kind = np.array([item in KITCHEN for item in ITEMS])
    modalities = {}
    for name, width in WIDTHS.items():
        centre = np.stack([rng.normal(size=width), rng.normal(size=width)])
        vectors = np.zeros((FIRST_ITEM_ROW + len(ITEMS), width), np.float32)
        vectors[FIRST_ITEM_ROW:] = centre[kind.astype(int)] + 0.7 * rng.normal(size=(len(ITEMS), width))
        present = np.arange(len(vectors)) >= FIRST_ITEM_ROW
        present[[row(item) for item in (WITHOUT if without is None else without).get(name, [])]] = False
        vectors[~present] = 0.0
        modalities[name] = Modality(vectors, present)
    seen = [item for session in SESSIONS for item in session] + TARGETS
    counts = pa.array([seen.count(item) for item in ITEMS], pa.int64())
    return Catalogue(pa.table({"item_id": ITEMS, "train_count": counts}), modalities)


def batch(sessions: list[list[str]] | None = None, padding: int = 0) -> torch.Tensor:
    """Return sessions as rows [batch, seq], with some more padding than they need."""
    chosen = Sessions.from_lists([rows(session) for session in (SESSIONS if sessions is None else sessions)])
    padded = torch.from_numpy(chosen.padded(np.arange(len(chosen)), SMALL["max_sequence_length"]))
    return torch.nn.functional.pad(padded, (0, padding))


def targets() -> torch.Tensor:
    """Return the row of every session's target."""
    return torch.tensor(rows(TARGETS))


def model(config: MISSRecConfig, shop: Catalogue | None = None, *, seed: int = 0) -> MISSRec:
    """Return a model in double precision and evaluation mode whose every weight is far from its initial value."""
    torch.manual_seed(seed)
    built = build_missrec(config, catalogue() if shop is None else shop).double().eval()
    with torch.no_grad():
        for name, weight in built.named_parameters():
            weight.normal_(1.0 if ".norm" in name and name.endswith("weight") else 0.0, 0.3)
    built.discover_interests(seed=0)
    return built


def paper(**changes: object) -> MISSRecConfig:
    """Return the published configuration in a readable size."""
    return MISSRecConfig.paper(**(SMALL | changes))


def ours_masked(**changes: object) -> MISSRecConfig:
    """Return the published configuration, but with missing modalities left out and the mean over modalities read."""
    masks = {"missing_modality": "masked", "padding_candidate": False}
    return paper(**(masks | {"contextual_readout": "mean", "single_modality": "fused"} | changes))


def default(**changes: object) -> MISSRecConfig:
    """Return our architecture in a readable size."""
    return MISSRecConfig(**(EVERY_PART | SMALL | changes))  # type: ignore[arg-type]  # the settings check their own types
