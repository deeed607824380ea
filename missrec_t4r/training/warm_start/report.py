"""Weight-loading report of a warm start: loaded, missing, re-initialised or frozen, per part of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from missrec_t4r.errors import CheckpointError
from missrec_t4r.model.missrec import MISSRec

ITEM_KNN, CONTENT_KNN = "item-kNN term", "content-kNN term"
Status = Literal["loaded", "missing", "re-initialised", "unexpected"]


@dataclass(frozen=True)
class Part:
    """One part of the model, or of the source run."""

    name: str
    status: Status
    """``loaded``; ``missing`` in the source run, so initialised; ``re-initialised``, since the source's weights belong
    to its own catalogue; ``unexpected``: only the source run has it."""
    parameters: int
    """Number of parameters and buffer elements."""
    note: str = ""
    frozen: bool = False


class WeightLoadingReport:
    """Copies weights part by part and records the status of every part of the model.

    Parameters
    ----------
    model : MISSRec
        Newly built; receives the weights.
    weights : mapping of str to Tensor
        State dict of the source run's model.
    source : str
        Name of the source in messages.
    """

    def __init__(self, model: MISSRec, weights: Mapping[str, Tensor], source: str) -> None:
        self.model, self.weights, self.source = model, weights, source
        self.parts: list[Part] = []
        self._prefixes: dict[str, tuple[str, ...]] = {}
        self._used: set[str] = set()
        self._errors: list[str] = []

    def copy(self, name: str, *prefixes: str, theirs: str | None = None, note: str = "") -> None:
        """Copy all tensors under the prefixes; ``theirs`` is the source run's prefix if it differs."""
        own = _under(self.model.state_dict(), prefixes)
        names = {key: key if theirs is None else theirs + key.removeprefix(prefixes[0]) for key in own}
        loaded = {key: self.weights[other] for key, other in names.items() if other in self.weights}
        self._used |= {names[key] for key in loaded}
        if not loaded:
            self._record(name, "missing", note or "initialised", prefixes)
            return
        self._errors += [f"{name}: {key} is missing" for key in own if key not in loaded]
        self._errors += [
            f"{name}: {key} has shape {list(tensor.shape)} instead of {list(own[key].shape)}"
            for key, tensor in loaded.items()
            if tensor.shape != own[key].shape
        ]
        if not self._errors:
            self.model.load_state_dict(loaded, strict=False)
        self._record(name, "loaded", note, prefixes)

    def copy_adapter(self, name: str, theirs: str | None, note: str) -> None:
        """Copy a modality's adapter from that of the source run's modality ``theirs``; None for none."""
        prefix = f"item_encoder.adapters.{name}."
        if theirs is None:
            self.record_initialised(f"adapter {name}", note, prefix)
        else:
            self.copy(f"adapter {name}", prefix, theirs=f"item_encoder.adapters.{theirs}.", note=note)

    def record_loaded(self, name: str, note: str, *prefixes: str) -> None:
        """Record a part that the caller has loaded from the source run's weights itself."""
        self._used |= _under(self.weights, prefixes).keys()
        self._record(name, "loaded", note, prefixes)

    def record_initialised(self, name: str, why: str, *prefixes: str) -> None:
        """Record a part that keeps its initial values: re-initialised if the source run has the part, else missing."""
        in_source = _under(self.weights, prefixes).keys()
        self._used |= in_source
        self._record(name, "re-initialised" if in_source else "missing", why, prefixes)

    def _record(self, name: str, status: Status, note: str, prefixes: tuple[str, ...]) -> None:
        """Record a part that the model has."""
        if own := _under(self.model.state_dict(), prefixes):
            self.parts.append(Part(name, status, _count(own.values()), note))
            self._prefixes[name] = prefixes

    def _freeze(self, frozen: set[str]) -> None:
        """Exclude parts from training."""
        not_loaded = [part.name for part in self.parts if part.name in frozen and part.status != "loaded"]
        if not_loaded:
            raise CheckpointError(
                f"{', '.join(not_loaded)} would be frozen without having been loaded from {self.source}",
                "a run that has these parts",
                "--freeze none",
            )
        prefixes = tuple(prefix for name in frozen for prefix in self._prefixes.get(name, ()))
        for name, weight in self.model.named_parameters():
            if name.startswith(prefixes):
                weight.requires_grad_(False)
        self.parts = [replace(part, frozen=part.name in frozen) for part in self.parts]

    def finish(self, frozen: Iterable[str]) -> dict[str, Any]:
        """Add score terms and parts that only the source run has, check the shapes, freeze, and return the report.

        Parameters
        ----------
        frozen : iterable of str
            Parts that are not trained.

        Returns
        -------
        dict
            ``parts`` (name, status, parameters, note, frozen), ``parameters``, ``trainable_parameters``,
            ``trainable_share``.

        Raises
        ------
        CheckpointError
            Tensors that are missing or of another shape; all are listed. Or a part to freeze was not loaded: with
            random weights that makes no sense.
        """
        why = "fitted after training"
        self.record_initialised(ITEM_KNN, why, "terms.item_knn.", "terms.cold_start.", "terms.rare_items.")
        self.record_initialised(CONTENT_KNN, why, "terms.content_knn.")
        self._freeze(set(frozen))
        if self._errors:
            more = f" and {len(self._errors) - 6} more" if len(self._errors) > 6 else ""
            raise CheckpointError(
                f"{self.source}: " + "; ".join(self._errors[:6]) + more,
                "weights of the same sizes",
                "train with the sizes of that run (its recipe.json)",
            )
        covered = tuple(prefix for prefixes in self._prefixes.values() for prefix in prefixes)
        remaining = [name for name in self.model.state_dict() if not name.startswith(covered)]
        for name in sorted({name.partition(".")[0] for name in remaining}):
            self.record_initialised(name, "not carried over", f"{name}.", name)
        unexpected: dict[str, list[Tensor]] = {}
        for name, tensor in self.weights.items():
            if name not in self._used:
                unexpected.setdefault(_part_name(name), []).append(tensor)
        for name, tensors in unexpected.items():
            self.parts.append(Part(name, "unexpected", _count(tensors), "this model has no such part; not loaded"))
        trainable = _count(weight for weight in self.model.parameters() if weight.requires_grad)
        total = _count(self.model.parameters())
        return {
            "parts": [vars(part) for part in self.parts],
            "parameters": total,
            "trainable_parameters": trainable,
            "trainable_share": round(trainable / max(total, 1), 4),
        }


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return a report as text, one line per part."""
    lines = [
        f"  {part['name']:<19}{part['status']:<15}{'frozen' if part['frozen'] else '':<7}"
        f"{part['parameters']:>11,}  {part['note']}".rstrip()
        for part in report["parts"]
    ]
    share = f"{report['trainable_parameters']:,} of {report['parameters']:,} parameters are trained"
    return [*lines, f"  {share} ({100 * report['trainable_share']:.1f} %)"]


def _under(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _part_name(name: str) -> str:
    """Return the name of the part that a tensor belongs to."""
    if name.startswith("item_encoder.adapters."):
        return f"adapter {name.split('.')[2]}"
    first = name.removeprefix("terms.").partition(".")[0]
    names = {"item_encoder": "item IDs", "item_knn": ITEM_KNN, "content_knn": CONTENT_KNN}
    return names.get(first, first.replace("_", " "))
