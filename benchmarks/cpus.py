"""Run the tests that compare floats with the kernels of other processors (torch, oneDNN and MKL, by instruction set).

    python -m benchmarks.cpus [--jobs 2]

Three environment variables limit the libraries' kernels to an older instruction set. Each is set alone and some are
combined, with one thread and with two. Exit code 1 if a test failed; the table goes to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.measure import write_result

ROOT = Path(__file__).resolve().parents[1]
SUITES = """
    tests/contract/test_t4r_expects.py tests/contract/test_target_swap.py
    tests/contract/test_trainer.py::test_a_saved_model_scores_bit_for_bit
    tests/contract/test_trainer.py::test_core_and_t4r_model_share_event_features
    tests/contract/test_trainer.py::test_core_and_t4r_model_share_weights_scores_and_loss
    tests/equations
    tests/evaluation/test_baselines.py tests/evaluation/test_evaluate.py tests/evaluation/test_full_ranking.py
    tests/evaluation/test_metrics.py tests/evaluation/test_model_scorer.py tests/evaluation/test_slices.py
    tests/properties
    tests/event_features/test_module.py
    tests/unit/test_faithful_regulariser.py tests/unit/test_nearest.py tests/unit/test_training_softmax.py
    tests/serving/test_bundle.py tests/serving/test_folded.py tests/serving/test_large_catalogues.py
    tests/serving/test_added_items.py tests/serving/test_ranker.py tests/serving/test_retrieval.py
    tests/serving/test_traced.py tests/serving/test_updates.py
""".split()
"""What compares floats in its own process, without long trainings; serving is last, as it sets one thread."""

VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
KERNELS: tuple[tuple[str | None, str | None, str | None], ...] = (
    ("default", "SSE41", "SSE4_2"),
    ("avx2", "AVX2", "AVX2"),
    ("avx512", "AVX512_CORE", None),
    ("default", None, None),
    ("avx2", None, None),
    ("avx512", None, None),
    (None, "SSE41", None),
    (None, "AVX2", None),
    (None, "AVX512_CORE", None),
    (None, None, "SSE4_2"),
    (None, None, "AVX2"),
)
"""Values of `VARIABLES`; None leaves a variable unset, so that the library takes the best of the processor."""

THREADS = (1, 2)


def has_avx512() -> bool:
    """Return whether this processor supports AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def run_suites(suites: Sequence[str], kernels: Sequence[str | None], threads: int) -> dict[str, Any]:
    """Run the suites in a process of their own.

    Parameters
    ----------
    suites : sequence of str
        Folders, files and tests, from the checkout's root.
    kernels : sequence of str or None
        Values of `VARIABLES`.
    threads : int
        For OpenMP and MKL.

    Returns
    -------
    dict
        The setting, passed, failed and skipped tests, the ids of the failed ones, pytest's exit code, seconds.
    """
    setting = dict(zip(VARIABLES, kernels, strict=True))
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {name: value for name, value in setting.items() if value is not None}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        pytest = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-pno:cacheprovider", f"--junitxml={file}"]
        done = subprocess.run([*pytest, *suites], cwd=ROOT, env=environment, capture_output=True, text=True)
        if not file.is_file():
            raise SystemExit(f"pytest wrote no results:\n{done.stdout}{done.stderr}")
        cases = list(ElementTree.parse(file).iter("testcase"))
    failed = [_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    if failed:
        print(done.stdout, file=sys.stderr)
    return {
        **setting,
        "threads": threads,
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failing": failed,
        "exit_code": done.returncode,
        "seconds": round(time.monotonic() - started),
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table."""
    columns = (*VARIABLES, "threads", "passed", "failed", "skipped")
    lines = [columns, ("---",) * len(columns)]
    lines += [tuple("-" if run[column] is None else str(run[column]) for column in columns) for run in runs]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="test processes at once")
    options = parser.parse_args()
    avx512 = has_avx512()
    chosen = [kernels for kernels in KERNELS if avx512 or not {"avx512", "AVX512_CORE"} & set(kernels)]
    settings = [(kernels, threads) for kernels in chosen for threads in THREADS]
    runs: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for run in pool.map(lambda setting: run_suites(SUITES, *setting), settings):
            runs.append(run)
            words = " ".join(run[variable] or "-" for variable in VARIABLES)
            counts = f"{run['passed']} passed, {run['failed']} failed, {run['skipped']} skipped, {run['seconds']} s"
            print(f"{len(runs)}/{len(settings)} {words}, {run['threads']} threads: {counts}", flush=True)
    path = write_result("cpus", {"suites": SUITES, "avx512": avx512, "runs": runs})
    print(table(runs))
    print(json.dumps({"runs": len(runs), "failed": sum(run["failed"] for run in runs), "result": path.name}))
    if any(run["exit_code"] for run in runs):
        raise SystemExit(1)


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


if __name__ == "__main__":
    main()
