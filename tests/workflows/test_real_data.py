"""Real tables, where they are at hand: real timestamps, missing images, known counts."""

from pathlib import Path

import numpy as np
import pandas as pd

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.etl.pipeline import etl


def test_time_split_of_movielens(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "ml100k_posters"
    report = etl(source / "interactions.parquet", source / "items.parquet", tmp_path / "data", split="time")
    events = pd.read_parquet(source / "interactions.parquet")
    first, second = report["settings"]["valid_from"], report["settings"]["test_from"]
    train = Sessions.load(tmp_path / "data" / "train")
    assert len(train.values) == (events.timestamp < first).sum()
    assert train.features["timestamp"].max() < first
    for split, start, end in (("valid", first, second), ("test", second, np.inf)):
        sessions = Sessions.load(tmp_path / "data" / split)
        last = sessions.features["timestamp"][sessions.offsets[1:] - 1]
        assert (last >= start).all()
        assert (last < end).all()
        assert (sessions.lengths >= 2).all()
    assert list(train.features) == ["timestamp", "rating", "position"]  # "split" would tell the answer


def test_leave_one_out_agrees_with_the_published_split(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "amazon_scientific"
    modality = {"text": source / "text_minilm.npy", "image": source / "image_clip.npy"}
    report = etl(source / "interactions.parquet", source / "items.parquet", tmp_path / "data", modality=modality)
    assert report["sessions"] == {"train": 8442, "valid": 8442, "test": 8442}
    assert report["modalities"] == {"text": 4385, "image": 1585}
    events = pd.read_parquet(source / "interactions.parquet").set_index("user_id")
    catalogue = Catalogue.load(tmp_path / "data" / "catalogue")
    for split in ("valid", "test"):
        sessions = Sessions.load(tmp_path / "data" / split)
        assert sessions.users is not None
        expected = events[events.split == split].item_id
        assert catalogue.ids_of(sessions.split_last()[1]) == expected[sessions.users.to_pylist()].tolist()
    assert catalogue.train_count.sum() == (events.split == "train").sum()
