"""The playground over HTTP, and in a real browser where one is installed."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from missrec_t4r.errors import BundleError, DataError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.playground.app import CatalogueView, Playground, playground
from missrec_t4r.serving.triton.deployment import bundle_of, served_bundle
from missrec_t4r.serving.triton.local_server import LocalTriton

pytestmark = pytest.mark.triton
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def pictured(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The shop with pictures of some items, one of which points out of the folder."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("playground")
    (folder / "images").mkdir()
    items = pq.read_table(bundle / "items.parquet")
    names: list[str | None] = [f"{place}.png" if place % 2 else None for place in range(items.num_rows)]
    names[4], names[6] = "../secret.png", "gone.png"
    Image.new("RGB", (8, 8), "red").save(folder / "secret.png")
    for place, name in enumerate(names):
        if name == f"{place}.png":
            Image.new("RGB", (96, 96), f"hsl({place * 12}, 60%, 55%)").save(folder / "images" / name)
    kinds = pa.array([("lamp", "desk", "rug")[place % 3] for place in range(items.num_rows)])
    items = items.append_column("image", pa.array(names)).append_column("kind", kinds)
    pq.write_table(items, folder / "items.parquet")
    shutil.copy(bundle / "catalogue.safetensors", folder)  # the table's rows are compared with it
    return folder, folder / "images"


@pytest.fixture(scope="module")
def page(server: LocalTriton, pictured: tuple[Path, Path]) -> Iterator[Playground]:
    with MISSRecClient(server.grpc_url) as client, Playground(client, CatalogueView(*pictured)) as running:
        yield running


def test_titles_may_have_another_column_name(pictured: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copy(pictured[0] / "catalogue.safetensors", tmp_path)
    items = pq.read_table(pictured[0] / "items.parquet")
    renamed = items.rename_columns(["Name" if name == "title" else name for name in items.column_names])
    pq.write_table(renamed, tmp_path / "items.parquet")
    view = CatalogueView(tmp_path)
    assert view.describe(0)["title"] == "Ware 0"
    assert "Name" not in view.facets


def ask(page: Playground, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(page.url.removeprefix("http://"), timeout=10)
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, content, headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_page_gets_the_servers_answers_with_titles_pictures_and_reasons(page: Playground) -> None:
    status, _, body = ask(page, "/api/recommend", {"items": ["ware-3-ü"], "top_k": 4, "exclude_seen": True})
    answer = json.loads(body)
    expected = page.client.recommend([["ware-3-ü"]], 4, exclude_seen=True, reasons=True)[0]
    assert status == 200
    assert [line["item"]["id"] for line in answer["recommendations"]] == expected.item_ids
    assert [line["because_of"] for line in answer["recommendations"]] == ["ware-3-ü"] * 4
    assert all(line["item"]["title"].startswith("Ware ") for line in answer["recommendations"])
    assert answer["catalogue_version"] == expected.catalogue_version


def test_search_pages_and_facets(page: Playground) -> None:
    found = json.loads(ask(page, "/api/items?search=ware%2012")[2])
    assert {item["title"] for item in found["items"]} >= {"Ware 12"}
    assert all("12" in f"{item['title']} {item['id']}" for item in found["items"])
    assert json.loads(ask(page, "/api/items?offset=29")[2])["items"][0]["id"] in page.catalogue.ids
    facets = json.loads(ask(page, "/api/shop")[2])["facets"]
    assert facets["kind"] == ["desk", "lamp", "rug"]
    assert not {"image", "title", "item_id", "train_count"} & set(facets)


def test_pictures_are_served_from_their_folder_alone(page: Playground) -> None:
    status, headers, body = ask(page, "/picture/1")
    assert (status, headers["Content-Type"], body[:4]) == (200, "image/png", b"\x89PNG")
    for path in ("/picture/4", "/picture/6", "/picture/0", "/picture/-1", "/picture/999", "/../items.parquet", "/x"):
        assert ask(page, path)[0] == 404
    assert ask(page, "/picture/x")[0] == 400


def test_strange_requests_get_an_error_each_and_the_page_stays_up(page: Playground) -> None:
    for body in (
        b"{",
        b"[]",
        b'{"items": 3}',
        b"{}",
        b'{"items": [], "top_k": "x"}',
        b'{"items": [], "rules": {"x": 1}}',
        b'{"items": [], "top_k": 1e999}',
        b'{"items": [], "top_k": 101}',
        b'{"items": ' + b"[" * 100_000,
    ):
        status, _, answer = ask(page, "/api/recommend", body)
        assert status == 400
        assert json.loads(answer)["error"]
    assert ask(page, "/api/recommend", b"x", **{"Content-Length": "9999999"})[0] == 413
    for length in ("-1", "x", "٣"):
        assert ask(page, "/api/recommend", b"x", **{"Content-Length": length.encode()})[0] == 400
    assert ask(page, "/api/recommend", b"1", **{"Transfer-Encoding": "chunked"})[0] == 400
    assert ask(page, "/", Host="evil.example")[0] == 403
    status, headers, body = ask(page, "/")
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert b"src=" not in body.replace(b"image.src", b"")  # nothing is fetched from anywhere
    assert b"innerHTML" not in body


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="holds no items.parquet; expected: a bundle folder"):
        playground(tmp_path)


def test_the_page_of_a_deployment_folder_has_the_titles_of_its_version(exported: Path, tmp_path: Path) -> None:
    deploy(tmp_path / "live", bundle=exported / "bundle")
    assert served_bundle(tmp_path / "live") == bundle_of(tmp_path / "live", 1)
    assert served_bundle(exported / "bundle") == exported / "bundle"


def test_no_folder_no_pictures(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures"):
        CatalogueView(bundle, tmp_path)
    assert CatalogueView(bundle).describe(0)["picture"] is None


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_clicks_change_the_recommendations_in_a_browser(page: Playground, tmp_path: Path) -> None:
    with headless(page.url, tmp_path) as port:
        seen = asyncio.run(clicked(port, Path(os.environ.get("MISSREC_SCREENSHOTS", str(tmp_path)))))
    assert len(seen["popular"]) == 10
    assert seen["first"] != seen["popular"]
    assert seen["second"] != seen["first"]
    assert seen["chips"] == 2
    assert "because of Ware" in seen["why"]
    assert seen["long titles whole"] == [True, True]
    brands = dict(zip(page.catalogue.ids, page.catalogue.items["brand"].to_pylist(), strict=True))
    assert {brands[item] for item in seen["branded"]} == {page.catalogue.facets["brand"][0]}
    assert seen["filtered"] == []
    assert "the catalogue has no column 'kind'" in seen["note"]  # this server's does not; the page says what it says
    assert "top 101; expected: 1 to 100 items" in seen["too many"]
    total, shown = seen["found"]
    assert total == f"{shown} items"  # of the last search alone


class headless:  # noqa: N801  # reads as what it is
    """A browser on a page, with its remote control on a free port."""

    def __init__(self, url: str, folder: Path) -> None:
        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1360,980",
            "--remote-debugging-port=0",
        ]
        self._profile = folder / "profile"
        self._command = [str(BROWSER), *options, "--no-proxy-server", f"--user-data-dir={self._profile}", url]

    def __enter__(self) -> int:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, deadline = self._profile / "DevToolsActivePort", time.monotonic() + 30
        while not file.is_file() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.3)
        return int(file.read_text().splitlines()[0])

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()


async def clicked(port: int, shots: Path) -> dict[str, Any]:
    import aiohttp

    async with aiohttp.ClientSession() as web:
        async with web.get(f"http://127.0.0.1:{port}/json") as pages:
            target = next(one for one in await pages.json() if one["type"] == "page")
        async with web.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as wire:

            async def call(method: str, **params: Any) -> dict[str, Any]:
                await wire.send_json({"id": 1, "method": method, "params": params})
                while (answer := await wire.receive_json()).get("id") != 1:
                    pass
                return answer["result"]

            async def value(code: str) -> Any:
                found = await call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
                return found["result"].get("value")

            async def answered(number: int) -> list[str]:
                for _ in range(150):
                    if int(await value("document.body.dataset.ready || 0") or 0) >= number:
                        break
                    await asyncio.sleep(0.1)
                return await value("[...document.querySelectorAll('#answer li')].map(line => line.dataset.id)")

            seen: dict[str, Any] = {"popular": await answered(1)}
            await value("document.querySelectorAll('#items .item')[3].click()")
            seen["first"] = await answered(2)
            await value("document.querySelectorAll('#answer li')[2].click()")
            seen["second"] = await answered(3)
            seen["chips"] = await value("document.querySelectorAll('.chip').length")
            seen["why"] = await value("document.querySelector('#answer .why').textContent")
            shot = await call("Page.captureScreenshot", format="png")
            (shots / "playground.png").write_bytes(base64.b64decode(shot["data"]))
            fits = "title.scrollWidth <= title.clientWidth && title.scrollHeight <= title.clientHeight"
            text = "title.textContent = 'Long words '.repeat(20) + 'unbroken'.repeat(30)"
            titles = "[document.querySelector('#items .title'), document.querySelector('#answer .name')]"
            seen["long titles whole"] = await value(f"{titles}.map(title => {{ {text}; return {fits}; }})")
            await value("$('column').value = 'brand'; $('column').onchange()")
            seen["branded"] = await answered(4)
            await value("$('column').value = 'kind'; $('column').onchange()")
            seen["filtered"] = await answered(5)
            seen["note"] = await value("document.getElementById('note').textContent")
            await value("$('column').value = ''; $('k').value = 101; $('column').onchange()")
            await answered(6)
            seen["too many"] = await value("document.getElementById('note').textContent")
            typed = "['1', '12'].forEach(words => { $('search').value = words; $('search').oninput(); })"
            await value(typed)
            number = "$('items').children.length"
            seen["found"] = await value(
                f"new Promise(done => setTimeout(() => done([$('count').textContent, {number}]), 2000))"
            )
            return seen
