"""What the two Triton models do, free of Triton's types, so that it runs and is tested without a server.

Triton hands a Python model all requests that its dynamic batcher has gathered. `execute` turns each into a mapping of
arrays, lets a backend answer all of them in one pass, and gives a request that cannot be answered its own error: one
malformed request never fails its neighbours. The wire format is documented in ``triton_models/README.md``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import ITEMS_FILE, catalogue_version, verify_bundle
from missrec_t4r.data.event_features import EventArrays
from missrec_t4r.errors import BundleError, MISSRecError, ServingError
from missrec_t4r.retrieval.filters import NO_RULES, Rules
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE
from missrec_t4r.serving.event_features import EventFeatureReader

Arrays = Mapping[str, npt.NDArray[Any]]
Answer = Arrays | MISSRecError
Asked = TypeVar("Asked")
Answered = TypeVar("Answered")

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
        return [_or_error(self._one, request) for request in requests]

    def _one(self, request: Arrays) -> Arrays:
        width = request["item_ids"].shape[1]
        if width > LONGEST_SESSION:
            raise ServingError(f"a session of {width} ids", f"at most {LONGEST_SESSION}", "send the most recent ones")
        ids = _matrix(request, "item_ids", len(request["length"]), self.transform.wire_ids.dtype.kind)
        rows, seen = self.transform.padded(ids, _per_session(request, "length", len(ids), 0))
        return {"rows": rows, "seen": seen}


class _Question(NamedTuple):
    """One request of the ranker, read and checked; every part has an entry per session."""

    rows: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int64]
    top_k: npt.NDArray[np.int64]
    exclude_seen: npt.NDArray[np.bool_]
    reasons: npt.NDArray[np.bool_]
    exclude: npt.NDArray[np.int64]
    allow: npt.NDArray[np.int64]
    rules: list[Rules]
    event_features: list[EventArrays]


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

        from missrec_t4r.bundle.bundle import load_bundle
        from missrec_t4r.retrieval.ranker import Ranker

        torch.set_num_threads(max(threads, 1))
        loaded = load_bundle(bundle)
        dtype = torch.float32 if device == "cpu" else torch.float16
        self.ranker, self.transform = (
            Ranker(loaded.model, loaded.catalogue, device=device, dtype=dtype, tables=loaded.tables),
            loaded.transform,
        )
        self.event_features = EventFeatureReader(
            () if loaded.model.event_features is None else loaded.model.event_features.columns
        )
        self.catalogue_version = catalogue_version(verify_bundle(bundle, only=()))
        self._modalities = np.array([*(name.encode() for name in loaded.catalogue.modalities), b"id"], object)
        for _ in range(2):  # warm before traffic
            self.ranker.rank(np.full((1, loaded.transform.max_sequence_length), FIRST_ITEM_ROW))

    def answer(self, requests: Sequence[Arrays]) -> list[Answer]:
        """Return the tensors of ``triton_models/README.md`` for every request."""
        read = [_or_error(self._read, request) for request in requests]
        good = [question for question in read if not isinstance(question, MISSRecError)]
        ranked: list[Answer] = []
        try:
            ranked += self._ranked(good) if good else []
        except Exception:  # the fault of one of them, and nobody else shall bear it
            ranked += [_or_error(lambda question: self._ranked([question])[0], question) for question in good]
        rest = iter(ranked)
        return [question if isinstance(question, MISSRecError) else next(rest) for question in read]

    def _read(self, request: Arrays) -> _Question:
        """Return a request's parts, or raise what is wrong with it."""
        rows = _matrix(request, "rows", len(request["rows"]))
        n, n_rows = len(rows), self.ranker.catalogue.n_rows
        seen = _matrix(request, "seen", n)
        top_k = _per_session(request, "top_k", n, DEFAULT_TOP_K)
        if (top_k < 1).any():
            raise ServingError(f"top_k is {int(top_k.min())}", "at least 1", "ask for one item or more")
        for name, part in (("rows", rows), ("seen", seen)):
            if part.size and (part.min() < PADDING_ROW or part.max() >= n_rows):
                raise ServingError(f"{name} holds values from {part.min()} to {part.max()}", f"0 to {n_rows - 1}")
        rules = [Rules.parse(text) for text in _texts(request, "rules", n)] if "rules" in request else [NO_RULES] * n
        for own in rules:
            self.ranker.columns.check(own)
        event_features: list[EventArrays] = [{}] * n
        if "side" in request:  # as long as the whole session, as its ids are
            lengths = (seen > PADDING_ROW).sum(1).tolist()
            event_features = [
                self.event_features.read(text, length) for text, length in zip(_texts(request, "side", n), lengths)
            ]
        return _Question(
            rows,
            seen,
            top_k,
            _per_session(request, "exclude_seen", n, False),
            _per_session(request, "reasons", n, False),
            self._looked_up(request, "exclude", n),
            self._looked_up(request, "allow", n),
            rules,
            event_features,
        )

    def _ranked(self, questions: Sequence[_Question]) -> list[Arrays]:
        sizes = [len(question.rows) for question in questions]
        rows = _stacked([question.rows for question in questions])
        told = self.event_features.stacked([own for question in questions for own in question.event_features], rows)
        exclude = _stacked([question.exclude for question in questions])
        allow = _stacked([question.allow for question in questions])
        ranking = self.ranker.rank(
            rows,
            event_features=told,
            seen=_stacked([question.seen for question in questions]),
            top_k=np.concatenate([question.top_k for question in questions]),
            exclude_seen=np.concatenate([question.exclude_seen for question in questions]),
            exclude=exclude if exclude.shape[1] else None,
            allow=allow if allow.shape[1] else None,
            rules=[own for question in questions for own in question.rules],
        )
        ids, version = self.transform.wire_ids_of(ranking.rows), np.array([[self.catalogue_version.encode()]], object)
        answers: list[Arrays] = []
        for start, size, question in zip(np.cumsum([0, *sizes]), sizes, questions, strict=False):
            mine = slice(start, start + size)
            best = ranking.rows[mine, : min(int(question.top_k.max()), ranking.rows.shape[1])]
            answers.append(
                {
                    "item_id": ids[mine, : best.shape[1]],
                    "score": ranking.scores[mine, : best.shape[1]],
                    "n_items": ranking.n_items[mine, None],
                    "n_unknown": ranking.n_unknown[mine, None],
                    "fallback": ranking.fallback[mine, None],
                    "n_passed": ranking.n_passed[mine, None],
                    "catalogue_version": np.repeat(version, size, axis=0),
                    **self._reasons(
                        rows[mine], best, question.reasons, {name: part[mine] for name, part in told.items()}
                    ),
                }
            )
        return answers

    def _looked_up(self, request: Arrays, name: str, n: int) -> npt.NDArray[np.int64]:
        """Return the rows of the ids that a request lists under ``name``, [batch, any]; 0 is filling."""
        if name not in request:
            return np.zeros((n, 0), np.int64)
        ids = _matrix(request, name, n, self.transform.wire_ids.dtype.kind)
        return np.where(self.transform.is_missing(ids), PADDING_ROW, self.transform.look_up(ids))

    def _reasons(
        self,
        rows: npt.NDArray[np.int64],
        best: npt.NDArray[np.int64],
        asked: npt.NDArray[np.bool_],
        event_features: EventArrays,
    ) -> dict[str, npt.NDArray[Any]]:
        if not asked.any():  # nobody reads them, and writing empty strings into tensors takes time
            nothing = (len(best), 0)
            return {
                "reason_item": np.empty(nothing, self.transform.wire_ids.dtype),
                "reason_modality": np.empty(nothing, object),
            }
        item, modality = np.zeros_like(best), np.full(best.shape, b"", object)
        from missrec_t4r.retrieval.explain import reasons

        for line in np.flatnonzero(asked):
            given = best[line][best[line] > PADDING_ROW]
            own = {name: part[line : line + 1] for name, part in event_features.items()}
            item[line, : len(given)], leading = reasons(self.ranker, rows[line : line + 1], given, own)
            modality[line, : len(given)] = self._modalities[leading] if item[line].any() else b""
        return {"reason_item": self.transform.wire_ids_of(item), "reason_modality": modality}


def _or_error(work: Callable[[Asked], Answered], asked: Asked) -> Answered | MISSRecError:
    """Return what ``work`` makes of one request; whatever it raises is that request's answer and nobody else's."""
    try:
        return work(asked)
    except MISSRecError as error:
        return error
    except Exception as error:
        found = f"a request that cannot be answered ({type(error).__name__}: {str(error)[:200]})"
        refused = ServingError(found, "the tensors of triton_models/README.md", "ask with a client of this package")
        refused.__cause__ = error
        return refused


def _matrix(request: Arrays, name: str, n: int, kind: str = "i") -> npt.NDArray[Any]:
    part = request[name]
    if part.ndim != 2 or len(part) != n or part.dtype.kind != kind:
        raise _unfit(name, part, n)
    return part


def _per_session(request: Arrays, name: str, n: int, default: int | bool) -> npt.NDArray[Any]:
    if name not in request:
        return np.full(n, default)
    part = request[name]
    if part.size != n or part.dtype.kind != ("b" if isinstance(default, bool) else "i"):
        raise _unfit(name, part, n)
    return part.reshape(-1)


def _texts(request: Arrays, name: str, n: int) -> list[bytes]:
    texts: list[bytes] = request[name].reshape(-1).tolist()
    if len(texts) != n or not all(isinstance(text, (bytes, str)) for text in texts):
        raise _unfit(name, request[name], n)
    return texts


def _unfit(name: str, part: npt.NDArray[Any], n: int) -> ServingError:
    return ServingError(
        f"{name} holds {part.dtype} of shape {list(part.shape)} for {n} sessions", "see triton_models/README.md"
    )


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
    read = [_or_error(lambda request: _arrays(backend, request, pb_utils), request) for request in requests]
    asked = [request for request in read if not isinstance(request, MISSRecError)]
    answered = iter(backend.answer(asked))
    answers = [request if isinstance(request, MISSRecError) else next(answered) for request in read]
    if observe is not None:
        observe([{} if isinstance(request, MISSRecError) else request for request in read], answers)
    return [_response(answer, pb_utils) for answer in answers]


def _arrays(backend: Backend, request: Any, pb_utils: Any) -> Arrays:
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in backend.inputs}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


def _response(answer: Answer, pb_utils: Any) -> Any:
    if isinstance(answer, MISSRecError):
        words = str(answer).encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no text for Triton
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(words))
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
