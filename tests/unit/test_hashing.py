"""Digests: equal data folders have equal ones, whenever they were written, and any other byte or name another."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from missrec_t4r.data.user_hash import hash_ids
from missrec_t4r.io.hashing import data_digest, file_digest
from missrec_t4r.io.json_files import write_json


def folder(data: Path, *, seconds: float = 1.0, events: int = 5, split: str = "train", rows: bytes = b"rows") -> Path:
    """Write files where a data folder has its own."""
    (data / split).mkdir(parents=True)
    (data / split / "part_0.parquet").write_bytes(rows)
    write_json(data / "etl.json", {"events": events, "seconds": seconds})
    return data


def test_a_data_folder_is_known_by_its_content_and_not_by_when_it_was_written(tmp_path: Path) -> None:
    digest = data_digest(folder(tmp_path / "a"))
    later = folder(tmp_path / "b", seconds=9.0)
    (later / "state").mkdir()
    (later / "state" / "0.arrow").write_bytes(b"what no reader of sessions opens")
    assert data_digest(later) == digest
    others = {"events": {"events": 6}, "split": {"split": "valid"}, "rows": {"rows": b"rovs"}}
    assert digest not in {data_digest(folder(tmp_path / name, **given)) for name, given in others.items()}


def test_a_files_digest_covers_its_last_byte(tmp_path: Path) -> None:
    content = bytearray(3 << 20)
    (tmp_path / "zeros").write_bytes(content)
    content[-1] = 1
    (tmp_path / "one").write_bytes(content)
    assert file_digest(tmp_path / "zeros") != file_digest(tmp_path / "one")


def test_users_keep_their_hash_wherever_they_stand_and_zero_bytes_count() -> None:
    users = pa.array(["ann", "a user with a long name", "", "\0", "\0\0", "12345678", "12345678\0"])
    hashes = hash_ids(users).tolist()
    assert len(set(hashes)) == len(users)
    assert [hash_ids(pa.array([user.as_py()])).tolist()[0] for user in users] == hashes
    assert hash_ids(users.slice(1, 3)).tolist() == hashes[1:4]
