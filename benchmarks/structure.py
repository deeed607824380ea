"""Size and structure of one or more checkouts: files, code lines, folders, functions, comments, imports, circles.

    git worktree add ../before 10bf1f3
    python -m benchmarks.structure ../before . --out benchmarks/results/DATE-structure.json --page docs/architecture.md

Read from the sources alone, nothing is imported. The package is ``missrec_t4r/`` and, in checkouts that install it as
``missrec_t4r.workflows``, the folder ``workflows/``. A code line holds at least one token that is neither comment nor
docstring. Options and settings are the rows of ``docs/reference.md``, which is made from the code. An import counts
wherever it stands, also within a function or for types only. Circles are groups of packages (folders directly below
``missrec_t4r``) that reach each other.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import subprocess
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

PACKAGE = "missrec_t4r"
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def measure(root: Path) -> dict[str, Any]:
    """Return the figures of a checkout.

    Parameters
    ----------
    root : Path
        A checkout of this repository, of any version.

    Returns
    -------
    dict
        Name of a figure -> number, or mapping of names to numbers.
    """
    files = dict(_package_files(root))
    trees = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()}
    code = {name: _code_lines(file, trees[name]) for name, file in files.items()}
    comments = sum(_comments(file) for file in files.values())
    lengths = sorted(length for name in files for length in _function_lengths(trees[name], code[name]))
    importers = _importers(files, trees)
    folders = Counter(file.parent for file in files.values() if file.name != "__init__.py")
    widest, modules = folders.most_common(1)[0]
    n_code = sum(map(len, code.values()))
    reference = (root / "docs/reference.md").read_text(encoding="utf-8")
    single = [name for name, others in importers.items() if len(others) == 1 and files[name].name != "__init__.py"]
    circles = _circles(importers)
    return {
        "commit": _commit(root),
        "package": {
            "files": len(files),
            "lines": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files.values()),
            "code_lines": n_code,
            "longest_file_code_lines": max(map(len, code.values())),
            "folders": len(folders),
            "largest_folder": {"path": widest.relative_to(root).as_posix(), "modules": modules},
            "comments": comments,
            "code_lines_per_comment": round(n_code / comments, 1),
            "modules_with_one_importer": len(single),
            "circles": [sorted(circle) for circle in circles],
        },
        "functions": {
            "number": len(lengths),
            "median_code_lines": statistics.median(lengths),
            "p95_code_lines": lengths[int(0.95 * len(lengths))],
            "longest_code_lines": lengths[-1],
        },
        "options": len(re.findall(r"^\| `-", reference, re.MULTILINE)),
        "option_declarations": _declarations(trees),
        "settings": len(re.findall(r"^\| `(?:model|train|pretrain|ranking)\.", reference, re.MULTILINE)),
        "tests": _size(root / "tests"),
        "readme_bytes": (root / "README.md").stat().st_size,
    }


def _package_files(root: Path) -> Iterator[tuple[str, Path]]:
    folders = {PACKAGE: root / PACKAGE}
    if f'"{PACKAGE}.workflows" = "workflows"' in (root / "pyproject.toml").read_text(encoding="utf-8"):
        folders[f"{PACKAGE}.workflows"] = root / "workflows"
    for package, folder in folders.items():
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), file


def _code_lines(file: Path, tree: ast.Module) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines: set[int] = set()
    with file.open("rb") as source:
        for token in tokenize.tokenize(source.readline):
            if token.type not in NO_CODE and token.string:
                lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))  # a docstring, also of a field
    return lines


def _comments(file: Path) -> int:
    text = io.BytesIO(file.read_bytes())
    return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(text.readline))


def _function_lengths(tree: ast.Module, code: set[int]) -> Iterator[int]:
    """Yield the code lines of every function below its signature."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0].lineno
            yield max(1, len(code & set(range(first, (node.end_lineno or first) + 1))))


def _importers(files: Mapping[str, Path], trees: Mapping[str, ast.Module]) -> dict[str, set[str]]:
    """Return every module with the modules that import it."""
    found: dict[str, set[str]] = defaultdict(set)
    for module, tree in trees.items():
        for name in _imports(tree):
            while name and name not in files:
                name = name.rpartition(".")[0]
            if name and name != module:
                found[name].add(module)
    return found


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _circles(importers: Mapping[str, set[str]]) -> list[set[str]]:
    after: dict[str, set[str]] = defaultdict(set)
    for target, sources in importers.items():
        for source in sources:
            one, other = _package(source), _package(target)
            if one and other and one != other:
                after[one].add(other)
    reached = {package: _reachable(package, after) for package in list(after)}
    groups = {
        frozenset({other for other in seen if package in reached.get(other, ())}) for package, seen in reached.items()
    }
    return sorted((set(group) for group in groups if len(group) > 1), key=sorted)


def _package(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def _reachable(start: str, after: Mapping[str, set[str]]) -> set[str]:
    todo, seen = [start], set()
    while todo:
        for node in after.get(todo.pop(), set()) - seen:
            seen.add(node)
            todo.append(node)
    return seen


def _declarations(trees: Mapping[str, ast.Module]) -> int:
    """Return how many parameters declare options.

    Those of the public functions of ``cli/`` and ``commands/``, and of the functions that ``commands.HOME`` names.
    """
    functions = {
        f"{name}:{node.name}": node
        for name, tree in trees.items()
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }
    named = {f"{PACKAGE}.{place}" for place in _home(trees)}
    groups = tuple(f"{PACKAGE}.{group}{end}" for group in ("cli", "commands") for end in (".", ":"))
    counted = [
        node
        for name, node in functions.items()
        if name in named
        or (not named and name.startswith(groups) and (not node.name.startswith("_") or node.decorator_list))
    ]
    return sum(len(node.args.args) + len(node.args.kwonlyargs) for node in counted)


def _home(trees: Mapping[str, ast.Module]) -> list[str]:
    for node in trees[f"{PACKAGE}.commands"].body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "HOME":
            return list(ast.literal_eval(node.value).values())
    return []


def _size(folder: Path) -> dict[str, int]:
    files = list(folder.rglob("*.py"))
    return {"files": len(files), "lines": sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)}


def _commit(root: Path) -> str:
    command = ["git", "-C", str(root), "rev-parse", "--short=7", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of some checkouts' figures."""
    rows = [
        ("package: files", lambda r: r["package"]["files"]),
        ("package: code lines (all lines)", lambda r: f"{r['package']['code_lines']:,} ({r['package']['lines']:,})"),
        ("package: longest file, code lines", lambda r: r["package"]["longest_file_code_lines"]),
        (
            "package: largest folder, modules",
            lambda r: f"{r['package']['largest_folder']['modules']} (`{r['package']['largest_folder']['path']}`)",
        ),
        ("functions: median / 95th percentile / longest, code lines", _function_cells),
        ("code lines per comment", lambda r: r["package"]["code_lines_per_comment"]),
        ("modules with one importer", lambda r: r["package"]["modules_with_one_importer"]),
        ("circles of packages", lambda r: "; ".join(map(", ".join, r["package"]["circles"])) or "none"),
        ("options of the command line", lambda r: r["options"]),
        ("parameters that declare them", lambda r: r["option_declarations"]),
        ("settings of recipes", lambda r: r["settings"]),
        ("README, bytes", lambda r: f"{r['readme_bytes']:,}"),
    ]
    head = ["", *(f"`{result['commit']}`" for result in results)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {name} | {' | '.join(str(value(result)) for result in results)} |" for name, value in rows]
    return "\n".join(lines)


def _function_cells(result: Mapping[str, Any]) -> str:
    functions = result["functions"]
    return " / ".join(f"{functions[f'{name}_code_lines']:g}" for name in ("median", "p95", "longest"))


def main() -> None:
    """Measure the checkouts that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkouts", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument(
        "--page", type=Path, help="document whose part between the markers `structure` becomes the table"
    )
    arguments = parser.parse_args()
    results = [measure(checkout.resolve()) for checkout in arguments.checkouts]
    if arguments.out:
        content = {"benchmark": "structure", "command": "python -m benchmarks.structure", "checkouts": results}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        text = arguments.page.read_text(encoding="utf-8")
        head, _, rest = text.partition("<!-- structure -->")
        _, end, tail = rest.partition("<!-- /structure -->")
        if not end:
            raise SystemExit(f"{arguments.page} has no part between <!-- structure --> and <!-- /structure -->")
        arguments.page.write_text(f"{head}<!-- structure -->\n{table(results)}\n{end}{tail}", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
