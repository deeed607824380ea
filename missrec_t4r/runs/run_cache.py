"""Whether a run is finished already: the same data, settings, start and code give the same run, which is found.

A scheduler that repeats a night after a failure behind the training does not train again. What identifies a run is the
content of the data folder, not its times: an ETL that is repeated writes the same sessions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.io.hashing import digest_of, file_digest
from missrec_t4r.runs.run_folder import RUN_FILE, WEIGHTS_FILE, versions, write_json

FINISHED_FILE = "finished.json"
_CODE = ("data", "model", "training", "t4r", "evaluation")


def identity(data: Sequence[Path], settings: Mapping[str, Any], source: Path | None = None) -> str:
    """Return what identifies a run, 64 hexadecimal digits.

    Parameters
    ----------
    data : sequence of Path
        Data folders, in their order; their content counts, not their times.
    settings : mapping
        Everything else that a number may depend on.
    source : Path, optional
        The run that training starts from.
    """
    digest = hashlib.sha256(json.dumps([settings, versions()], sort_keys=True, default=str).encode())
    package = Path(__file__).parents[1]
    for file in sorted(file for name in _CODE for file in (package / name).rglob("*.py")):
        digest.update(file_digest(file).encode())
    for folder in data:
        digest.update(digest_of(folder).encode())
    for name in (RUN_FILE, WEIGHTS_FILE) if source is not None else ():
        if source is not None and (source / name).is_file():
            digest.update(file_digest(source / name).encode())
    return digest.hexdigest()


def recall(out: Path, made_from: str) -> dict[str, Any] | None:
    """Return the answer of the finished run in ``out`` if it is the one that ``made_from`` identifies."""
    try:
        known = json.loads((out / FINISHED_FILE).read_text(encoding="utf-8"))
        same = known["made_from"] == made_from and known["run"] == file_digest(out / RUN_FILE)
    except (OSError, ValueError, KeyError):
        return None
    return dict(known["answer"]) if same and (out / WEIGHTS_FILE).is_file() else None


def remember(out: Path, made_from: str, answer: Mapping[str, Any]) -> None:
    """Write down what the run in ``out`` was made from and what its command answered."""
    if (out / RUN_FILE).is_file():
        known = {"made_from": made_from, "run": file_digest(out / RUN_FILE), "answer": dict(answer)}
        write_json(out / FINISHED_FILE, known)
