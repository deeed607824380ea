"""MkDocs hooks of this site: API pages from the packages, and links to files of the repository.

* ``api/NAME.md`` is written for every package in `API_PAGES`, one section per module, and ``api/index.md`` for the
  public names of ``missrec_t4r``. A module that is added appears without a change here.
* ``examples/NAME.md`` is written for every notebook of ``examples/``, outputs included; links to notebooks lead there.
* A document may link to a file outside ``docs/`` (``../benchmarks/results/x.json``), as it does on a code host. Such
  files are copied into the site under ``repository/`` and the links are rewritten. Markdown among them becomes a page.

Nothing is loaded from a network, at build time or by the pages.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
API_PAGES = {
    "config": "Settings and recipes",
    "data": "Catalogue, sessions, batches",
    "model": "The network",
    "ranking": "Score terms, tuning and baselines",
    "retrieval": "Index, top-k, filters, explanations",
    "training": "Training and pre-training",
    "evaluation": "Evaluation",
    "runs": "Run folders",
    "bundle": "Bundles",
    "etl": "ETL",
    "t4r": "Transformers4Rec parts",
    "serving.client": "Client",
    "serving.triton": "Triton",
}
"""Package below ``missrec_t4r`` -> title of its page."""
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s#]+)(#[^)\s]*)?(\))")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the API pages and the linked files of the repository."""
    for name, text in (*_api_pages(), *_notebooks()):
        files.append(File.generated(config, name, content=text))
    todo = [Path(str(page.abs_src_path)) for page in files if page.src_uri.endswith(".md") and page.abs_src_path]
    done: set[Path] = set()
    while todo:
        source = todo.pop()
        for target in _linked(source):
            if target not in done and target.is_file() and not target.is_relative_to(ROOT / "docs"):
                done.add(target)
                place = f"repository/{target.relative_to(ROOT).as_posix()}"
                files.append(File.generated(config, place, abs_src_path=str(target)))
                todo += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Rewrite links that leave ``docs/``, and those of pages that lie outside it."""
    source = _source(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        start, target, anchor, end = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if path.endswith(".ipynb"):
            path = f"docs/{path.removesuffix('.ipynb')}.md"
        if (ROOT / path).is_dir() and not path.startswith("docs"):
            return start.removeprefix("!").removesuffix("](")[1:]  # a folder: its name alone
        place = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
        return f"{start}{posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{anchor or ''}{end}"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show vertical bars within code of a table, which Markdown escapes, without the escape."""
    return re.sub(r"<code>[^<]*</code>", lambda code: code[0].replace("\\|", "|"), html)


def _source(uri: str) -> str:
    """Return the path of a page in the repository."""
    if uri.startswith("examples/"):
        return uri
    return uri.removeprefix("repository/") if uri.startswith("repository/") else f"docs/{uri}"


def _linked(source: Path) -> Iterator[Path]:
    for _, target, _, _ in _LINK.findall(source.read_text(encoding="utf-8")):
        if "://" not in target:
            yield (source.parent / target).resolve()


def _notebooks() -> Iterator[tuple[str, str]]:
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "examples" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    for name in writer.NAMES:
        content = json.loads((ROOT / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))
        yield f"examples/{name}.md", writer.as_markdown(content)


def _api_pages() -> Iterator[tuple[str, str]]:
    yield "api/index.md", _public_names()
    for package, title in API_PAGES.items():
        folder = ROOT / "missrec_t4r" / package.replace(".", "/")
        sections = [f"# {title}\n\n`missrec_t4r.{package}`\n"]
        for file in sorted(folder.rglob("*.py")):
            if file.name != "__init__.py":
                name = file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                sections.append(f"## `{name.removeprefix('missrec_t4r.')}`\n\n::: {name}\n")
        yield f"api/{package.replace('.', '_')}.md", "\n".join(sections)


def _public_names() -> str:
    """Return the page of ``import missrec_t4r as mr``: every name with the head of its docstring."""
    from missrec_t4r import _HOME

    lines = ["# Python API\n", "`import missrec_t4r as mr` has these names; the pages below have every module.\n"]
    lines += ["| name | what it is | defined in |", "|---|---|---|"]
    for name, module in sorted(_HOME.items()):
        lines.append(f"| `mr.{name}` | {_head(module, name)} | `missrec_t4r.{module}` |")
    lines += ["", *(f"- [{title}]({package.replace('.', '_')}.md)" for package, title in API_PAGES.items())]
    return "\n".join(lines) + "\n"


def _head(module: str, name: str) -> str:
    path = ROOT / "missrec_t4r" / module.replace(".", "/")
    files = [path.with_suffix(".py")] if path.with_suffix(".py").is_file() else sorted(path.glob("*.py"))
    for file in files:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                text = (ast.get_docstring(node) or "").partition("\n\n")[0]
                return re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|")
    return ""
