"""The test shop: small catalogues with given or random vectors, sessions, data folders, and models over them.

Suites differ in the number of items, in the columns that they need, and in the items that lack a modality: parameters
of the functions here. The shop of `ITEMS` is small enough to read and is the one of most tests of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from missrec_t4r.config import MISSRecConfig
from missrec_t4r.data.catalogue import Catalogue, Modality
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.model.missrec import MISSRec
from missrec_t4r.ranking.hybrid import build_missrec
from missrec_t4r.schema import CATALOGUE_FOLDER, FIRST_ITEM_ROW, ITEM_ID, ITEM_LIST, LIST_SUFFIX, TRAIN_COUNT, USER_ID
from tests.settings import EVERY_PART

LENGTHS = {"train": 6, "valid": 7, "test": 8}
"""Items per session of the splits of `write_circle`: each split adds the next item."""


def modality(vectors: npt.NDArray[Any], without: Iterable[int] = (), **encoder: str) -> Modality:
    """Return a modality; the reserved rows and the rows in ``without`` have no vector."""
    present = np.arange(len(vectors)) >= FIRST_ITEM_ROW
    present[list(without)] = False
    return Modality(np.where(present[:, None], vectors, 0).astype(np.float32), present, encoder)


def random_modalities(
    n_items: int, widths: Mapping[str, int], seed: int, without: Mapping[str, Iterable[int]] | None = None
) -> dict[str, Modality]:
    """Return modalities with normally distributed vectors; ``without`` holds the rows that lack one, by modality."""
    rng = np.random.default_rng(seed)
    vectors = {name: rng.normal(size=(n_items + FIRST_ITEM_ROW, width)) for name, width in widths.items()}
    return {
        name: modality(values, (without or {}).get(name, ()), name=f"random-{name}") for name, values in vectors.items()
    }


def make_catalogue(
    ids: Sequence[str] | Sequence[int],
    modalities: Mapping[str, Modality],
    counts: npt.ArrayLike,
    columns: Mapping[str, Sequence[object]] | None = None,
) -> Catalogue:
    """Return a catalogue of items with training counts and business columns."""
    table = {ITEM_ID: pa.array(ids), TRAIN_COUNT: pa.array(np.asarray(counts, np.int64))}
    return Catalogue(pa.table(table | {name: pa.array(values) for name, values in (columns or {}).items()}), modalities)


def counts_of(sessions: Iterable[Sequence[int]], n_items: int) -> npt.NDArray[np.int64]:
    """Return how often each item occurs, [item]."""
    return np.bincount(np.concatenate([*sessions]), minlength=n_items + FIRST_ITEM_ROW)[FIRST_ITEM_ROW:]


def circle(n_items: int, n_users: int, length: int, order: Sequence[int] | None = None) -> list[list[int]]:
    """Return sessions in which item follows item around a circle, so that the next one can be learned.

    ``order`` is the position of every item on the circle, by default that of its row.
    """
    row_at = np.argsort(np.arange(n_items) if order is None else order) + FIRST_ITEM_ROW
    return [[int(row_at[(user + step) % n_items]) for step in range(length)] for user in range(n_users)]


def write_split(
    folder: Path, sessions: Sequence[Sequence[int]], features: Mapping[str, Any] | None = None, users: str = ""
) -> Path:
    """Write sessions and their event features as one parquet file; users are numbers or, with a prefix, texts."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = range(len(sessions))
    columns = {USER_ID: pa.array([f"{users}{number}" for number in numbers] if users else numbers)}
    columns[ITEM_LIST] = pa.array(sessions, pa.list_(pa.int64()))
    for name, values in (features or {}).items():
        columns[name + LIST_SUFFIX] = values if isinstance(values, pa.Array) else pa.array(values)
    pq.write_table(pa.table(columns), folder / "part_0.parquet")
    return folder / "part_0.parquet"


def write_circle(
    folder: Path,
    ids: Sequence[str] | Sequence[int],
    modalities: Mapping[str, Modality],
    *,
    n_users: int = 40,
    order: Sequence[int] | None = None,
    columns: Mapping[str, Sequence[object]] | None = None,
    longer: int = 0,
) -> Path:
    """Write a data folder whose sessions, ``longer`` than `LENGTHS`, walk around the `circle` of its items."""
    splits = {split: circle(len(ids), n_users, length + longer, order) for split, length in LENGTHS.items()}
    items = make_catalogue(ids, modalities, counts_of(splits["train"], len(ids)), columns)
    items.save(folder / CATALOGUE_FOLDER)
    for split, sessions in splits.items():
        write_split(folder / split, sessions)
    return folder


# The shop that is small enough to read: twelve items in two modalities, six sessions, and a model over it

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
"""Target of each session; no session has the plate, so it is a cold item."""

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
        vectors = np.zeros((FIRST_ITEM_ROW + len(ITEMS), width))
        vectors[FIRST_ITEM_ROW:] = centre[kind.astype(int)] + 0.7 * rng.normal(size=(len(ITEMS), width))
        modalities[name] = modality(vectors, rows((WITHOUT if without is None else without).get(name, [])))
    seen = [item for session in SESSIONS for item in session] + TARGETS
    return make_catalogue(ITEMS, modalities, [seen.count(item) for item in ITEMS])


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
