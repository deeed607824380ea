"""Parity of the compiled request workflow with the fitted NVTabular workflow, checked at export.

Needs NVTabular, through `missrec_t4r.etl`; without it the check is skipped, and the export's result names the reason.
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
    """Require that NVTabular's request workflow returns the same rows as the compiled one.

    Parameters
    ----------
    data : Path
        Data folder with the fitted workflow.
    catalogue : Catalogue
        The exported catalogue.
    sessions : sequence of sequences
        Raw test sessions; variants with unknown and missing ids, too long and empty ones are added.

    Returns
    -------
    str
        ``"equal on N sessions"``, or why the check was skipped.

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
    if catalogue.id_type != "string":  # NVTabular refuses missing ids in integer lists
        sessions = [[item for item in session if item is not None] for session in sessions]
    variants = hostile_variants(sessions, catalogue.id_type)
    transform = SessionTransform.load(data / SESSION_TRANSFORM_FILE, vocabulary_of(catalogue.items))
    for session, expected, rows in zip(variants, _nvtabular_rows(folder, variants), transform(*variants), strict=True):
        if rows.tolist() != expected:
            raise ParityError(
                f"session {session} becomes rows {rows.tolist()}",
                f"{expected}, as NVTabular's request workflow gives",
                "re-run `missrec etl`: transform and workflow are of different runs",
            )
    return f"equal on {len(variants)} sessions"


def _nvtabular_rows(folder: Path, sessions: Sequence[Sequence[RawId]]) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Merlin warns about its own dependencies
        from missrec_t4r.etl.nvt.request_transform import request_rows

        return request_rows(folder, sessions)


def hostile_variants(sessions: Sequence[Sequence[RawId]], id_type: str) -> list[list[RawId]]:
    """Return the sessions, variants of each with unknown ids and of excessive length, and an empty session.

    Missing ids are inserted for string catalogues only: NVTabular refuses them in integer lists.

    Examples
    --------
    >>> [len(session) for session in hostile_variants([["lamp", "desk"]], "string")]
    [2, 4, 128, 0]
    """
    rng = random.Random(7)
    unknown: list[RawId] = ["", " ", "no such item", "☂", None] if id_type == "string" else [-1, 0, 2**62]
    variants: list[list[RawId]] = [list(session) for session in sessions]
    for session in sessions:
        mixed = [*session, *rng.choices(unknown, k=2)]
        rng.shuffle(mixed)
        variants += [mixed, mixed * 32]  # longer than any max_sequence_length
    return [*variants, []]
