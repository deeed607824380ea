"""Proof that requests are transformed at serving time as the fitted NVTabular workflow transforms them.

NVTabular is needed for the proof only, and reached through `missrec_t4r.etl`; without it the proof is skipped
and the export says so.
"""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Sequence
from pathlib import Path

from missrec_t4r.bundle.id_encoder import RawId, SessionTransform
from missrec_t4r.bundle.item_table import vocabulary_of
from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ParityError
from missrec_t4r.schema import SESSION_TRANSFORM_FILE

REQUEST_WORKFLOW = "request_workflow"


def check_workflow(data: Path, catalogue: Catalogue, sessions: Sequence[Sequence[RawId]]) -> str:
    """Require that NVTabular gives the same rows as the compiled transform.

    Parameters
    ----------
    data : Path
        Data folder with the fitted workflow.
    catalogue : Catalogue
        The exported one.
    sessions : sequence of sequences
        Raw test sessions; variants with unknown and missing ids, over-long and empty ones are added.

    Returns
    -------
    str
        ``"equal on N sessions"``, or why the proof was skipped.

    Raises
    ------
    ParityError
        Names the first session that differs.
    """
    folder = data / REQUEST_WORKFLOW
    if not folder.is_dir():
        return f"skipped: {data} holds no {REQUEST_WORKFLOW}"
    if importlib.util.find_spec("nvtabular") is None:
        return "skipped: nvtabular is not installed"
    asked = (
        sessions if catalogue.id_type == "string" else [[i for i in session if i is not None] for session in sessions]
    )
    tried = hostile_variants(asked, catalogue.id_type)
    transform = SessionTransform.load(data / SESSION_TRANSFORM_FILE, vocabulary_of(catalogue.items))
    for session, expected, rows in zip(tried, _nvtabular_rows(folder, tried), transform(*tried), strict=True):
        if rows.tolist() != expected:
            raise ParityError(
                f"session {session} becomes rows {rows.tolist()}",
                f"{expected}, as NVTabular's request workflow gives",
                "re-run `missrec etl`: transform and workflow do not belong together",
            )
    return f"equal on {len(tried)} sessions"


def _nvtabular_rows(folder: Path, sessions: Sequence[Sequence[RawId]]) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Merlin's remarks on its own dependencies
        from missrec_t4r.etl.nvt.request_transform import request_rows

        return request_rows(folder, sessions)


def hostile_variants(sessions: Sequence[Sequence[RawId]], id_type: str, seed: int = 7) -> list[list[RawId]]:
    """Return the sessions, and each again with strange ids strewn in, repeated beyond any limit, and an empty one.

    Missing ids are among the strange ones for string catalogues only: NVTabular cannot take them in integer lists.

    Examples
    --------
    >>> [len(session) for session in hostile_variants([["lamp", "desk"]], "string")]
    [2, 4, 128, 0]
    """
    chance = random.Random(seed)
    strange: list[RawId] = ["", " ", "no such item", "☂", None] if id_type == "string" else [-1, 0, 2**62]
    tried: list[list[RawId]] = [list(session) for session in sessions]
    for session in sessions:
        strewn = [*session, *chance.choices(strange, k=2)]
        chance.shuffle(strewn)
        tried += [strewn, strewn * 32]
    return [*tried, []]
