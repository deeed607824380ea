"""What became of each part of a model that starts from another run: loaded, missing, re-initialised, frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from missrec_t4r.errors import CheckpointError
from missrec_t4r.model.missrec import MISSRec

Status = Literal["loaded", "missing", "re-initialised", "unexpected"]


@dataclass(frozen=True)
class Part:
    """One part of the model, or of the run that it starts from."""

    name: str
    status: Status
    """``loaded``; ``missing`` in the other run, so initialised; ``re-initialised``, since it cannot mean the same here;
    ``unexpected``: only the other run has it."""
    parameters: int
    """Numbers in it, buffers included."""
    note: str = ""
    frozen: bool = False


class WeightLoadingReport:
    """Copies weights part by part and remembers what became of each; nothing is left unexplained.

    Parameters
    ----------
    model : MISSRec
        Freshly built; receives the weights.
    weights : mapping of str to Tensor
        State of the other run's model.
    source : str
        Where they come from, for messages.
    """

    def __init__(self, model: MISSRec, weights: Mapping[str, Tensor], source: str) -> None:
        self.model, self.weights, self.source = model, weights, source
        self.parts: list[Part] = []
        self._prefixes: dict[str, tuple[str, ...]] = {}
        self._used: set[str] = set()
        self._wrong: list[str] = []

    def copy(self, name: str, *prefixes: str, theirs: str | None = None, note: str = "") -> None:
        """Copy all tensors under the prefixes; ``theirs`` is the other run's prefix, where it differs."""
        own = _under(self.model.state_dict(), prefixes)
        if not own:
            return
        names = {key: key if theirs is None else theirs + key.removeprefix(prefixes[0]) for key in own}
        found = {key: self.weights[other] for key, other in names.items() if other in self.weights}
        self._used |= {names[key] for key in found}
        if not found:
            self._add(Part(name, "missing", _count(own.values()), note or "initialised"), prefixes)
            return
        self._wrong += [f"{name}: {key} is missing" for key in own if key not in found]
        self._wrong += [
            f"{name}: {key} has shape {list(found[key].shape)} instead of {list(own[key].shape)}"
            for key in found
            if found[key].shape != own[key].shape
        ]
        if not self._wrong:
            self.model.load_state_dict(found, strict=False)
        self._add(Part(name, "loaded", _count(own.values()), note), prefixes)

    def filled(self, name: str, note: str, *prefixes: str) -> None:
        """Record a part that the caller has filled from the other run's weights."""
        self._leave(prefixes)
        self._add(Part(name, "loaded", _count(_under(self.model.state_dict(), prefixes).values()), note), prefixes)

    def fresh(self, name: str, why: str, *prefixes: str, theirs: Iterable[str] = ()) -> None:
        """Record a part that starts anew although the other run may have one."""
        own = _under(self.model.state_dict(), prefixes)
        left = self._leave((*prefixes, *theirs))
        if own:
            self._add(Part(name, "re-initialised" if left else "missing", _count(own.values()), why), prefixes)

    def freeze(self, names: Iterable[str]) -> None:
        """Keep these parts as they are while the rest trains.

        Raises
        ------
        CheckpointError
            One of them was not loaded: a frozen part of random numbers makes no sense.
        """
        frozen = set(names)
        random = [part.name for part in self.parts if part.name in frozen and part.status != "loaded"]
        if random:
            raise CheckpointError(
                f"{', '.join(random)} would be frozen without having been loaded from {self.source}",
                "a run that has these parts",
                "--freeze none",
            )
        for name, weight in self.model.named_parameters():
            if any(name.startswith(prefix) for part in frozen for prefix in self._prefixes.get(part, ())):
                weight.requires_grad_(False)
        self.parts = [
            Part(part.name, part.status, part.parameters, part.note, frozen=part.name in frozen) for part in self.parts
        ]

    def finish(self) -> dict[str, Any]:
        """Refuse wrong shapes, list what only the other run has, and return the report.

        Raises
        ------
        CheckpointError
            Every tensor that does not fit.
        """
        if self._wrong:
            more = f" and {len(self._wrong) - 6} more" if len(self._wrong) > 6 else ""
            raise CheckpointError(
                f"{self.source}: " + "; ".join(self._wrong[:6]) + more,
                "weights of the same sizes",
                "train with the sizes of that run (its recipe.json)",
            )
        covered = tuple(prefix for prefixes in self._prefixes.values() for prefix in prefixes)
        forgotten = [name for name in self.model.state_dict() if not name.startswith(covered)]
        for name in sorted({name.partition(".")[0] for name in forgotten}):
            self.fresh(name, "not carried over", f"{name}.", name)
        unexpected: dict[str, list[Tensor]] = {}
        for name, tensor in self.weights.items():
            if name not in self._used:
                unexpected.setdefault(_owner(name), []).append(tensor)
        for name, tensors in unexpected.items():
            self.parts.append(Part(name, "unexpected", _count(tensors), "this model has none; left out"))
        trainable = _count(weight for weight in self.model.parameters() if weight.requires_grad)
        total = _count(self.model.parameters())
        return {
            "parts": [vars(part) for part in self.parts],
            "parameters": total,
            "trainable_parameters": trainable,
            "trainable_share": round(trainable / max(total, 1), 4),
        }

    def _add(self, part: Part, prefixes: tuple[str, ...]) -> None:
        self.parts.append(part)
        self._prefixes[part.name] = prefixes

    def _leave(self, prefixes: Iterable[str]) -> bool:
        left = set(_under(self.weights, tuple(prefixes)))
        self._used |= left
        return bool(left)


def lines(report: Mapping[str, Any]) -> list[str]:
    """Return a report as text, one line per part."""
    shown = [
        f"  {part['name']:<19}{part['status']:<15}{'frozen' if part['frozen'] else '':<7}"
        f"{part['parameters']:>11,}  {part['note']}".rstrip()
        for part in report["parts"]
    ]
    share = f"{report['trainable_parameters']:,} of {report['parameters']:,} parameters train"
    return [*shown, f"  {share} ({100 * report['trainable_share']:.1f} %)"]


def _under(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)} if prefixes else {}


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _owner(name: str) -> str:
    """Return the part that a tensor belongs to, as reports call it."""
    if name.startswith("item_encoder.adapters."):
        return f"adapter {name.split('.')[2]}"
    first = name.partition(".")[0]
    names = {
        "item_encoder": "item IDs",
        "prior": "neighbour prior",
        "lookalikes": "look-alike prior",
        "side": "side features",
    }
    return names.get(first, first.replace("_", " "))
