"""Context manager: an existing bundle, or a temporary one exported from a run."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from missrec_t4r.bundle.bundle import fill_bundle
from missrec_t4r.errors import ConfigError
from missrec_t4r.runs.run_folder import load_run

log = logging.getLogger(__name__)


@contextmanager
def bundle_or_run(bundle: str | Path | None, run: str | Path | None) -> Iterator[Path]:
    """Yield the folder of a bundle; a temporary one is removed at the end.

    Parameters
    ----------
    bundle : path, optional
        Existing bundle.
    run : path, optional
        Run folder of `missrec train`, which is exported to a temporary bundle.

    Raises
    ------
    ConfigError
        Both or neither are given.
    """
    if (bundle is None) == (run is None):
        given = "neither --bundle nor --run" if bundle is None else "both --bundle and --run"
        raise ConfigError(given, "one of the two", "a bundle comes from `missrec export`, a run from `missrec train`")
    if bundle is not None:
        yield Path(bundle)
        return
    assert run is not None
    loaded = load_run(run)
    with tempfile.TemporaryDirectory(prefix="missrec-bundle-") as folder:
        log.info(f"reading the run {run}")
        fill_bundle(
            Path(folder), model=loaded.model, catalogue=loaded.catalogue, data=loaded.data, n_trained=loaded.n_trained
        )
        yield Path(folder)
