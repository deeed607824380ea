"""Check Prometheus with Compose's configuration on a real server: targets, rules, all expressions of the dashboard.

    apt-get install prometheus
    python -m benchmarks.reliability.monitoring --bundle work/demo/shop/bundle

Two values of the configuration are replaced: the server's address and the path of the rules. Under load every
expression of the Grafana dashboard must return finite numbers and every rule must be evaluated; when the server stops,
the target must be down and `ServerDown` pending. Ends with one JSON line, and exit code 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import run_as_command
from missrec_t4r.serving.client.client import MISSRecClient
from missrec_t4r.serving.deploy.blue_green import deploy
from missrec_t4r.serving.deploy.smoke_test import sample_sessions
from missrec_t4r.serving.triton.local_server import LocalTriton
from missrec_t4r.serving.triton.ports import LOOPBACK, choose_ports

DOCKER = Path(__file__).parents[2] / "docker"
_WAIT = 30.0


def run(bundle: Path, *, seconds: float) -> dict[str, Any]:
    """Start both, query, stop the server, and return the findings."""
    with tempfile.TemporaryDirectory() as folder:
        work, port = Path(folder), choose_ports({"prometheus": 0})["prometheus"]
        deploy(work / "live", bundle=bundle)
        server = LocalTriton(work / "live")
        with server:
            prometheus = _start(work, port, server.metrics_url.split("/")[2])
            try:
                result = _under_load(server, bundle, port, seconds)
                server.stop()
                _until(lambda: _targets(port) == ["down"])
                down = _until(lambda: "ServerDown" in _alerts(port))
            finally:
                prometheus.terminate()
                prometheus.wait()
    return result | {"down_is_noticed": down}


def _start(work: Path, port: int, target: str) -> subprocess.Popen[bytes]:
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("no prometheus on PATH: apt-get install prometheus")
    text = (DOCKER / "prometheus" / "prometheus.yml").read_text()
    rules = str(DOCKER / "prometheus" / "alerts.yml")
    (work / "prometheus.yml").write_text(
        text.replace("inference:8002", target).replace("/etc/prometheus/alerts.yml", rules)
    )
    command = [binary, f"--config.file={work / 'prometheus.yml'}", f"--storage.tsdb.path={work / 'tsdb'}"]
    with (work / "prometheus.log").open("wb") as log:
        return subprocess.Popen([*command, f"--web.listen-address={LOOPBACK}:{port}"], stdout=log, stderr=log)


def _under_load(server: LocalTriton, bundle: Path, port: int, seconds: float) -> dict[str, Any]:
    stop, sessions = threading.Event(), sample_sessions(bundle)

    def send_requests() -> None:
        with MISSRecClient(server.grpc_url, timeout=60) as client:
            while not stop.wait(0.05):
                client.recommend(sessions[:8], 10, exclude_seen=True)

    client = threading.Thread(target=send_requests)
    client.start()
    try:
        up = _until(lambda: _targets(port) == ["up"])
        time.sleep(seconds)
        dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "missrec.json").read_text())
        expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
        values = {expression: _query(port, expression) for expression in expressions}
        rules = [rule for group in _get(port, "rules")["groups"] for rule in group["rules"]]
    finally:
        stop.set()
        client.join()
    empty = [expression for expression, found in values.items() if not found or not all(map(math.isfinite, found))]
    return {
        "target_up": up,
        "expressions": len(expressions),
        "without_data": empty,
        "values": {expression: found[0] for expression, found in values.items() if found},
        "rules": len(rules),
        "rules_not_evaluated": [rule["name"] for rule in rules if rule["health"] != "ok"],
        "firing_under_load": [rule["name"] for rule in rules if rule["state"] == "firing"],
    }


def _get(port: int, path: str, **parameters: str) -> Any:
    url = f"http://{LOOPBACK}:{port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy leads to this machine
    with direct.open(url, timeout=10) as answer:
        return json.load(answer)["data"]


def _query(port: int, expression: str) -> list[float]:
    return [float(one["value"][1]) for one in _get(port, "query", query=expression)["result"]]


def _targets(port: int) -> list[str]:
    try:
        return [target["health"] for target in _get(port, "targets")["activeTargets"]]
    except OSError:  # Prometheus is starting
        return []


def _alerts(port: int) -> set[str]:
    return {alert["labels"]["alertname"] for alert in _get(port, "alerts")["alerts"]}


def _until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _WAIT
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Monitor the embedded server and print the findings as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=45, help="of load: rates need several scrapes, one in 10 s")
    chosen = parser.parse_args(arguments)
    result = run(chosen.bundle, seconds=chosen.seconds)
    print(json.dumps(result))
    wrong = result["without_data"] or result["rules_not_evaluated"]
    return 0 if result["target_up"] and result["down_is_noticed"] and not wrong else 1


if __name__ == "__main__":
    run_as_command(main)
