"""What `missrec deploy`, `rollback`, `shadow`, `playground`, `bundle verify` and `bundle merlin` do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def deploy(repository: Path, **options: Any) -> dict[str, Any]:
    """Bring a bundle behind the door; options as in `missrec_t4r.serving.deploy.blue_green.deploy`."""
    from missrec_t4r.serving.deploy.blue_green import deploy as run

    return run(repository, **options)


def rollback(repository: Path, **options: Any) -> dict[str, Any]:
    """Let an earlier version answer again; options as in `missrec_t4r.serving.deploy.blue_green.rollback`."""
    from missrec_t4r.serving.deploy.blue_green import rollback as run

    return run(repository, **options)


def shadow(url: str | None, candidate: str, **options: Any) -> dict[str, Any]:
    """Mirror a share of the traffic to a candidate; options as in `missrec_t4r.serving.shadow.http_proxy.shadow`."""
    from missrec_t4r.serving.shadow.http_proxy import shadow as run

    return run(url, candidate, **options)


def playground(url: str, bundle: Path, **options: Any) -> dict[str, Any]:
    """Serve a page to try a server out; options as in `missrec_t4r.serving.playground.app.playground`."""
    from missrec_t4r.serving.playground.app import playground as run

    return run(url, bundle, **options)


def verify(bundle: Path) -> dict[str, Any]:
    """Check a bundle as a server does before it answers: every byte, what each file holds, and that the parts fit."""
    from missrec_t4r.bundle.bundle import load_bundle
    from missrec_t4r.bundle.manifest import catalogue_version, verify_bundle

    manifest = verify_bundle(bundle)
    loaded = load_bundle(bundle)
    return {
        "bundle": str(bundle),
        "files": len(manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"].values()),
        "items": loaded.catalogue.n_items,
        "modalities": list(loaded.catalogue.modalities),
        "catalogue_version": catalogue_version(manifest),
    }


def merlin(bundle: Path, data: Path, out: Path, *, top_k: int = 10) -> dict[str, Any]:
    """Write a classic Merlin Systems ensemble; see `missrec_t4r.export.merlin_systems`."""
    from missrec_t4r.etl.nvt.serialization import load_workflow
    from missrec_t4r.export.merlin_systems import export_merlin

    return export_merlin(bundle, load_workflow(data / "request_workflow"), out, top_k=top_k)
