"""The small shop on disk, and the two loaders that feed it to a T4R model."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HAS_T4R = importlib.util.find_spec("transformers4rec") is not None
collect_ignore_glob = [] if HAS_T4R else ["test_*.py"]  # the integration needs the extra `merlin`
if HAS_T4R:
    import missrec_t4r.t4r  # noqa: F401  # before any test imports Merlin: it sets what dask must find


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder as ``missrec etl`` writes it."""
    from merlin.schema.io.tensorflow_metadata import TensorflowMetadata

    from tests.contract import shop

    folder = tmp_path_factory.mktemp("shop")
    for seed, (split, count) in enumerate({"train": 96, "valid": 33, "test": 17}.items()):
        shop.write_sessions(folder / split, shop.sessions(count, seed))
    TensorflowMetadata.from_merlin_schema(shop.schema()).to_proto_text_file(str(folder))
    shop.catalogue().save(folder / "catalogue")
    return folder


@pytest.fixture(scope="session")
def loader() -> Callable[..., Any]:
    """Make a loader: ``loader("merlin" or "missrec", folder, schema, batch_size=…, shuffle=…)``."""
    from merlin.io import Dataset
    from transformers4rec.torch.utils.data_utils import T4RecDataLoader

    from tests.contract import shop

    def make(engine: str, folder: Path, schema: Any, *, width: int = 10, **settings: Any) -> Any:
        path: Any = str(folder / "part_0.parquet")
        source = Dataset(path, schema=schema) if engine == "merlin" else path
        longest = width if engine == "merlin" else shop.MAX_LENGTH
        return T4RecDataLoader.parse(engine).from_schema(schema, source, max_sequence_length=longest, **settings)

    return make
