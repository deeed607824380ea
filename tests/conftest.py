"""What all tests share: markers that skip with a reason, the place of real data, settings that Merlin needs early."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read by the libraries when they are imported, hence before any test module: the same values as in the Makefile.
os.environ.setdefault("DASK_DATAFRAME__QUERY_PLANNING", "False")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# GPUs are hidden: trainings that choose their device would take one, where no two of them are equal to the bit.
os.environ.update({} if os.environ.get("MISSREC_TEST_GPU") == "1" else {"CUDA_VISIBLE_DEVICES": ""})

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // WORKERS))  # the workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # the processes that tests start as well

LONGEST = [
    "workflows/test_gpu_partitions.py",
    "integration/test_tutorial_page.py",
    "serving/test_deploy.py",
    "examples/test_notebooks.py",
    "project/test_compose.py",
    "workflows/test_delta.py",
    "integration/test_grid.py",
    "serving/test_updates_live.py",
    "integration/test_gpu_check.py",
    "contract/test_trainer.py",
    "serving/test_merlin_systems.py",
    "serving/test_local_triton.py",
    "integration/test_main_job.py",
    "serving/test_tune_serving.py",
    "project/test_site.py",
    "workflows/test_workflow_files.py",
    "ddp/test_two_processes.py",
    "tuning/test_tune_train.py",
    "project/test_wheel.py",
    "evaluation/test_protocols.py",
]
"""Files of half a minute and more, which begin first: a worker that began one last would end long after the others."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "gpu": None if torch.cuda.is_available() else "needs a CUDA device, and MISSREC_TEST_GPU=1",
        "ddp": None if torch.distributed.is_available() else "this torch is built without torch.distributed",
        "triton": None if importlib.util.find_spec("pytriton") else "needs nvidia-pytriton: pip install -e '.[triton]'",
        "slow": None if config.getoption("--slow") else "takes more than a minute: pytest --slow",
    }
    places = {REPOSITORY / "tests" / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def documents_script(repository: Path) -> Callable[[str], Any]:
    """Import a script of ``docs/``, which is no package, by its name."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, repository / "docs" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: ``MISSREC_DATA``, or ``shared/data`` beside the checkout."""
    folder = Path(os.environ.get("MISSREC_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; MISSREC_DATA names their folder")
    return folder
