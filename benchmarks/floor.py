"""Run the core's tests in this environment and record its versions: the oldest and the newest ones that work.

    make test-floor      # Python 3.10 and requirements/floor.txt, the lower bounds of pyproject.toml
    make test-newest     # Python 3.13 and the newest releases of the same packages

The core is everything but NVTabular's workflows and the Transformers4Rec objects.
Exit code 1 if a test failed; counts, reasons of skipped tests and versions go to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import torch

from benchmarks.measure import write_result

ROOT = Path(__file__).resolve().parents[1]
SUITES = """
    tests/equations tests/properties tests/unit tests/evaluation tests/recipes tests/event_features tests/pretraining
    tests/serving tests/integration tests/earlier_version tests/recommender
""".split()
"""What needs neither Merlin nor pytriton as a whole; single tests of these that do are skipped with their reason."""
PACKAGES = "torch numpy pandas scikit-learn pillow pyarrow safetensors tritonclient protobuf typer rich pyyaml".split()
PACKAGES += ["pytest", "hypothesis"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="floor", help="of the result file")
    parser.add_argument("--jobs", type=int, default=1, help="test processes at once")
    parser.add_argument("suites", nargs="*", default=SUITES, help="folders and files of tests")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        workers = ["-n", str(options.jobs), "--dist=loadfile"] if options.jobs > 1 else []
        pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-pno:cacheprovider", f"--junitxml={file}"]
        done = subprocess.run([*pytest, *workers, *options.suites], cwd=ROOT, check=False)
        if not file.is_file():
            raise SystemExit(f"pytest wrote no results; exit code {done.returncode}")
        cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [found for case in cases if (found := case.find("skipped")) is not None]
    counts = {"passed": len(cases) - len(failed) - len(skipped), "failed": len(failed), "skipped": len(skipped)}
    path = write_result(
        options.name,
        {
            "suites": options.suites,
            "packages": {name: metadata.version(name) for name in PACKAGES},
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            **counts,
            "failing": [f"{case.get('classname')}::{case.get('name')}" for case in failed],
            "skipped_because": dict(collections.Counter(str(found.get("message")) for found in skipped)),
            "seconds": round(time.monotonic() - started),
        },
    )
    print(json.dumps({**counts, "result": path.name}))
    if done.returncode:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
