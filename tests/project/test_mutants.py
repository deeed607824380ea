"""The mutants are patches to the present code and name tests that exist; `make mutants` runs them."""

import ast
import shutil
from pathlib import Path

import pytest

from tests.mutants.patches import ROOT, apply, mutants, read

MUTANTS = list(mutants())
TO_REDO = "change the code again as its first line says, and replace the patch's diff by that of `git diff -U2`"


def test_mutants_change_shipped_code_and_name_tests_that_exist() -> None:
    wrong = []
    for mutant in MUTANTS:
        if not mutant.changes or not all(
            name.startswith(("missrec_t4r/", "triton_models/")) for name in mutant.changes
        ):
            wrong.append(f"{mutant.name} changes {mutant.changes}")
        for named in mutant.tests:
            file, _, test = named.partition("::")
            exists = Path(file).name.startswith("test_") and (ROOT / file).is_file()
            if not exists or (test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")):
                wrong.append(f"{mutant.name} names {named}")
    assert wrong == []


def test_every_mutant_applies_and_leaves_python(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    rotten = {}
    for number, mutant in enumerate(MUTANTS):
        tree = tmp_path / str(number)
        for name in mutant.changes:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy(ROOT / name, tree / name)
        if complaint := apply(mutant, tree):
            rotten[mutant.name] = complaint
            continue
        for name in mutant.changes:
            if name.endswith(".py"):
                ast.parse((tree / name).read_text(encoding="utf-8"))
    assert rotten == {}, TO_REDO


def test_behaviours_are_told_apart() -> None:
    told = [mutant.behaviour for mutant in MUTANTS]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("text", ["--- a/x\n+++ b/x\n", "Behaviour: no test is named\n--- a/x\n+++ b/x\n"])
def test_a_patch_without_header_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "without-header.patch"
    file.write_text(text)
    with pytest.raises(ValueError, match="Behaviour"):
        read(file)
