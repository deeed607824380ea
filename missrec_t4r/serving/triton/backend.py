"""Request handling of the two Triton models, independent of Triton's types, so that it is tested without a server.

Triton hands a Python model all requests that its dynamic batcher has collected. `execute` turns each into a mapping of
arrays, runs a backend on all of them in one pass, and gives an invalid request its own error: one malformed request
never fails the others of its batch, whatever it holds: every exception is the answer of the request that causes it. The
wire format is documented in ``triton_models/README.md``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple, TypeVar

import numpy as np

from missrec_t4r.arrays import AnyArray, Bools, Ints
from missrec_t4r.bundle.item_table import load_session_transform
from missrec_t4r.bundle.manifest import ITEMS_FILE, catalogue_version, verify_bundle
from missrec_t4r.data.event_features import EventArrays
from missrec_t4r.errors import BundleError, MISSRecError, ServingError
from missrec_t4r.retrieval.filters import NO_RULES, Rules
from missrec_t4r.schema import FIRST_ITEM_ROW, PADDING_ROW, SESSION_TRANSFORM_FILE
from missrec_t4r.serving.event_features import EventFeatureReader

Arrays = Mapping[str, AnyArray]
"""Tensors of a request or a response by name."""
T = TypeVar("T")
R = TypeVar("R")
Response = Arrays | MISSRecError
"""Tensors of a response, or the error of its request."""

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 10
LONGEST_SESSION = 1 << 16
"""Ids per session, and per list of ids, of one request; longer ones are an attack or a mistake, and are refused before
they cost anything: the requests of a batch are padded to the widest."""
_LONGEST_ERROR = 200
"""Characters of an unexpected exception's message that a client gets."""
_LONGEST_REFUSAL = 2000
"""Characters of a message that a client gets: it may quote the request."""


class FailedError(ServingError):
    """A request that broke this code: Triton's status INTERNAL. Refused requests have INVALID_ARGUMENT."""


class SessionsBackend:
    """Raw item ids to catalogue rows.

    Parameters
    ----------
    bundle : Path
        Only the files it reads are verified: the request transform and the item table.
    """

    inputs: Sequence[str] = ("item_ids", "length")

    def __init__(self, bundle: Path) -> None:
        self.catalogue_version = catalogue_version(verify_bundle(bundle, only=(SESSION_TRANSFORM_FILE, ITEMS_FILE)))
        self.transform = load_session_transform(bundle)

    def infer(self, requests: Sequence[Arrays]) -> list[Response]:
        """Return ``rows`` and ``seen`` for ``item_ids`` [batch, width] and ``length`` [batch, 1]."""
        return [_attempt(self._infer_one, request) for request in requests]

    def _infer_one(self, request: Arrays) -> Arrays:
        ids = _matrix(request, "item_ids", len(request["length"]), self.transform.wire_ids.dtype.kind)
        rows, seen = self.transform.padded(ids, _per_session(request, "length", len(ids), 0))
        return {"rows": rows, "seen": seen}


class _RankRequest(NamedTuple):
    """One validated request of the ranker; every field has one entry per session."""

    rows: Ints
    """[batch, seq]"""
    seen: Ints
    """[batch, width]"""
    top_k: Ints
    exclude_seen: Bools
    reasons: Bools
    exclude: Ints
    """[batch, any], 0-padded"""
    allow: Ints
    """[batch, any], 0-padded"""
    rules: list[Rules]
    event_features: list[EventArrays]
    """Of whole sessions, before they are cut to the rows."""


class RankerBackend:
    """Catalogue rows to recommended items, all requests in one pass of the model.

    Parameters
    ----------
    bundle : Path
        All its files are verified.
    device : str
        ``"cpu"`` or ``"cuda:0"``.
    threads : int, optional
        Threads of torch, set for the whole process: a server runs several models and requests concurrently, so few are
        best there.
    """

    inputs: Sequence[str] = ("rows", "seen", "top_k", "exclude_seen", "exclude", "allow", "rules", "reasons", "side")

    def __init__(self, bundle: Path, device: str = "cpu", threads: int | None = None) -> None:
        import torch  # here, not above: the sessions model starts without it

        from missrec_t4r.bundle.bundle import load_bundle
        from missrec_t4r.retrieval.ranker import Ranker

        if threads is not None:
            torch.set_num_threads(max(threads, 1))
        loaded = load_bundle(bundle)
        self.ranker = Ranker(loaded.model, loaded.catalogue, device=device, tables=loaded.tables)
        self.transform = loaded.transform
        self.event_features = EventFeatureReader(loaded.model.event_columns)
        self.catalogue_version = catalogue_version(verify_bundle(bundle, only=()))
        # `retrieval.explain.reasons` counts what is no modality from the end
        self._modalities = np.array(
            [*(name.encode() for name in loaded.catalogue.modalities), b"bought together", b"id"], object
        )
        # kernels are loaded and chosen, and memory is allocated, before the first request
        for n_sessions in (1, self.ranker.batch_size if device.startswith("cuda") else 1):
            session = np.full((n_sessions, loaded.transform.max_sequence_length), FIRST_ITEM_ROW)
            self.ranker.rank(session, exclude_seen=True)

    def infer(self, requests: Sequence[Arrays]) -> list[Response]:
        """Return the tensors of ``triton_models/README.md`` for every request."""
        return _of_valid(self._rank_isolated, [_attempt(self._parse, request) for request in requests])

    def _rank_isolated(self, requests: list[_RankRequest]) -> Sequence[Response]:
        """Rank all requests as one batch; if that fails one by one, so that only the request that causes it fails."""
        with suppress(Exception):
            return self._rank(requests) if requests else []
        # not within `except`, where the error keeps the memory of the failed attempt: on a full GPU this fails too
        return [_attempt(lambda request: self._rank([request])[0], request) for request in requests]

    def _parse(self, request: Arrays) -> _RankRequest:
        """Return the validated fields of a request, or raise its error."""
        rows = _matrix(request, "rows", len(request["rows"]))
        n_sessions, n_rows = len(rows), self.ranker.catalogue.n_rows
        seen = _matrix(request, "seen", n_sessions)
        top_k = _per_session(request, "top_k", n_sessions, DEFAULT_TOP_K)
        if (top_k < 1).any():
            raise ServingError(f"top_k is {int(top_k.min())}", "at least 1", "request one item or more")
        for name, matrix in (("rows", rows), ("seen", seen)):
            if matrix.size and (matrix.min() < PADDING_ROW or matrix.max() >= n_rows):
                raise ServingError(f"{name} holds values from {matrix.min()} to {matrix.max()}", f"0 to {n_rows - 1}")
        lengths = (seen > PADDING_ROW).sum(1)  # [batch]
        if ((rows > PADDING_ROW).sum(1) > lengths).any():
            raise ServingError("a session with more rows than seen ones", "rows: the last of seen, 0 after them")
        rules = [NO_RULES] * n_sessions
        if "rules" in request:
            rules = [Rules.parse(text) for text in _texts(request, "rules", n_sessions)]
        for session_rules in rules:
            self.ranker.columns.check(session_rules)
        event_features: list[EventArrays] = [{}] * n_sessions
        if "side" in request:  # one value per id of the whole session, not only of its last rows
            texts = _texts(request, "side", n_sessions)
            event_features = [self.event_features.read(text, length) for text, length in zip(texts, lengths.tolist())]
        return _RankRequest(
            rows,
            seen,
            top_k,
            _per_session(request, "exclude_seen", n_sessions, False),
            _per_session(request, "reasons", n_sessions, False),
            self._listed_rows(request, "exclude", n_sessions),
            self._listed_rows(request, "allow", n_sessions),
            rules,
            event_features,
        )

    def _rank(self, requests: Sequence[_RankRequest]) -> list[Arrays]:
        """Rank the sessions of all requests as one batch and split the result by request."""
        sizes = [len(request.rows) for request in requests]
        rows = _concatenate([request.rows for request in requests])  # [batch, seq], batch over all requests
        per_session = [features for request in requests for features in request.event_features]
        event_features = self.event_features.stacked(per_session, rows)
        exclude = _concatenate([request.exclude for request in requests])
        allow = _concatenate([request.allow for request in requests])
        ranking = self.ranker.rank(
            rows,
            event_features=event_features,
            seen=_concatenate([request.seen for request in requests]),
            top_k=np.concatenate([request.top_k for request in requests]),
            exclude_seen=np.concatenate([request.exclude_seen for request in requests]),
            exclude=exclude if exclude.shape[1] else None,
            allow=allow if allow.shape[1] else None,
            rules=[rules for request in requests for rules in request.rules],
        )
        ids = self.transform.wire_ids_of(ranking.rows)  # [batch, largest k of the batch]
        version = np.array([[self.catalogue_version.encode()]], object)
        responses: list[Arrays] = []
        for start, size, request in zip(np.cumsum([0, *sizes]), sizes, requests, strict=False):
            sessions = slice(start, start + size)  # of this request
            # A request gets its own largest k, not that of the requests it was batched with
            best = ranking.rows[sessions, : min(int(request.top_k.max()), ranking.rows.shape[1])]
            own_features = {name: values[sessions] for name, values in event_features.items()}
            responses.append(
                {
                    "item_id": ids[sessions, : best.shape[1]],
                    "score": ranking.scores[sessions, : best.shape[1]],
                    "n_items": ranking.n_items[sessions, None],
                    "n_unknown": ranking.n_unknown[sessions, None],
                    "fallback": ranking.fallback[sessions, None],
                    "n_passed": ranking.n_passed[sessions, None],
                    "catalogue_version": np.repeat(version, size, axis=0),
                    **self._explain(rows[sessions], best, request.reasons, own_features),
                }
            )
        return responses

    def _listed_rows(self, request: Arrays, name: str, n_sessions: int) -> Ints:
        """Return the rows of the ids that a request lists under ``name``, [batch, any], 0-padded."""
        if name not in request:
            return np.zeros((n_sessions, 0), np.int64)
        ids = _matrix(request, name, n_sessions, self.transform.wire_ids.dtype.kind)
        return np.where(self.transform.is_missing(ids), PADDING_ROW, self.transform.look_up(ids))

    def _explain(self, rows: Ints, best: Ints, requested: Bools, event_features: EventArrays) -> dict[str, AnyArray]:
        """Return the explanations of the recommended items ``best`` [batch, k] of those sessions that request them."""
        if not requested.any():  # width 0: writing unused empty strings into tensors takes time
            no_items = (len(best), 0)
            return {
                "reason_item": np.empty(no_items, self.transform.wire_ids.dtype),
                "reason_modality": np.empty(no_items, object),
            }
        from missrec_t4r.retrieval.explain import reasons

        item, modality = np.zeros_like(best), np.full(best.shape, b"", object)  # [batch, k]
        for index in np.flatnonzero(requested):
            items = best[index][best[index] > PADDING_ROW]
            features = {name: values[index : index + 1] for name, values in event_features.items()}
            item[index, : len(items)], leading = reasons(self.ranker, rows[index : index + 1], items, features)
            # Without a leading session item these are fallback items, which no modality explains
            modality[index, : len(items)] = self._modalities[leading] if item[index].any() else b""
        return {"reason_item": self.transform.wire_ids_of(item), "reason_modality": modality}


def _attempt(function: Callable[[T], R], request: T | MISSRecError) -> R | MISSRecError:
    """Return ``function(request)``; any exception becomes the error of this request alone, and an error stays one."""
    if isinstance(request, MISSRecError):
        return request
    try:
        return function(request)
    except MISSRecError as error:
        return error
    except Exception as error:
        clear_frames(error.__traceback__)  # the tensors of a failed attempt would stay in memory until the answer
        found = f"a request that cannot be processed ({type(error).__name__}: {str(error)[:_LONGEST_ERROR]})"
        failed = FailedError(found, "the tensors of triton_models/README.md", "send it with a client of this package")
        failed.__cause__ = error
        return failed


def _of_valid(
    function: Callable[[list[T]], Sequence[R | MISSRecError]], requests: Sequence[T | MISSRecError]
) -> list[R | MISSRecError]:
    """Return the results of one call for the requests that are valid, and the errors of the others in their places."""
    results = iter(function([request for request in requests if not isinstance(request, MISSRecError)]))
    return [request if isinstance(request, MISSRecError) else next(results) for request in requests]


def _matrix(request: Arrays, name: str, n_sessions: int, kind: str = "i") -> AnyArray:
    tensor = request[name]
    if tensor.ndim != 2 or len(tensor) != n_sessions or tensor.dtype.kind != kind:
        raise _wrong_tensor(name, tensor, n_sessions)
    if tensor.shape[1] > LONGEST_SESSION:
        found = f"{name} of {tensor.shape[1]} ids per session"
        raise ServingError(found, f"at most {LONGEST_SESSION}", "send the most recent ones")
    return tensor


def _per_session(request: Arrays, name: str, n_sessions: int, default: int | bool) -> AnyArray:
    if name not in request:
        return np.full(n_sessions, default)
    tensor = request[name]
    if tensor.size != n_sessions or tensor.dtype.kind != ("b" if isinstance(default, bool) else "i"):
        raise _wrong_tensor(name, tensor, n_sessions)
    return tensor.reshape(-1)


def _texts(request: Arrays, name: str, n_sessions: int) -> list[bytes]:
    texts: list[bytes] = request[name].reshape(-1).tolist()
    if len(texts) != n_sessions or not all(isinstance(text, (bytes, str)) for text in texts):
        raise _wrong_tensor(name, request[name], n_sessions)
    return texts


def _wrong_tensor(name: str, tensor: AnyArray, n_sessions: int) -> ServingError:
    return ServingError(
        f"{name} holds {tensor.dtype} of shape {list(tensor.shape)} for {n_sessions} sessions",
        "see triton_models/README.md",
    )


def _concatenate(matrices: Sequence[Ints]) -> Ints:
    """Stack [batch, width] matrices of different width along the batch, 0-padded on the right."""
    if len(matrices) == 1:
        return matrices[0]
    stacked = np.full((sum(map(len, matrices)), max(matrix.shape[1] for matrix in matrices)), PADDING_ROW, np.int64)
    start = 0
    for matrix in matrices:
        stacked[start : start + len(matrix), : matrix.shape[1]] = matrix
        start += len(matrix)
    return stacked


Backend = SessionsBackend | RankerBackend
"""One of the two Triton models."""
Observer = Callable[[Sequence[Response], Sequence[Response]], None]
"""Callback for metrics: gets the inputs of every request of a batch and its outputs, or the error in their place."""


def execute(backend: Backend, requests: Sequence[Any], pb_utils: Any, observe: Observer | None = None) -> list[Any]:
    """Run a backend on Triton's requests.

    Parameters
    ----------
    backend : Backend
    requests : sequence of pb_utils.InferenceRequest
        What the dynamic batcher collected.
    pb_utils : module
        Triton's ``triton_python_backend_utils``, which exists inside the server only.
    observe : callable, optional

    Returns
    -------
    list of pb_utils.InferenceResponse
        One per request, in order.
    """

    def inputs(request: Any) -> Arrays:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in backend.inputs}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    def response_of(arrays: Arrays) -> Any:
        return pb_utils.InferenceResponse([pb_utils.Tensor(*pair) for pair in arrays.items()])

    arrays = [_attempt(inputs, request) for request in requests]
    outputs = _of_valid(backend.infer, arrays)
    answers = [_attempt(response_of, tensors) for tensors in outputs]
    if observe is not None:
        sent = [error if isinstance(error, MISSRecError) else tensors for error, tensors in zip(answers, outputs)]
        try:
            observe(arrays, sent)
        except Exception:  # counting must not cost the answers
            log.exception("the metrics of a batch were not counted")
    return [_triton_error(answer, pb_utils) if isinstance(answer, MISSRecError) else answer for answer in answers]


def _triton_error(error: MISSRecError, pb_utils: Any) -> Any:
    message = str(error)[:_LONGEST_REFUSAL].encode("utf-8", "backslashreplace").decode()  # no lone surrogates
    kinds = pb_utils.TritonError
    status = kinds.INTERNAL if isinstance(error, FailedError) else kinds.INVALID_ARG
    return pb_utils.InferenceResponse(error=kinds(message, status))


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
    """Return torch's name of the device that Triton assigned to this instance."""
    import torch

    if args["model_instance_kind"] != "GPU":
        return "cpu"
    if not torch.cuda.is_available():
        log.warning(
            f"Triton assigned GPU {args['model_instance_device_id']}, but torch {torch.__version__} finds none: this "
            "instance serves on the CPU; install torch for CUDA, or set KIND_CPU in config.pbtxt"
        )
        return "cpu"
    torch.cuda.set_device(int(args["model_instance_device_id"]))  # nothing of this process takes memory of another one
    return f"cuda:{args['model_instance_device_id']}"
