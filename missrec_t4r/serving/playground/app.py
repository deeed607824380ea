"""`missrec playground`: a demo page on which clicks on items change recommendations, scores and explanations.

A small web server on the loopback interface, between the page (one self-contained file) and a running Triton. Titles
and attributes come from the bundle's item table, images from a folder if there is one; it serves nothing else.
"""

from __future__ import annotations

import importlib.resources
import json
import logging
import mimetypes
import time
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa

from missrec_t4r.bundle.item_table import load_items
from missrec_t4r.config.checks import require_at_least
from missrec_t4r.data.titles import title_column_of
from missrec_t4r.errors import DataError, MISSRecError
from missrec_t4r.schema import ITEM_ID, TRAIN_COUNT
from missrec_t4r.serving.client.client import MISSRecClient, read_titles
from missrec_t4r.serving.client.protocol import typed_id
from missrec_t4r.serving.http_server import HttpServer, read_body
from missrec_t4r.serving.stop_signals import UntilStopped
from missrec_t4r.serving.triton.deployment import served_bundle
from missrec_t4r.serving.triton.ports import LOOPBACK

log = logging.getLogger(__name__)

_PAGE_ITEMS = 60
"""Items of one search result page."""
_LONGEST_BODY = 1 << 20
"""Bytes of a request."""
_MOST_FACET_VALUES = 40
"""Most distinct values of a column that the page offers as a filter."""
_MOST_RECOMMENDATIONS = 100
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Reply = tuple[int, str, bytes]
"""Status, content type and body."""


class CatalogueView:
    """Titles, images and filter values of a catalogue.

    Parameters
    ----------
    bundle : Path
        Bundle with the item table.
    images : Path, optional
        Folder of the images.
    image_column : str
        Column with an image's file name, relative to the folder.
    """

    def __init__(self, bundle: Path, images: Path | None = None, image_column: str = "image") -> None:
        self.items = load_items(bundle)
        self._titles = read_titles(bundle)
        self._not_facets = {ITEM_ID, TRAIN_COUNT, title_column_of(bundle, self.items.column_names), image_column}
        self.ids: list[str | int] = self.items[ITEM_ID].to_pylist()
        self._index = {item: index for index, item in enumerate(self.ids)}
        self._images = None if images is None else images.resolve()
        if images is not None and (not images.is_dir() or image_column not in self.items.column_names):
            there = "" if images.is_dir() else f"{images} is not a folder"
            there = there or f"{bundle} has no column {image_column!r}"
            raise DataError(f"no pictures: {there}", "a folder of pictures, and a column of their file names")
        self._files = self.items[image_column].to_pylist() if images is not None else []

    def describe(self, index: int) -> dict[str, Any]:
        """Return the id, title and image path of an item by its row of the item table."""
        picture = f"/picture/{index}" if self.picture(index) is not None else None
        return {"id": self.ids[index], "title": self._titles.get(self.ids[index], ""), "picture": picture}

    def of_id(self, item: str | int) -> dict[str, Any]:
        """Return an item by its raw id; without title and image if the item table lacks it."""
        index = self._index.get(item)
        return {"id": item, "title": "", "picture": None} if index is None else self.describe(index)

    def search(self, query: str, offset: int) -> dict[str, Any]:
        """Return one page of the items whose title or id contains all words, by descending popularity."""
        words = query.casefold().split()
        matches = [i for i in self._by_popularity if not words or all(word in self._text(i) for word in words)]
        return {"total": len(matches), "items": [self.describe(i) for i in matches[offset : offset + _PAGE_ITEMS]]}

    def picture(self, index: int) -> Path | None:
        """Return the image file of an item, None for a file outside the folder or of another kind."""
        if self._images is None or not 0 <= index < len(self._files) or not self._files[index]:
            return None
        file = (self._images / str(self._files[index])).resolve()
        kind = mimetypes.guess_type(file.name)[0] or ""
        inside = file.is_relative_to(self._images) and kind.startswith("image/") and kind != "image/svg+xml"
        return file if inside and file.is_file() else None

    @cached_property
    def facets(self) -> dict[str, list[Any]]:
        """Columns with few distinct values, and the values."""
        facets = {}
        for field in self.items.schema:
            simple = (
                pa.types.is_string(field.type) or pa.types.is_boolean(field.type) or pa.types.is_integer(field.type)
            )
            if simple and field.name not in self._not_facets:
                values = self.items[field.name].unique().drop_null().to_pylist()
                if 1 < len(values) <= _MOST_FACET_VALUES:
                    facets[field.name] = sorted(values)
        return facets

    @cached_property
    def _by_popularity(self) -> list[int]:
        counts = self.items[TRAIN_COUNT].to_pylist()
        return sorted(range(len(self.ids)), key=lambda index: -counts[index])

    def _text(self, index: int) -> str:
        item = self.ids[index]
        return f"{self._titles.get(item, '')} {item}".casefold()


class Playground(HttpServer):
    """Web server of the page; runs while the ``with`` block does.

    Parameters
    ----------
    client : MISSRecClient
        Shared by threads: over gRPC, or of a bundle.
    catalogue : CatalogueView
    port : int
        0 chooses a free one.
    """

    def __init__(self, client: MISSRecClient, catalogue: CatalogueView, port: int = 0) -> None:
        self.client, self.catalogue = client, catalogue
        self._page = importlib.resources.files("missrec_t4r.serving.playground").joinpath("page.html").read_bytes()
        super().__init__(port, self._respond)

    @property
    def url(self) -> str:
        """URL of the page."""
        return f"http://{self.address}"

    def reply(self, method: str, target: str, body: bytes) -> Reply:
        """Return the response to one request of the page."""
        parts = urlsplit(target)
        try:
            if method == "POST" and parts.path == "/api/recommend":
                return _json(self.recommend(json.loads(body)))
            if method == "GET":
                return self._get(parts.path, {name: values[-1] for name, values in parse_qs(parts.query).items()})
        except MISSRecError as error:
            return _json({"error": str(error)}, 400)
        except Exception as error:  # whatever a request holds is its own error
            return _json({"error": f"the page's request cannot be parsed ({type(error).__name__}: {error})"[:500]}, 400)
        return _json({"error": "nothing here"}, 404)

    def recommend(self, request: dict[str, Any]) -> dict[str, Any]:
        """Request recommendations with explanations for the page's session."""
        session = [typed_id(item, self.client.id_type) for item in request["items"]]
        top_k = int(request.get("top_k", 10))
        if not 1 <= top_k <= _MOST_RECOMMENDATIONS:
            raise DataError(f"top {top_k}", f"1 to {_MOST_RECOMMENDATIONS} items on this page")
        started = time.perf_counter()
        (result,) = self.client.recommend(
            [session],
            top_k,
            exclude_seen=bool(request.get("exclude_seen")),
            rules=request.get("rules"),
            reasons=True,
        )
        milliseconds = (time.perf_counter() - started) * 1e3
        ids: list[Any] = list(result.item_ids)
        recommendations: list[dict[str, Any]] = [
            {"item": self.catalogue.of_id(item), "score": score} for item, score in zip(ids, result.scores, strict=True)
        ]
        for recommendation, reason in zip(recommendations, result.reasons, strict=False):  # a fallback has no reasons
            recommendation |= {"because_of": reason.item_id, "modality": reason.modality}
        return {
            "recommendations": recommendations,
            "fallback": result.fallback,
            "n_passed": result.n_passed,
            "catalogue_version": result.catalogue_version,
            "milliseconds": milliseconds,
        }

    def _respond(self, request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        own_hosts = {f"{host}:{self.server_address[1]}" for host in (LOOPBACK, "localhost")}
        if request.headers.get("Host") not in own_hosts:  # DNS rebinding by another site's page
            status, kind, body = _json({"error": "another host's request"}, 403)
        else:
            status, kind, body = self.reply(request.command, request.path, read_body(request, _LONGEST_BODY))
        return status, {**_HEADERS, "Content-Type": kind}, body

    def _get(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/":
            return 200, "text/html; charset=utf-8", self._page
        if path == "/api/shop":
            return _json({"total": len(self.catalogue.ids), "facets": self.catalogue.facets})
        if path == "/api/items":
            return _json(self.catalogue.search(query.get("search", ""), max(0, int(query.get("offset", 0)))))
        if path.startswith("/picture/"):
            file = self.catalogue.picture(int(path.removeprefix("/picture/")))
            if file is not None:
                return 200, mimetypes.guess_type(file.name)[0] or "application/octet-stream", file.read_bytes()
        return _json({"error": "nothing here"}, 404)


def playground(
    bundle: str | Path,
    *,
    url: str = "localhost:8001",
    images: str | Path | None = None,
    image_column: str = "image",
    port: int = 8020,
) -> dict[str, Any]:
    """Serve a demo page on which clicks on items change recommendations, scores and explanations, until Ctrl-C.

    Parameters
    ----------
    bundle : path
        Bundle of the served model, or its deployment folder, for titles and attributes.
    url : str
        gRPC address of the server.
    images : path, optional
        Folder of the item images.
    image_column : str
        Column with the file name of the item's image.
    port : int
        Port of the page; 0 takes a free one.

    Returns
    -------
    dict
        ``url`` and the seconds served.
    """
    require_at_least(0, port=port)
    started = time.monotonic()
    catalogue = CatalogueView(served_bundle(Path(bundle)), None if images is None else Path(images), image_column)
    with MISSRecClient(url) as client, Playground(client, catalogue, port) as page, UntilStopped():
        log.info(
            f"open {page.url} ({len(catalogue.ids)} items of {client.url}, ids are {client.id_type}); Ctrl-C stops"
        )
        while True:
            time.sleep(1)
    return {"url": page.url, "seconds": round(time.monotonic() - started, 1)}


def _json(content: dict[str, Any], status: int = 200) -> Reply:
    return status, "application/json", json.dumps(content).encode()
