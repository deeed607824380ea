"""A Transformers4Rec model as a system of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from missrec_t4r.data.catalogue import Catalogue
from missrec_t4r.errors import ConfigError
from missrec_t4r.evaluation.full_ranking import Scorer
from missrec_t4r.schema import LIST_SUFFIX

_LONGEST: Final = 10_000
"""A schema without a limit states a larger one."""


def t4r_system(
    model: Any, catalogue: Catalogue, max_sequence_length: int | None, *, trust_pickle: bool
) -> tuple[dict[str, Scorer], list[str], int | None, int]:
    """Return the model's scorer under its protocols, the event columns, its bytes on disk, the items that it reads.

    Parameters
    ----------
    model : tr.Model or path
        Path: folder that ``model.save(folder)`` wrote.
    catalogue : Catalogue
        Its rows are the ids of the model's item column.
    max_sequence_length : int or None
        Last items of a session that the model reads; by default what its inputs or its schema state.
    trust_pickle : bool
        T4R saves a model as a pickle, which can run any code when it is read.

    Raises
    ------
    ConfigError
        A pickle without ``trust_pickle``, or a model that does not state how long its sessions are.
    CheckpointError
        The pickle cannot be read.
    """
    import missrec_t4r.t4r  # noqa: F401  # before Merlin: it sets what dask must find
    from missrec_t4r.t4r.scorer import T4RScorer, load_saved

    size = None
    if isinstance(model, str | Path):
        if not trust_pickle:
            raise ConfigError(
                f"{model} is a pickle, which can run any code when it is read",
                "your consent",
                "if it is yours, add --trust-pickle",
            )
        size = sum(file.stat().st_size for file in Path(model).glob("*.pkl"))
        model = load_saved(Path(model))
    inputs = model.heads[0].body.inputs if hasattr(model.heads[0].body, "inputs") else model.heads[0].body[0]
    scorer = T4RScorer(model, catalogue, max_sequence_length or _length(inputs))
    columns = [name.removesuffix(LIST_SUFFIX) for name in scorer.columns if name != scorer.item]
    return dict.fromkeys(scorer.protocols, scorer), columns, size, scorer.length


def _length(inputs: Any) -> int:
    if length := getattr(inputs, "max_sequence_length", None):
        return int(length)
    item: Sequence[Any] = list(inputs.schema.select_by_name(inputs.categorical_module.item_id))
    longest = item[0].properties.get("value_count", {}).get("max") if item else None
    if not longest or longest > _LONGEST:
        raise ConfigError(
            "a T4R model whose schema does not state the length of its sessions",
            "the last items of a session that it reads",
            "give --max-sequence-length",
        )
    return int(longest)
