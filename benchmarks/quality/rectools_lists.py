"""Lists of RecTools' SASRec for the sessions of a data folder; runs in an environment of RecTools, not in ours.

    python rectools_lists.py --data work/bench/scientific_mm/data --out work/lists --seed 2020

Softmax over the catalogue; epochs and dropout are chosen on validation NDCG@10 for each protocol, as for our baseline
`sasrec`. Writes ``excluded.parquet`` and ``kept_strict.parquet`` (lists of catalogue rows in the order of the test
split, unfiltered, long enough to take the seen items out) and ``settings.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

PROTOCOLS = ("excluded", "kept_strict")
SHAPE = {"n_blocks": 2, "n_heads": 2, "n_factors": 64, "session_max_len": 20, "batch_size": 128, "lr": 1e-3}
"""Those of our baseline, but for the length: it reads all of a session, here 36 items at most and 18 in 99 %."""
DROPOUTS = (0.2, 0.5)
STEP, EPOCHS, PATIENCE = 5, 200, 2
"""Epochs between two validations, epochs at most, and validations without a better one under either protocol."""
LONGEST = 50
"""Items of a list after the seen ones are taken out."""


def sessions(data: Path, split: str) -> pd.DataFrame:
    """Return user and list of catalogue rows of every session."""
    table = pd.concat([pd.read_parquet(file) for file in sorted((data / split).glob("*.parquet"))], ignore_index=True)
    return table.rename(columns={"item_id-list": "items"})[["user_id", "items"]]


def dataset(users: pd.Series, items: list[Any]) -> Dataset:
    """Return sessions as RecTools' interactions, a second between two events."""
    lengths = [len(one) for one in items]
    place = np.concatenate([np.arange(length) for length in lengths])
    events = {
        Columns.User: np.repeat(users.to_numpy(), lengths),
        Columns.Item: np.concatenate(items),
        Columns.Weight: 1.0,
        Columns.Datetime: pd.Timestamp("2020-01-01") + pd.to_timedelta(place, unit="s"),
    }
    return Dataset.construct(pd.DataFrame(events))


def lists(model: SASRecModel, table: pd.DataFrame) -> tuple[list[np.ndarray], np.ndarray, list[np.ndarray]]:
    """Return histories, targets and unfiltered lists of the sessions of a split."""
    histories, targets = [one[:-1] for one in table["items"]], np.array([one[-1] for one in table["items"]])
    length = LONGEST + max(len(one) for one in histories)
    given = dataset(table["user_id"], histories)
    found = model.recommend(
        table["user_id"], given, k=length, filter_viewed=False, on_unsupported_targets="ignore"
    )  # users without a known item have no list
    ranked = found.sort_values(Columns.Rank).groupby(Columns.User)[Columns.Item]
    by_user = {user: items.to_numpy() for user, items in ranked}
    return histories, targets, [by_user.get(user, np.array([], int)) for user in table["user_id"]]


def ndcg(histories: list[np.ndarray], targets: np.ndarray, found: list[np.ndarray], *, without_seen: bool) -> float:
    """Return NDCG@10."""
    total = 0.0
    for history, target, items in zip(histories, targets, found, strict=True):
        first = items[~np.isin(items, history)][:10] if without_seen else items[:10]
        total += (1 / np.log2(np.flatnonzero(first == target) + 2)).sum()
    return total / len(targets)


def trainer() -> Trainer:
    """Return a silent trainer of a few epochs."""
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "logger", "enable_checkpointing"), False)
    return Trainer(max_epochs=STEP, min_epochs=STEP, devices=1, accelerator="cpu", **quiet)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=2020)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    train, valid, test = (sessions(options.data, split) for split in ("train", "valid", "test"))
    fitted = dataset(train["user_id"], list(train["items"]))
    best = {protocol: {"valid_ndcg@10": -1.0} for protocol in PROTOCOLS}
    for dropout in DROPOUTS:
        seed_everything(options.seed)
        model = SASRecModel(
            loss="softmax",
            dropout_rate=dropout,
            train_min_user_interactions=2,
            epochs=STEP,
            get_trainer_func=trainer,
            dataloader_num_workers=0,
            recommend_torch_device="cpu",
            **SHAPE,
        )
        waited, started = 0, time.perf_counter()
        for epochs in range(STEP, EPOCHS + 1, STEP):
            model.fit_partial(fitted, min_epochs=STEP, max_epochs=STEP)
            measured = lists(model, valid)
            scores = {protocol: ndcg(*measured, without_seen=protocol == "excluded") for protocol in PROTOCOLS}
            print(json.dumps({"dropout": dropout, "epochs": epochs, **scores}), flush=True)
            better = [protocol for protocol in PROTOCOLS if scores[protocol] > best[protocol]["valid_ndcg@10"]]
            for protocol in better:
                seconds = round(time.perf_counter() - started, 1)
                best[protocol] = {
                    "dropout": dropout, "epochs": epochs, "valid_ndcg@10": scores[protocol], "seconds": seconds,
                }  # fmt: skip
            if better:
                rows = pd.DataFrame({"user_id": test["user_id"], "items": lists(model, test)[2]})
                for protocol in better:
                    rows.to_parquet(options.out / f"{protocol}.parquet")
            waited = 0 if better else waited + 1
            if waited >= PATIENCE:
                break
    versions = {name: importlib.metadata.version(name) for name in ("rectools", "torch", "pytorch-lightning")}
    settings = {"shape": SHAPE, "best": best, "versions": versions}
    (options.out / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
