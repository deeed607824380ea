"""Metrics of a real server, and a dashboard and alerts that use no other metric."""

from __future__ import annotations

import json
import re
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
    before = settled(server)
    with MISSRecClient(server.grpc_url) as client:
        client.recommend([["ware-3-ü", "gone"], []], 4)
        client.recommend([["ware-4-ü"]], 50, exclude=["ware-5-ü"], rules={"where": {"train_count": {"min": 1}}})
        with pytest.raises(ServingError, match="no column 'colour'"):
            client.recommend([["ware-4-ü"]], rules={"where": {"colour": "red"}})
        passed = client.recommend([["ware-4-ü"]], 50, exclude=["ware-5-ü"])[0].n_passed
    after = settled(server, "missrec_passed_total", total(before, "missrec_passed_total") + 2 * 30 + passed)
    grown = {name: total(after, name) - total(before, name) for name in COUNTERS}
    assert grown["missrec_sessions_total"] == 4
    assert grown["missrec_items_asked_total"] == 4
    assert grown["missrec_unknown_items_total"] == 1
    assert grown["missrec_fallbacks_total"] == 1
    assert grown["missrec_rejected_total"] == 1
    assert grown["missrec_ruled_sessions_total"] == 2
    assert grown["missrec_candidates_total"] == 4 * 30
    assert grown["missrec_short_answers_total"] == 2
    assert passed == 29
    assert 2 * 30 + passed < grown["missrec_passed_total"] < grown["missrec_candidates_total"]
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
