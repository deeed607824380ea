"""The trained SASRec baseline in a file beside a run or a comparison, so that it is trained once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

from safetensors import SafetensorError
from torch import Tensor

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.data.sessions import Sessions
from missrec_t4r.evaluation.full_ranking import PROTOCOLS
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.ranking import sasrec
from missrec_t4r.ranking.baselines import Popularity
from missrec_t4r.ranking.sasrec import SASRec, SASRecScorer, tuned_sasrec
from missrec_t4r.ranking.tune_baselines import Tuned
from missrec_t4r.runs.run_folder import load_metadata, load_tensors, save_tensors

log = logging.getLogger(__name__)

SASREC_FILE: Final = "sasrec.safetensors"


def kept_sasrec(
    train: Sessions,
    valid: Sessions,
    catalogue: Catalogue,
    keep: Path | None = None,
    look_in: Sequence[Path] = (),
    *,
    seed: int = 0,
) -> dict[str, Tuned]:
    """Return the tuned baseline: read from a folder that has it for these sessions, else trained.

    Parameters
    ----------
    train, valid, catalogue, seed
        As in `missrec_t4r.ranking.sasrec.tuned_sasrec`.
    keep : Path, optional
        Folder to read it from, and to write it to where it was trained.
    look_in : sequence of Path
        Other folders to read it from.
    """
    digest = hashlib.sha256(json.dumps([catalogue.n_rows, seed]).encode())
    digest.update(file_digest(Path(sasrec.__file__)).encode())
    for sessions in (train, valid):
        digest.update(sessions.values.tobytes() + sessions.offsets.tobytes())
    key = digest.hexdigest()
    for folder in [*([] if keep is None else [keep]), *look_in]:
        file = folder / SASREC_FILE
        if file.is_file() and _made_from(file) == key:
            log.info(f"sasrec as trained before, from {file}")
            return _read(file, catalogue)
    best = tuned_sasrec(train, valid, catalogue, seed=seed)
    if keep is not None:
        tensors: dict[str, Tensor] = {}
        for protocol, tuned in best.items():
            weights = cast("SASRecScorer", tuned.scorer).model.state_dict()
            tensors |= {f"{protocol}/{name}": weight for name, weight in weights.items()}
        facts = {protocol: [dict(tuned.settings), tuned.criterion] for protocol, tuned in best.items()}
        keep.mkdir(parents=True, exist_ok=True)
        save_tensors(keep / SASREC_FILE, tensors, {"made_from": key, "facts": json.dumps(facts)})
    return best


def _made_from(file: Path) -> str | None:
    try:
        return load_metadata(file).get("made_from")
    except SafetensorError as error:
        log.warning(f"{file} is damaged ({error}): training again")
        return None


def _read(file: Path, catalogue: Catalogue) -> dict[str, Tuned]:
    tensors, facts = load_tensors(file), json.loads(load_metadata(file)["facts"])
    best = {}
    for protocol in PROTOCOLS:
        weights = {name.partition("/")[2]: part for name, part in tensors.items() if name.startswith(f"{protocol}/")}
        settings, criterion = facts[protocol]
        model = SASRec(catalogue.n_rows, len(weights["positions.weight"]), settings["dropout"])
        model.load_state_dict(weights)
        best[protocol] = Tuned(SASRecScorer(model, Popularity.fit(catalogue)), settings, criterion)
    return best
