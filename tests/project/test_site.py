"""The documents build as a site without a warning: no dead link or anchor, no page left out, no broken API page."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None,
    reason="mkdocs-material and mkdocstrings belong to the default pins only (requirements/set-b.txt)",
)


@needs_mkdocs
def test_the_site_builds_strictly(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    settings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=repository, env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    front = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "missrec catalogue adopt" in front
    model = (tmp_path / "site/api/model.html").read_text(encoding="utf-8")
    assert "MISSRec" in model
    assert "InterestVocabulary" in model
    pages = [page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")]
    loaded = {
        url for page in pages for url in re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page)
    }
    assert loaded == set()


def test_pictures_are_small(repository: Path) -> None:
    pictures = [file for file in (repository / "docs").rglob("*") if file.suffix in {".svg", ".png"}]
    assert pictures
    assert [file.name for file in pictures if file.stat().st_size > 200_000] == []


def test_lines_of_documents_are_short(repository: Path) -> None:
    """Code, links and tables excepted."""
    documents = [repository / "README.md", repository / "CONTRIBUTING.md"]
    documents += [
        repository / f"docs/{name}.md" for name in ("index", "tutorial", "architecture", "glossary", "benchmarks")
    ]
    for document in documents:
        for line in document.read_text(encoding="utf-8").splitlines():
            assert len(line) <= 160 or line.startswith("|"), f"{document.name}: {line[:60]} ..."
