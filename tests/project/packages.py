"""The source tree seen as the package that is installed: which file lies where, and what each imports."""

import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "missrec_t4r": "missrec_t4r",
    "triton_models": "missrec_t4r/triton_models",
}
"""Top-level folder -> where it lies in the wheel."""
SHIPPED = {".py", ".yaml", ".pbtxt", ".typed", ".md", ".html"}


def shipped_files() -> dict[str, Path]:
    """Return every file that users should get: path in the wheel -> path in the checkout."""
    return {
        f"{target}/{file.relative_to(ROOT / folder).as_posix()}": file
        for folder, target in FOLDERS.items()
        for file in sorted((ROOT / folder).rglob("*"))
        if file.is_file() and file.suffix in SHIPPED and "__pycache__" not in file.parts
    }


@functools.cache
def modules() -> dict[str, Path]:
    """Return every importable module by its installed name.

    The code of Triton's templates lies in folders such as ``1/``, and ``__main__`` runs when it is imported: neither
    counts.
    """
    found = {}
    for place, file in shipped_files().items():
        parts = place.removesuffix(".py").removesuffix("/__init__").split("/")
        if place.endswith(".py") and parts[-1] != "__main__" and all(part.isidentifier() for part in parts):
            found[".".join(parts)] = file
    return found


@functools.cache
def imports(file: Path, *, only_at_import: bool = False) -> Iterable[str]:
    """Return the absolute names that a file imports, anywhere or (``only_at_import``) when it is itself imported."""
    return list(_imports(ast.parse(file.read_text(encoding="utf-8")), only_at_import))


def _imports(node: ast.AST, only_at_import: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif only_at_import and (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types_only(child)):
            continue
        else:
            yield from _imports(child, only_at_import)


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
