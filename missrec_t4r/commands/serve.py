"""What `missrec export`, `serve`, `recommend` and `demo` do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from missrec_t4r.progress import Progress, quiet


def export(
    run: Path, out: Path, *, triton: Path | None = None, dry_run: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Write the serving bundle; see `missrec_t4r.export.export`."""
    from missrec_t4r.export.export import export as write

    return write(run, out, triton=triton, dry_run=dry_run, progress=progress)


def serve(repository: Path, **options: Any) -> dict[str, Any]:
    """Serve until interrupted; options as in `missrec_t4r.serving.triton.local_server.serve`."""
    from missrec_t4r.serving.triton.local_server import serve as run

    return run(repository, **options)


def recommend(url: str, items: Sequence[str | int], top_k: int = 10, **options: Any) -> dict[str, Any]:
    """Ask a running server; options as in `missrec_t4r.serving.client.client.recommend`."""
    from missrec_t4r.serving.client.client import recommend as ask

    return ask(url, items, top_k, **options)


def demo(data: Path | None, out: Path, **options: Any) -> dict[str, Any]:
    """Run the whole job; options as in `missrec_t4r.cli.demo.demo`."""
    from missrec_t4r.cli.demo import demo as run

    return run(data, out, **options)
