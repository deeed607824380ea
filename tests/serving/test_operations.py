"""Metrics of a real server, and a dashboard and alerts that use no other metric."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from missrec_t4r.errors import ServingError
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.metrics import COUNTERS, COVERAGE, FLUSH_SECONDS, GAUGES
from tests.project.packages import ROOT
from tests.serving.conftest import serving

pytestmark = pytest.mark.triton
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "missrec.json"


def page(server: LocalTriton) -> dict[str, float]:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(server.metrics_url) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


def settled(server: LocalTriton, changed: str = "", since: float = 0.0) -> dict[str, float]:
    """Metrics once ``changed`` exceeds ``since`` and the counters are stable (flushed after the response)."""
    pages: list[dict[str, float]] = [{}]

    def still() -> bool:
        pages.append(page(server))
        counters = [{name: total(one, name) for name in COUNTERS} for one in pages[-2:]]
        return counters[0] == counters[1] and (not changed or total(pages[-1], changed) > since)

    eventually(still, every=4 * FLUSH_SECONDS)
    return pages[-1]


def eventually(check: Callable[[], bool], seconds: float = 30.0, every: float = 0.05) -> None:
    """Wait until ``check`` is true: metrics are written after the response, later on a busy machine."""
    until = time.monotonic() + seconds
    while not check() and time.monotonic() < until:
        time.sleep(every)


def total(metrics: dict[str, float], name: str) -> float:
    return sum(value for key, value in metrics.items() if re.fullmatch(rf"{name}(\{{.*)?", key))


def test_every_metric_counts_what_it_says(server: LocalTriton) -> None:
    unknown = "missrec_unknown_items_total"
    so_far = total(page(server), unknown)
    with MISSRecClient(server.grpc_url) as client:
        client.recommend([["gone"]] * 500)  # what other tests have asked of this server is counted before these
        before = settled(server, unknown, so_far + 499)
        client.recommend([["ware-3-ü", "gone"], []], 4)
        client.recommend([["ware-4-ü"]], 50, exclude=["ware-5-ü"], rules={"where": {"train_count": {"min": 1}}})
        with pytest.raises(ServingError, match="no column 'colour'"):
            client.recommend([["ware-4-ü"]], rules={"where": {"colour": "red"}})
        passed = client.recommend([["ware-4-ü"]], 50, exclude=["ware-5-ü"])[0].n_passed
    after = settled(
        server, "missrec_candidates_passed_total", total(before, "missrec_candidates_passed_total") + 2 * 30 + passed
    )
    grown = {name: total(after, name) - total(before, name) for name in COUNTERS}
    assert grown["missrec_sessions_total"] == 4
    assert grown["missrec_session_items_total"] == 4
    assert grown["missrec_unknown_items_total"] == 1
    assert grown["missrec_fallbacks_total"] == 1
    assert grown["missrec_rejected_total"] == 1
    assert grown["missrec_filtered_sessions_total"] == 2
    assert grown["missrec_candidates_total"] == 4 * 30
    assert grown["missrec_short_responses_total"] == 2
    assert passed == 29
    assert 2 * 30 + passed < grown["missrec_candidates_passed_total"] < grown["missrec_candidates_total"]
    assert total(after, "missrec_catalogue_items") == 30
    assert {name for name in GAUGES if total(after, name) > 0} == set(GAUGES)
    coverage = {key: value for key, value in after.items() if key.startswith(COVERAGE)}
    assert sorted(round(value, 3) for value in coverage.values()) == [0.667, 1.0]
    assert all('modality="' in key and 'catalogue="' in key for key in coverage)


def logged(server: LocalTriton, event: str) -> list[dict[str, Any]]:
    text = server.log_file.read_text(errors="replace")
    written = re.findall(r'"(\{\\"event\\".*\})"', text)  # Triton quotes a message, and escapes what is in it
    return [line for line in (json.loads(json.loads(f'"{found}"')) for found in written) if line["event"] == event]


def test_refused_requests_and_loaded_models_are_structured_log_lines(server: LocalTriton) -> None:
    with MISSRecClient(server.grpc_url) as client, pytest.raises(ServingError):
        client.recommend([["ware-4-ü"]], rules={"where": {"weight": 3}})
    assert logged(server, "loaded")[0]["missrec_catalogue_items"] == 30
    eventually(lambda: any("'weight'" in line["reason"] for line in logged(server, "rejected")))
    assert any("'weight'" in line["reason"] for line in logged(server, "rejected"))


def asked_for(expression: str) -> set[str]:
    without_labels = re.sub(r"\{[^}]*\}|\[[^\]]*\]|by \([^)]*\)", "", expression)
    return set(re.findall(r"\b(?:nv|missrec)_\w+", without_labels))


def test_dashboard_and_alerts_ask_for_metrics_that_the_server_has(server: LocalTriton) -> None:
    with MISSRecClient(server.grpc_url) as client:
        client.recommend([["ware-3-ü"]])
    known = {key.partition("{")[0] for key in settled(server)}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())
    expressions += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    wanted = set().union(*map(asked_for, expressions))
    assert wanted - known == set()
    assert set(COUNTERS) | {"missrec_catalogue_written_seconds", COVERAGE} <= wanted  # and shows all that is counted
    assert all(expression.count("(") == expression.count(")") for expression in expressions)


def growth(pages: tuple[dict[str, float], dict[str, float]], selector: str) -> float:
    """What the counters of a PromQL selector grew by between two pages."""
    name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})?", selector).groups(default="")  # type: ignore[union-attr]
    wanted = re.findall(r'(\w+)(=~|=)"([^"]*)"', labels)

    def fits(key: str) -> bool:
        own = dict(re.findall(r'(\w+)="([^"]*)"', key))
        return key.partition("{")[0] == name and all(
            re.fullmatch(value if kind == "=~" else re.escape(value), own.get(label, ""))
            for label, kind, value in wanted
        )

    first, last = (sum(value for key, value in page.items() if fits(key)) for page in pages)
    return last - first


def fires(alert: str, before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether an alert on sums of rates is true of what happened between two pages of the server's metrics."""
    groups = yaml.safe_load((ROOT / "docker" / "prometheus" / "alerts.yml").read_text())["groups"]
    (expression,) = (rule["expr"] for group in groups for rule in group["rules"] if rule["alert"] == alert)
    number = re.compile(r"sum\(rate\(([^\[]+)\[5m\]\)\)")
    return bool(eval(number.sub(lambda found: str(growth((before, after), found[1])), expression)))


def test_the_alert_of_failing_requests_counts_the_servers_failures_alone(exported: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(exported / "repository", models)
    with (models / "missrec_ranker" / "1" / "model.py").open("a") as file:  # a fault in the code, in every answer of 7
        file.write(
            "def rank(self, requests, whole=RankerBackend._rank):\n"
            "    assert all((request.top_k != 7).all() for request in requests)\n"
            "    return whole(self, requests)\n"
            "RankerBackend._rank = rank\n"
        )
    for server in serving(models):
        with MISSRecClient(server.grpc_url) as client:
            client.recommend([["ware-3-ü"]])
            calm = settled(server)
            with pytest.raises(ServingError, match="no column 'colour'"):
                client.recommend([["ware-3-ü"]], rules={"where": {"colour": "red"}})
            with pytest.raises(ServingError, match="at most 65536"):
                client.recommend([["ware-3-ü"] * 70_000])
            mistakes = settled(server, "missrec_rejected_total", 1)
            assert growth((calm, mistakes), "nv_inference_request_failure") > 0  # Triton makes no difference
            assert growth((calm, mistakes), "missrec_rejected_total") == 2
            assert not fires("RequestsFail", calm, mistakes)

            with pytest.raises(ServingError, match="AssertionError"):
                client.recommend([["ware-3-ü"]], 7)
            broken = settled(server, "missrec_failed_total")
            assert growth((mistakes, broken), "missrec_failed_total") == 1
            assert fires("RequestsFail", mistakes, broken)
            assert any("AssertionError" in line["traceback"] for line in logged(server, "failed"))

            os.kill(process_of(server, "missrec_ranker"), signal.SIGKILL)
            with pytest.raises(ServingError):
                client.recommend([["ware-3-ü"]])
            assert fires("RequestsFail", broken, settled(server, "nv_inference_request_failure", 4))


def process_of(server: LocalTriton, model: str) -> int:
    """The process of a Python model."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == server.pid and any(f"/{model}/".encode() in word for word in words):
                return int(folder.name)
    raise AssertionError(f"{model} has no process")


def test_the_dashboard_is_provisioned() -> None:
    folder = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "missrec.yaml").read_text())["providers"]
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert len({panel["id"] for panel in panels}) == len(panels)
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    mounts = {volume.split(":")[1]: Path(volume.split(":")[0]) for volume in services["grafana"]["volumes"]}
    assert (ROOT / mounts[provider["options"]["path"]] / "missrec.json").is_file()
    prometheus = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    (target,) = prometheus["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "inference:8002"
    assert source["url"] == "http://prometheus:9090"
