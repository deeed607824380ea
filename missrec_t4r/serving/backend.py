"""What the two Triton models do, free of Triton's types, so that it runs and is tested without a server.

Triton hands a Python model all requests that its dynamic batcher has gathered. `execute` turns each into a mapping of
arrays, lets a backend answer all of them in one pass, and gives a request that cannot be answered its own error: one
malformed request never fails its neighbours. The wire format is documented in ``triton_models/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from missrec_t4r.data.side import SideArrays
from missrec_t4r.errors import BundleError, MISSRecError, ServingError
from missrec_t4r.export.manifest import ITEMS_FILE, catalogue_version, verify_bundle
from missrec_t4r.export.vocabulary import load_session_transform
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE
from missrec_t4r.serving.rules import NO_RULES, Rules
from missrec_t4r.serving.side import SideReader

Arrays = Mapping[str, npt.NDArray[Any]]
Answer = Arrays | MISSRecError

DEFAULT_TOP_K = 10
LONGEST_SESSION = 1 << 16
"""Ids per session of one request; longer ones are an attack or a mistake, and are refused before they cost anything."""


class Backend(Protocol):
    """One of our Triton models."""

    inputs: Sequence[str]
    """Names of the request tensors; one that a request leaves out is absent from its mapping."""

    def answer(self, requests: Sequence[Arrays]) -> list[Answer]:
        """Answer every request, or say what is wrong with it."""


class SessionsBackend:
    """Raw item ids to catalogue rows.

    Parameters
    ----------
    bundle : Path
        Only the files it reads are verified: the session transform and the item table.
    """

    inputs: Sequence[str] = ("item_ids", "length")

    def __init__(self, bundle: Path) -> None:
        verify_bundle(bundle, only=(SESSION_TRANSFORM_FILE, ITEMS_FILE))
        self.transform = load_session_transform(bundle)

    def answer(self, requests: Sequence[Arrays]) -> list[Answer]:
        """Return ``rows`` and ``seen`` for ``item_ids`` [batch, width] and ``length`` [batch, 1]."""
        return [self._one(request) for request in requests]

    def _one(self, request: Arrays) -> Answer:
        if request["item_ids"].shape[1] > LONGEST_SESSION:
            found = f"a session of {request['item_ids'].shape[1]} ids"
            return ServingError(found, f"at most {LONGEST_SESSION}", "send the most recent ones")
        try:
            rows, seen = self.transform.padded(request["item_ids"], request["length"])
        except MISSRecError as error:
            return error
        return {"rows": rows, "seen": seen}


class RankerBackend:
    """Catalogue rows to recommended items, all requests in one pass of the model.

    Parameters
    ----------
    bundle : Path
        Verified whole.
    device : str
        ``"cpu"`` or ``"cuda:0"``; on a GPU the tokens are kept in 16 bits.
    threads : int
        Threads of one pass; Triton runs several models and requests beside each other, so few are best.
    """

    inputs: Sequence[str] = ("rows", "seen", "top_k", "exclude_seen", "exclude", "allow", "rules", "reasons", "side")

    def __init__(self, bundle: Path, device: str = "cpu", threads: int = 1) -> None:
        import torch  # here, not above: the sessions model starts without it

        from missrec_t4r.export.bundle import load_bundle
        from missrec_t4r.serving.ranker import Ranker

        torch.set_num_threads(max(threads, 1))
        loaded = load_bundle(bundle)
        dtype = torch.float32 if device == "cpu" else torch.float16
        self.ranker, self.transform = (
            Ranker(loaded.model, loaded.catalogue, device=device, dtype=dtype, tables=loaded.tables),
            loaded.transform,
        )
        self.side = SideReader(() if loaded.model.side is None else loaded.model.side.columns)
        self.catalogue_version = catalogue_version(verify_bundle(bundle, only=()))
        self._modalities = np.array([*(name.encode() for name in loaded.catalogue.modalities), b"id"], object)
        for _ in range(2):  # warm before traffic
            self.ranker.rank(np.full((1, loaded.transform.max_sequence_length), FIRST_ITEM_ROW))

    def answer(self, requests: Sequence[Arrays]) -> list[Answer]:
        """Return the tensors of ``triton_models/README.md`` for every request."""
        answers: list[Answer] = [{}] * len(requests)
        good: list[tuple[int, Arrays, list[Rules], list[SideArrays]]] = []
        for index, request in enumerate(requests):
            try:
                good.append((index, request, self._checked(request), self._side_of(request)))
            except MISSRecError as error:
                answers[index] = error
        if good:
            _, accepted, rules, side = zip(*good, strict=True)
            for (index, *_), answer in zip(good, self._ranked(accepted, rules, side), strict=True):
                answers[index] = answer
        return answers

    def _checked(self, request: Arrays) -> list[Rules]:
        """Return the rules of a request's sessions, or raise what is wrong with the request."""
        top_k = _per_session(request, "top_k", DEFAULT_TOP_K)
        if (top_k < 1).any():
            raise ServingError(f"top_k is {int(top_k.min())}", "at least 1", "ask for one item or more")
        n_rows = self.ranker.catalogue.n_rows
        for name in ("rows", "seen"):
            rows = request[name]
            if rows.size and (rows.min() < PADDING_ROW or rows.max() >= n_rows):
                raise ServingError(f"{name} holds values from {rows.min()} to {rows.max()}", f"0 to {n_rows - 1}")
        if "rules" not in request:
            return [NO_RULES] * len(request["rows"])
        rules = [Rules.parse(text) for text in request["rules"].reshape(-1).tolist()]
        for own in rules:
            self.ranker.columns.check(own)
        return rules

    def _side_of(self, request: Arrays) -> list[SideArrays]:
        """Return the side features of a request's sessions, whole as their ids are."""
        if "side" not in request:
            return [{}] * len(request["rows"])
        lengths = (request["seen"] > PADDING_ROW).sum(1).tolist()
        return [self.side.read(text, n) for text, n in zip(request["side"].reshape(-1).tolist(), lengths, strict=True)]

    def _ranked(
        self, requests: Sequence[Arrays], rules: Sequence[list[Rules]], side: Sequence[list[SideArrays]]
    ) -> list[Arrays]:
        sizes = [len(request["rows"]) for request in requests]
        wanted = [_per_session(request, "top_k", DEFAULT_TOP_K) for request in requests]
        rows = _stacked([request["rows"] for request in requests])
        told = self.side.stacked([own for each in side for own in each], rows)
        ranking = self.ranker.rank(
            rows,
            side=told,
            seen=_stacked([request["seen"] for request in requests]),
            top_k=np.concatenate(wanted),
            exclude_seen=np.concatenate([_per_session(request, "exclude_seen", False) for request in requests]),
            exclude=self._listed(requests, "exclude"),
            allow=self._listed(requests, "allow"),
            rules=[own for each in rules for own in each],
        )
        asked = np.concatenate([_per_session(request, "reasons", False) for request in requests])
        ids, version = self.transform.wire_ids_of(ranking.rows), np.array([[self.catalogue_version.encode()]], object)
        answers: list[Arrays] = []
        for start, size, top_k in zip(np.cumsum([0, *sizes]), sizes, wanted, strict=False):
            mine = slice(start, start + size)
            best = ranking.rows[mine, : min(int(top_k.max()), ranking.rows.shape[1])]
            answers.append(
                {
                    "item_id": ids[mine, : best.shape[1]],
                    "score": ranking.scores[mine, : best.shape[1]],
                    "n_items": ranking.n_items[mine, None],
                    "n_unknown": ranking.n_unknown[mine, None],
                    "fallback": ranking.fallback[mine, None],
                    "n_passed": ranking.n_passed[mine, None],
                    "catalogue_version": np.repeat(version, size, axis=0),
                    **self._reasons(rows[mine], best, asked[mine], {name: part[mine] for name, part in told.items()}),
                }
            )
        return answers

    def _listed(self, requests: Sequence[Arrays], name: str) -> npt.NDArray[np.int64] | None:
        """Return the rows of the ids that requests list under ``name``, [batch, any]; 0 is filling."""
        if not any(name in request for request in requests):
            return None
        return _stacked([self._looked_up(request, name) for request in requests])

    def _looked_up(self, request: Arrays, name: str) -> npt.NDArray[np.int64]:
        if name not in request:
            return np.zeros((len(request["rows"]), 0), np.int64)
        ids = request[name]
        return np.where(self.transform.is_missing(ids), PADDING_ROW, self.transform.look_up(ids))

    def _reasons(
        self, rows: npt.NDArray[np.int64], best: npt.NDArray[np.int64], asked: npt.NDArray[np.bool_], side: SideArrays
    ) -> dict[str, npt.NDArray[Any]]:
        if not asked.any():  # nobody reads them, and writing empty strings into tensors takes time
            nothing = (len(best), 0)
            return {
                "reason_item": np.empty(nothing, self.transform.wire_ids.dtype),
                "reason_modality": np.empty(nothing, object),
            }
        item, modality = np.zeros_like(best), np.full(best.shape, b"", object)
        from missrec_t4r.serving.reasons import reasons

        for line in np.flatnonzero(asked):
            given = best[line][best[line] > PADDING_ROW]
            own = {name: part[line : line + 1] for name, part in side.items()}
            item[line, : len(given)], leading = reasons(self.ranker, rows[line : line + 1], given, own)
            modality[line, : len(given)] = self._modalities[leading] if item[line].any() else b""
        return {"reason_item": self.transform.wire_ids_of(item), "reason_modality": modality}


def _per_session(request: Arrays, name: str, default: int | bool) -> npt.NDArray[Any]:
    return request[name].reshape(-1) if name in request else np.full(len(request["rows"]), default)


def _stacked(matrices: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    if len(matrices) == 1:
        return matrices[0]
    stacked = np.full((sum(map(len, matrices)), max(matrix.shape[1] for matrix in matrices)), PADDING_ROW, np.int64)
    start = 0
    for matrix in matrices:
        stacked[start : start + len(matrix), : matrix.shape[1]] = matrix
        start += len(matrix)
    return stacked


Observer = Callable[[Sequence[Arrays], Sequence[Answer]], None]
"""Sees every batch of requests and its answers, after they were worked out: metrics."""


def execute(backend: Backend, requests: Sequence[Any], pb_utils: Any, observe: Observer | None = None) -> list[Any]:
    """Answer Triton's requests.

    Parameters
    ----------
    backend : Backend
    requests : sequence of pb_utils.InferenceRequest
        What the dynamic batcher gathered.
    pb_utils : module
        Triton's ``triton_python_backend_utils``, which exists inside the server only.
    observe : callable, optional

    Returns
    -------
    list of pb_utils.InferenceResponse
        One per request, in order.
    """
    asked = [_arrays(backend, request, pb_utils) for request in requests]
    answers = backend.answer(asked)
    if observe is not None:
        observe(asked, answers)
    return [_response(answer, pb_utils) for answer in answers]


def _arrays(backend: Backend, request: Any, pb_utils: Any) -> Arrays:
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in backend.inputs}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


def _response(answer: Answer, pb_utils: Any) -> Any:
    if isinstance(answer, MISSRecError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer)))
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in answer.items()])


def parameter(args: Mapping[str, str], name: str) -> str:
    """Return an entry of ``parameters`` in the model's ``config.pbtxt``."""
    try:
        value: str = json.loads(args["model_config"])["parameters"][name]["string_value"]
    except KeyError as error:
        raise BundleError(f"config.pbtxt lacks the parameter {name!r}", "", "write the repository again") from error
    return value


def bundle_folder(args: Mapping[str, str]) -> Path:
    """Return the bundle that the parameter ``bundle`` names, relative to the model's folder: repositories can move."""
    return Path(args["model_repository"]) / parameter(args, "bundle")


def device_of(args: Mapping[str, str]) -> str:
    """Return torch's name of the device that Triton gave this instance."""
    import torch

    on_gpu = args["model_instance_kind"] == "GPU" and torch.cuda.is_available()
    return f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
