"""What the migration page names as the present name of a module exists."""

import re
from pathlib import Path


def test_every_module_of_the_migration_page_exists(repository: Path) -> None:
    page = (repository / "docs/migration.md").read_text(encoding="utf-8").partition("## Python: all modules")[2]
    names = re.findall(r"\| `(missrec_t4r[\w.]*)` \|$", page, re.MULTILINE)
    assert len(names) > 100
    files = [repository / name.replace(".", "/") for name in names]
    assert [str(file) for file in files if not (file.with_suffix(".py").is_file() or file.is_dir())] == []
