"""`missrec playground`: a page where a person clicks items and sees titles, pictures, scores and reasons change.

A small web server on the loopback interface between the page (one self-contained file) and a running Triton. It reads
titles and attributes of the bundle's item table, pictures of a folder if there is one, and answers nothing else.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import logging
import mimetypes
import threading
import time
from collections.abc import Callable
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pyarrow as pa

from missrec_t4r.bundle.item_table import load_items
from missrec_t4r.errors import DataError, MISSRecError, ServingError
from missrec_t4r.schema import ITEM_ID, TRAIN_COUNT
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.client.protocol import typed_id
from missrec_t4r.serving.triton.ports import LOOPBACK

log = logging.getLogger(__name__)

_PAGE_ITEMS = 60
_LONGEST_BODY = 1 << 20
_MOST_VALUES = 40
"""A column of at most so many different values can be filtered by on the page."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self'; connect-src 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

Reply = tuple[int, str, bytes]
"""Status, content type and body."""


class Shop:
    """What the page shows of a catalogue.

    Parameters
    ----------
    bundle : Path
        Its item table.
    images : Path, optional
        Folder of the pictures.
    image_column : str
        Column with a picture's file name, relative to the folder.
    """

    def __init__(self, bundle: Path, images: Path | None = None, image_column: str = "image") -> None:
        self.items = load_items(bundle)
        self._shown = {ITEM_ID, TRAIN_COUNT, "title", image_column}
        self.ids: list[str | int] = self.items[ITEM_ID].to_pylist()
        self._place = {item: place for place, item in enumerate(self.ids)}
        names = self.items.column_names
        self._titles = [str(title or "") for title in self.items["title"].to_pylist()] if "title" in names else []
        self._images = None if images is None else images.resolve()
        if images is not None and (not images.is_dir() or image_column not in names):
            raise DataError(
                f"no pictures: {images} with column {image_column!r}", "a folder, and a column of file names in it"
            )
        self._files = self.items[image_column].to_pylist() if images is not None else []

    def describe(self, place: int) -> dict[str, Any]:
        """Return one item as the page shows it."""
        title = self._titles[place] if self._titles else ""
        picture = f"/picture/{place}" if self.picture(place) is not None else None
        return {"id": self.ids[place], "title": title, "picture": picture}

    def of_id(self, item: str | int) -> dict[str, Any]:
        """Return an item by its raw id; one that the item table lacks is its id alone."""
        place = self._place.get(item)
        return {"id": item, "title": "", "picture": None} if place is None else self.describe(place)

    def found(self, search: str, offset: int) -> dict[str, Any]:
        """Return a page of the items whose title or id contains the words; the popular first."""
        words = search.casefold().split()
        places = [p for p in self._by_popularity if not words or all(word in self._text(p) for word in words)]
        return {"total": len(places), "items": [self.describe(p) for p in places[offset : offset + _PAGE_ITEMS]]}

    def picture(self, place: int) -> Path | None:
        """Return the file of an item's picture; nothing outside the folder, and only pictures."""
        if self._images is None or not 0 <= place < len(self._files) or not self._files[place]:
            return None
        file = (self._images / str(self._files[place])).resolve()
        kind = mimetypes.guess_type(file.name)[0] or ""
        inside = file.is_relative_to(self._images) and kind.startswith("image/") and kind != "image/svg+xml"
        return file if inside and file.is_file() else None

    @cached_property
    def facets(self) -> dict[str, list[Any]]:
        """Columns with few different values, and these."""
        found = {}
        for field in self.items.schema:
            simple = (
                pa.types.is_string(field.type) or pa.types.is_boolean(field.type) or pa.types.is_integer(field.type)
            )
            if simple and field.name not in self._shown:
                values = self.items[field.name].unique().drop_null().to_pylist()
                if 1 < len(values) <= _MOST_VALUES:
                    found[field.name] = sorted(values)
        return found

    @cached_property
    def _by_popularity(self) -> list[int]:
        counts = self.items[TRAIN_COUNT].to_pylist()
        return sorted(range(len(self.ids)), key=lambda place: -counts[place])

    def _text(self, place: int) -> str:
        return f"{self._titles[place] if self._titles else ''} {self.ids[place]}".casefold()


class Playground:
    """The page's server; runs while the ``with`` block does.

    Parameters
    ----------
    client : MISSRecClient
        Shared by threads: gRPC, or of a bundle.
    shop : Shop
    port : int
        0 takes a free one.
    """

    def __init__(self, client: MISSRecClient, shop: Shop, port: int = 0) -> None:
        self.client, self.shop = client, shop
        self._page = importlib.resources.files("missrec_t4r.serving.playground").joinpath("page.html").read_bytes()
        self._server = _listen(self.reply, port)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{LOOPBACK}:{self._server.server_address[1]}"

    def __enter__(self) -> Playground:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, method: str, target: str, body: bytes) -> Reply:
        """Answer one request of the page."""
        parts = urlsplit(target)
        try:
            if method == "POST" and parts.path == "/api/recommend":
                return _json(self.recommend(json.loads(body)))
            if method == "GET":
                return self._get(parts.path, {name: values[-1] for name, values in parse_qs(parts.query).items()})
        except MISSRecError as error:
            return _json({"error": str(error)}, 400)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return _json({"error": f"the page's request cannot be read ({error})"}, 400)
        return _json({"error": "nothing here"}, 404)

    def recommend(self, question: dict[str, Any]) -> dict[str, Any]:
        """Ask the server for the page's session, with reasons."""
        session = [typed_id(item, self.client.id_type) for item in question["items"]]
        started = time.perf_counter()
        (answer,) = self.client.recommend(
            [session],
            min(int(question.get("top_k", 10)), 100),
            exclude_seen=bool(question.get("exclude_seen")),
            rules=question.get("rules"),
            reasons=True,
        )
        elapsed = (time.perf_counter() - started) * 1e3
        ids: list[Any] = list(answer.item_ids)
        lines: list[dict[str, Any]] = [
            {"item": self.shop.of_id(item), "score": score} for item, score in zip(ids, answer.scores, strict=True)
        ]
        for line, reason in zip(lines, answer.reasons, strict=False):
            line |= {"because_of": reason.item_id, "modality": reason.modality}
        return {
            "recommendations": lines,
            "fallback": answer.fallback,
            "n_passed": answer.n_passed,
            "catalogue_version": answer.catalogue_version,
            "milliseconds": elapsed,
        }

    def _get(self, path: str, query: dict[str, str]) -> Reply:
        if path == "/":
            return 200, "text/html; charset=utf-8", self._page
        if path == "/api/shop":
            return _json({"total": len(self.shop.ids), "facets": self.shop.facets})
        if path == "/api/items":
            return _json(self.shop.found(query.get("search", ""), max(0, int(query.get("offset", 0)))))
        if path.startswith("/picture/"):
            file = self.shop.picture(int(path.removeprefix("/picture/")))
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
        Bundle of the served model, for titles and attributes.
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
    started = time.monotonic()
    shop = Shop(Path(bundle), None if images is None else Path(images), image_column)
    with MISSRecClient(url) as client, Playground(client, shop, port) as page:
        log.info(f"open {page.url} ({len(shop.ids)} items of {client.url}, ids are {client.id_type}); Ctrl-C stops")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
    return {"url": page.url, "seconds": round(time.monotonic() - started, 1)}


def _json(content: dict[str, Any], status: int = 200) -> Reply:
    return status, "application/json", json.dumps(content).encode()


def _listen(reply: Callable[[str, str, bytes], Reply], port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            own = {f"{host}:{self.server.server_address[1]}" for host in (LOOPBACK, "localhost")}  # type: ignore[index]  # an internet address
            if length > _LONGEST_BODY:
                status, kind, body = _json({"error": f"a request of {length} bytes"}, 413)
                self.close_connection = True
            elif self.headers.get("Host") not in own:  # a page of another site that found this port
                status, kind, body = _json({"error": "another host's request"}, 403)
            else:
                status, kind, body = reply(self.command, self.path, self.rfile.read(length))
            self.send_response(status)
            for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ServingError(f"port {port} cannot be used ({error})", "a free port", "choose another --port") from error
