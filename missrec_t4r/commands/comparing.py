"""``missrec compare``: `missrec_t4r.comparison.compare`, with a verdict as exit code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from missrec_t4r.config.checks import require_at_least
from missrec_t4r.errors import GateError


def compare(
    systems: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    split: Literal["test", "valid"] = "test",
    candidate: str | None = None,
    baselines: Sequence[str] = (),
    protocols: Sequence[str] = ("excluded", "kept_strict", "kept_with_history_term"),
    slice_columns: Sequence[str] = (),
    gate: str | Path | None = None,
    max_sequence_length: int | None = None,
    image_column: str | None = None,
    images: str | Path | None = None,
    trust_pickle: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Compare runs, T4R models, files of lists and baselines on the same users, and say whether to ship the candidate.

    Exit code 3 for "do not ship".

    Parameters
    ----------
    systems : sequence of path
        The current system, the candidate, and any others; each as PATH or NAME=PATH: a run folder (several seeds:
        NAME=RUN1,RUN2), a folder of tr.Model.save, a parquet file of lists (user_id, item_id in order), or popularity,
        item_knn, content_knn, sasrec, network, terms (of the first run).
    out : path
        Folder for comparison.json and comparison.html.
    data : path, optional
        Data folder with the sessions, on which every run is ranked; by default that of the first run, and other runs
        are ranked on their own folders and matched by user and target.
    split : {"test", "valid"}
        Sessions to compare on.
    candidate : str, optional
        Name of the system that the verdict is about; by default the second one.
    baselines : sequence of str
        Baselines to show beside: popularity, item_knn, content_knn, sasrec (trained first, and kept in the folder of
        the comparison), network, terms; comma-separated.
    protocols : sequence of str
        How seen items are treated, comma-separated; the verdict is by the first one.
    slice_columns : sequence of str
        Columns of the item table, such as category: a slice for each of the frequent values of the target.
    gate : path, optional
        YAML of bounds on the candidate's measures, measure: {min: ..., max: ...}; without it the 95 % interval of the
        paired difference in NDCG@10 decides.
    max_sequence_length : int, optional
        Last items of a session that a T4R model reads, if its schema does not state it.
    image_column : str, optional
        Column of the item table with the path of the item's picture, relative to --images, for the examples of the
        page; by default what `missrec features` read.
    images : path, optional
        Folder of these pictures. Without --image-column a picture is found by its name, <item_id>.png or the like.
    trust_pickle : bool
        Read saved T4R models, which are pickles and can run any code: only your own.
    dry_run : bool
        Check the systems and print what would be compared; rank and write nothing.

    Returns
    -------
    dict
        As `missrec_t4r.comparison.compare.compare`.

    Raises
    ------
    GateError
        The verdict is "do not ship". The files are written.
    """
    from missrec_t4r.comparison.compare import compare as compared
    from missrec_t4r.comparison.verdict import REFUSED

    require_at_least(1, max_sequence_length=max_sequence_length)
    result = compared(
        systems,
        out,
        data=data,
        split=split,
        candidate=candidate,
        baselines=baselines,
        protocols=protocols,
        slice_columns=slice_columns,
        gate=gate,
        max_sequence_length=max_sequence_length,
        image_column=image_column,
        images=images,
        trust_pickle=trust_pickle,
        dry_run=dry_run,
    )
    if not dry_run and result["verdict"]["decision"] == REFUSED:
        violated = [check for check in result["verdict"]["gate"] if not check["passed"]]
        bounds = "; ".join(f"{check['measure']} is {check['value']}, bounds {check['bounds']}" for check in violated)
        raise GateError(
            result["verdict"]["words"] + (f" ({bounds})" if bounds else ""),
            "every measure within its bounds" if bounds else "a difference that is not below zero",
            f"look at {result['page']}",
            result=result,
        )
    return result
