"""`Recommender`: train, evaluate, recommend, update and serve in Python.

Every method calls a function of `missrec_t4r.commands`, so that a notebook gives the numbers of a pipeline;
`Recommender.commands` lists the command lines.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from missrec_t4r import commands
from missrec_t4r.bundle.manifest import MANIFEST_FILE, verify_bundle
from missrec_t4r.commands.in_python import named_in_python
from missrec_t4r.config.recipe import AUTO
from missrec_t4r.errors import BundleError, ConfigError, SchemaError
from missrec_t4r.io.atomic import atomic_write_dir
from missrec_t4r.io.hashing import file_digest
from missrec_t4r.progress import reporting
from missrec_t4r.recommender.evaluation import Evaluation
from missrec_t4r.recommender.folders import BUNDLE, MODELS, RUN, describe, shown
from missrec_t4r.recommender.frames import Frame, arrays_of, arrow_table, index_hint, plain
from missrec_t4r.recommender.shop import Shop, command_line, temporary_folder
from missrec_t4r.runs.run_folder import RUN_FILE
from missrec_t4r.schema import ITEM_ID
from missrec_t4r.serving.batch.score import event_feature_names
from missrec_t4r.serving.batch.similar import SimilarItems
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.triton.repository import write_repository

if TYPE_CHECKING:
    from missrec_t4r.serving.triton.local_server import LocalTriton


class Recommender:
    """A recommender for one shop.

    Parameters
    ----------
    recipe : str or path
        As in ``missrec train``: ``"auto"`` chooses for the shop and the device, `result` then holds ``chosen``.
    folder : path, optional
        Where run and bundle are kept; that of the shop, in ``models/<recipe>``, by default.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    **settings
        Settings that override the recipe, with ``__`` for the dot: ``train__epochs=10``, ``model__d_model=128``.

    Examples
    --------
    >>> shop = Shop.from_frames(events, items, text=["title"])                                   # doctest: +SKIP
    >>> model = Recommender().fit(shop)                                                          # doctest: +SKIP
    >>> model.recommend(users=["u1", "u2"], k=10)                                                # doctest: +SKIP
    """

    def __init__(
        self,
        recipe: str | Path = AUTO,
        *,
        folder: str | Path | None = None,
        device: str = "auto",
        **settings: Any,
    ) -> None:
        if not isinstance(recipe, str | Path):
            raise ConfigError(
                f"recipe of type {type(recipe).__name__}",
                "a name or the path of a recipe",
                "settings are arguments: Recommender(train__epochs=3)",
            )
        self.recipe, self.device = recipe, device
        self.settings = {name.replace("__", ".", 1): value for name, value in settings.items()}
        self.folder = self._given_folder = None if folder is None else Path(folder).absolute()
        self.shop: Shop | None = None
        self.commands: list[str] = []
        self.result: dict[str, Any] = {}
        """What training returned, as ``missrec train --json`` prints it."""
        self._bundle: Path | None = None
        self._digests: dict[Path, str] = {}
        self._opened: tuple[MISSRecClient, dict[Any, str], list[str]] | None = None
        self._similar: SimilarItems | None = None

    def fit(self, shop: Shop, *, restart: bool = False, recount: bool = False) -> Recommender:
        """Train on a shop, and compare the bundle that is served with the trained model; returns self.

        An interrupted training is resumed by the next call with the same folder; a finished one of the same data,
        settings and code is taken as it is. Items of an earlier `add_items` that the shop lacks are left out.

        Parameters
        ----------
        shop : Shop
        restart : bool
            Train from the start, in place of the model with other settings that the folder holds.
        recount : bool
            As in ``missrec export``: recommendations count the last events of every user too, which training leaves to
            validation and test. `evaluate` measures the model without them.

        Raises
        ------
        MISSRecError
            As ``missrec train`` and ``missrec export`` raise it.
        """
        if not isinstance(shop, Shop):
            raise ConfigError(
                f"fit on a {type(shop).__name__}", "a Shop", "make one with Shop.from_frames(events, items, ...)"
            )
        folder = self._given_folder or shop.folder / MODELS / Path(self.recipe).stem
        training = {"data": shop.data, "out": folder / RUN, "recipe": self.recipe, "settings": self.settings}
        export = {"run": folder / RUN, "out": folder / BUNDLE, "recount": recount}
        with reporting(messages=False):
            try:
                self.result = commands.train(**training, device=self.device, resume=not restart, reuse=True)
            except ConfigError as error:
                if "resume=False" not in error.cure:
                    raise
                cure = "fit(shop, restart=True) replaces it; Recommender(folder=...) keeps both"
                raise ConfigError(error.found, error.expected, cure) from error
            commands.export(**export)
        self.folder, self.shop = folder, shop
        device = None if self.device == "auto" else self.device
        lines = [command_line("train", training | {"device": device}), command_line("export", export)]
        self.commands = [*shop.commands, *lines]
        self._use(folder / BUNDLE)
        return self

    def evaluate(
        self,
        shop: Shop | str | Path | None = None,
        *,
        split: str = "test",
        baselines: Sequence[str] | str | bool = True,
    ) -> Evaluation:
        """Rank the whole catalogue for every session of a split, beside the baselines.

        Parameters
        ----------
        shop : Shop or its folder, optional
            That of `fit` by default.
        split : {"test", "valid"}
        baselines : bool, or sequence of str
            Baselines to tune and rank beside: True for popularity, item-kNN and content-kNN, or their names; ``sasrec``
            is trained first.
        """
        run = self._run()
        data = (self._shop() if shop is None else _shop_of(shop)).data
        with reporting(messages=False):
            report = commands.evaluate(run, split=split, data=data, baselines=baselines)
        return Evaluation(report)

    def recommend(
        self,
        users: Sequence[Any] | None = None,
        sessions: Sequence[Sequence[Any]] | None = None,
        *,
        k: int = 10,
        exclude_seen: bool = True,
        where: Mapping[str, Any] | None = None,
        at_most: Mapping[str, int] | None = None,
        exclude: Sequence[Any] | None = None,
    ) -> pd.DataFrame:
        """Recommend the next items.

        Parameters
        ----------
        users : sequence of user ids, optional
            Of the shop that the model was fitted on; all their events count, with their event features.
        sessions : sequence of sequences of item ids, optional
            In place of users: items, oldest first; their event features count as missing.
        k : int
            Items per user or session.
        exclude_seen : bool
            Leave out the items of the session.
        where : mapping, optional
            Filters over the item table's columns: ``{"in_stock": True, "price": {"max": 20}}``; bounds may be dates.
        at_most : mapping of str to int, optional
            How many recommended items may share a value of a column: ``{"brand": 2}``.
        exclude : sequence of item ids, optional
            Never recommend these.

        Returns
        -------
        DataFrame
            One row per recommended item: ``user`` (or ``session``, from 0), ``item``, ``title`` where the item table
            has one, ``score``, ``rank`` from 1, and ``reason``: the item of the session that contributed most.
        """
        if (users is None) == (sessions is None):
            raise ConfigError(
                "neither users nor sessions" if users is None else "both users and sessions",
                "one of them",
                'write recommend(users=["u1"]) or recommend(sessions=[["P1", "P7"]])',
            )
        client, titles, feature_names = self._open()
        k = _whole(k)
        event_features: list[dict[str, list[Any]]] = []
        if users is not None:
            kind, owners = "user", _ids_of(users)
            histories, event_features = self._shop().histories(owners, feature_names)
        else:
            histories = _histories_of(sessions)
            kind, owners = "session", list(range(len(histories)))
        rules = {"where": _columns("where", where), "at_most": _columns("at_most", at_most)}
        answers = client.recommend(
            histories,
            k,
            exclude_seen=exclude_seen,
            exclude=None if exclude is None else _plain(exclude if _is_list(exclude) else [exclude]),
            rules={name: columns for name, columns in rules.items() if columns} or None,
            reasons=True,
            side=event_features if any(event_features) else None,
        )
        rows: list[tuple[Any, ...]] = []
        for owner, answer in zip(owners, answers, strict=True):
            reasons = [f"{reason.item_id} ({reason.modality})" for reason in answer.reasons]
            reasons = reasons or ["popular" if answer.fallback else ""] * len(answer.item_ids)
            for rank, (item, score) in enumerate(zip(answer.item_ids, answer.scores, strict=True)):
                rows.append((owner, item, titles.get(item), score, rank + 1, reasons[rank]))
        frame = pd.DataFrame(rows, columns=[kind, "item", "title", "score", "rank", "reason"])
        return frame if titles else frame.drop(columns="title")

    def similar(self, item: Any, k: int = 10, *, by: str = "session") -> pd.DataFrame:
        """Return the items most similar to one: ``item``, ``score`` and ``title`` where there is one.

        Parameters
        ----------
        item : item id
        k : int
        by : {"session", "content"}
            What people go on to, or what has similar content.
        """
        bundle = self._bundle_of()
        self._similar = self._similar or SimilarItems(bundle)
        similar = named_in_python(self._similar.of)(_plain([item]), _whole(k), by)
        return pd.DataFrame(next(iter(similar.values()))).rename(columns={ITEM_ID: "item"})

    def add_items(self, items: Frame, *, vectors: Mapping[str, npt.ArrayLike] | None = None) -> dict[str, Any]:
        """Add, change and retire items of the bundle without training; its previous version is kept beside it.

        Parameters
        ----------
        items : DataFrame, Table or path
            Ids and any columns of the item table; existing items keep the values of columns that are left out.
            ``retired`` (bool) takes an item out of all recommendations.
        vectors : mapping of str to array [item, width], optional
            Vectors by modality, rows as in ``items``. By default the shop's encoders compute them from the texts and
            pictures; a shop of ``vectors`` has no encoders.

        Returns
        -------
        dict
            What changed, as ``missrec catalogue update`` returns it.
        """
        shop, bundle = self._shop(), self._bundle_of()
        names = (shop.columns["item"], ITEM_ID)
        table = arrow_table(items, "items", names)
        column = next((name for name in names if name in table.column_names), None)
        if column is None:
            found = f"items with columns {', '.join(table.column_names)}"
            raise SchemaError(found, f"a column {names[0]!r} of item ids", index_hint(items, names[0]))
        given = {"modality": arrays_of(vectors), "item_column": column}
        with reporting(messages=False):
            changed: dict[str, Any] = commands.catalogue_update(plain(table), bundle=bundle, data=shop.data, **given)
        self._use(bundle)
        return changed

    def save(self, folder: str | Path) -> Path:
        """Write the bundle, which `load`, ``missrec score`` and ``missrec deploy`` take; return its folder.

        Raises
        ------
        BundleError
            Something else is in the folder.
        """
        named_in_python(_copy_bundle, {"out": "folder"})(self._bundle_of(), Path(folder))
        return Path(folder)

    @classmethod
    def load(cls, bundle: str | Path, shop: Shop | str | Path | None = None) -> Recommender:
        """Open a bundle, all its files verified.

        Parameters
        ----------
        bundle : path
            Written by `save` or ``missrec export``.
        shop : Shop or its folder, optional
            For recommendations to its users, and to add items: the bundle itself is changed.

        Raises
        ------
        BundleError
            The folder is not a bundle, or a damaged one.
        """
        if not (Path(bundle) / MANIFEST_FILE).is_file():
            found, cure = describe(Path(bundle))
            raise BundleError(found, "a bundle of Recommender.save or `missrec export`", cure)
        verify_bundle(bundle)
        self = cls()
        self.shop = None if shop is None else _shop_of(shop)
        self._use(Path(bundle))
        return self

    def serve(self, **options: Any) -> LocalTriton:
        """Return a context manager that runs the embedded Triton server on this machine's loopback interface.

        Parameters
        ----------
        **options
            As for `LocalTriton`, such as ``grpc_port=8001``.

        Examples
        --------
        >>> with model.serve() as server, MISSRecClient(server.grpc_url) as client:              # doctest: +SKIP
        ...     client.recommend([["P00042"]])
        """
        from missrec_t4r.serving.triton.local_server import LocalTriton

        bundle = self._bundle_of()
        repository = (self.folder or temporary_folder("missrec-models-")) / MODELS
        write_repository(bundle, repository)
        return LocalTriton(repository, **options)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: folders and settings; the bundle is opened again where it is needed."""
        return self.__dict__ | {"_opened": None, "_similar": None}

    def __repr__(self) -> str:
        """Return recipe, validation metric and bundle; of a loaded model the bundle."""
        if self._bundle is None:
            return f"Recommender(recipe={str(self.recipe)!r}, not fitted)"
        if not self.result:
            return f"Recommender(bundle={shown(self._bundle)!r})"
        reached = self.result.get("score_terms", {}).get("valid_ndcg@10", self.result.get("valid_ndcg@10"))
        figure = "" if reached is None else f", validation NDCG@10 {reached:.4f}"
        return f"Recommender(recipe={str(self.recipe)!r}{figure}, bundle={shown(self._bundle)!r})"

    def _use(self, bundle: Path) -> None:
        if self._opened is not None:
            self._opened[0].close()
        self._bundle, self._opened, self._similar = bundle.absolute(), None, None
        files = [self._bundle / MANIFEST_FILE, *([] if self.folder is None else [self.folder / RUN / RUN_FILE])]
        self._digests = {file: file_digest(file) for file in files}

    def _bundle_of(self) -> Path:
        """Return the bundle, after a look whether another fit, update or export has replaced it or the run."""
        if self._bundle is None:
            raise ConfigError("a Recommender without a model", "a fitted or loaded one", "call fit(shop) first")
        for file, digest in self._digests.items():
            if not file.is_file() or file_digest(file) != digest:
                raise ConfigError(
                    f"{file.parent} was replaced or removed after this Recommender was fitted or loaded",
                    "the files of its own model",
                    f"open the present model with Recommender.load({shown(self._bundle)!r}, shop=shop); "
                    "Recommender(folder=...) keeps a second one apart",
                )
        return self._bundle

    def _open(self) -> tuple[MISSRecClient, dict[Any, str], list[str]]:
        """Return a client of the bundle, its titles and event features, in memory from the first call on."""
        if self._opened is None:
            bundle = self._bundle_of()
            client = MISSRecClient.of_bundle(bundle)
            self._opened = client, dict(read_titles(bundle)), event_feature_names(bundle)
        return self._opened

    def _shop(self) -> Shop:
        if self.shop is None:
            raise ConfigError(
                "a Recommender without a shop", "that of fit", "load it with Recommender.load(bundle, shop=shop)"
            )
        return self.shop

    def _run(self) -> Path:
        run = None if self.folder is None else self.folder / RUN
        if run is None or not (run / RUN_FILE).is_file():
            raise ConfigError(
                "a Recommender without a training run",
                "a fitted one: a bundle holds what serving needs, not the run",
                "call fit(shop), or `missrec evaluate --run RUN`",
            )
        self._bundle_of()
        return run


def _copy_bundle(bundle: Path, out: Path) -> None:
    with atomic_write_dir(out, MANIFEST_FILE, "bundle", BundleError) as temporary:
        shutil.copytree(bundle, temporary, dirs_exist_ok=True)


def _ids_of(users: Any) -> list[Any]:
    if not _is_list(users):
        raise ConfigError(f"users={users!r}", "a list of user ids", f"write users=[{users!r}]")
    return _listed(users)


def _histories_of(sessions: Any) -> list[list[Any]]:
    """Return sessions as lists; refuse a single one for a list, and sets, which have no order."""
    histories: list[Any] = _listed(sessions) if _is_list(sessions) else [None]
    if not all(_is_list(history) and not isinstance(history, Set | Mapping) for history in histories):
        raise ConfigError(
            f"sessions={sessions!r}"[:200],
            "a list of sessions, each a list of item ids, oldest first",
            'write sessions=[["P1", "P7"]]',
        )
    return [_plain(history) for history in histories]


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes)


def _columns(name: str, rule: Any) -> dict[str, Any]:
    if rule is not None and not isinstance(rule, Mapping):
        cure = f'write {name}={{"brand": ...}}'
        raise ConfigError(f"{name}={rule!r}", "a mapping of columns of the item table", cure)
    return {column: _plain_value(value) for column, value in (rule or {}).items()}


def _whole(k: Any) -> int:
    if not isinstance(k, int | float | np.number) or k != k // 1 or k < 1:
        raise ConfigError(f"k={k!r}", "a whole number of at least 1", "say how many items you want")
    return int(k)


def _listed(values: Any) -> list[Any]:
    """Return the values of a sequence, an array, a column or a tensor as a list."""
    if hasattr(values, "to_pylist"):  # of Arrow
        return list(values.to_pylist())
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _plain(values: Iterable[Any]) -> list[Any]:
    """Return values as a list, NumPy's scalars as Python's."""
    return [value.item() if isinstance(value, np.generic) else value for value in _listed(values)]


def _plain_value(value: Any) -> Any:
    """Return a filter's value, of a list or of bounds, with NumPy's scalars as Python's and dates as unix seconds."""
    if isinstance(value, Mapping):
        return {name: _plain_value(bound) for name, bound in value.items()}
    if isinstance(value, date | np.datetime64):
        if pd.isna(value):
            raise ConfigError("a missing date (NaT) in where", "a date", "leave the bound out")
        return int(pd.Timestamp(value).timestamp())
    return [_plain_value(entry) for entry in value] if _is_list(value) else _plain([value])[0]


def _shop_of(shop: Shop | str | Path) -> Shop:
    return Shop.open(shop) if isinstance(shop, str | Path) else shop
