# SPDX-License-Identifier: BSD-3-Clause
"""The wrong lines of `make mutate` apply to today's sources, and the tool finds what it should."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tools.mutation import rooms
from tools.mutation.__main__ import outcome_of
from tools.mutation.mutant import Mutant
from tools.mutation.table import MUTANTS
from tools.mutation.tree import Tree

ROOT = Path(__file__).resolve().parents[2]


def test_every_mutant_applies():
    """What it replaces is there, once; Python is still Python."""
    problems = []
    for number, mutant in enumerate(MUTANTS, 1):
        text = (ROOT / mutant.place).read_text()
        if text.count(mutant.right) != 1 or mutant.right == mutant.wrong:
            problems.append(f"{number}: {mutant.place} has {mutant.right!r} not once")
        elif mutant.place.endswith(".py"):
            compile(text.replace(mutant.right, mutant.wrong), mutant.place, "exec")
    assert problems == []


def test_mutants_are_many_and_different():
    assert len(MUTANTS) >= 66
    assert len({(mutant.place, mutant.what) for mutant in MUTANTS}) == len(MUTANTS)
    assert {mutant.room for mutant in MUTANTS} == set(rooms.ROOMS)
    parts = {"Python", "formulas", "CPU kernels", "CUDA kernels", "checks and calls"}
    assert {mutant.part for mutant in MUTANTS} == parts


def test_every_room_has_its_tests():
    missing = [t for tests in rooms.ROOMS.values() for t in tests if not (ROOT / t).is_file()]
    assert missing == []


# --- the tool, on a tree of three files -----------------------------------------------------------

FILES = {
    "adding.py": "def add(a, b):\n    return a + b\n\n\ndef unused():\n    return 1\n",
    "csrc/adding.h": "int one = 1;\n",
    "setup.py": "from pathlib import Path\nassert 'two' not in Path('csrc/adding.h').read_text()\n",
    "test_adding.py": "from adding import add\n\n\ndef test_add():\n    assert add(2, 3) == 5\n",
}
SURE = Mutant("adding.py", "tiny", "a difference", "return a + b", "return a - b")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    if shutil.which("git") is None:
        pytest.skip("git is missing, by which the tool lists the files of a tree")
    source = tmp_path / "source"
    for name, text in FILES.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q", source], check=True)
    monkeypatch.setitem(rooms.ROOMS, "tiny", ("test_adding.py",))
    made = Tree(source, tmp_path / "copy" / "tree")
    yield made
    for folder in (source, made.place):
        assert {name: (folder / name).read_text() for name in FILES} == FILES


def test_a_mutant_is_caught_and_undone(tree):
    row = outcome_of(tree, SURE, 60)
    assert (row["outcome"], row["caught_by"]) == ("caught", "test_adding.py::test_add")


def test_a_mutant_that_no_test_sees_survives(tree):
    row = outcome_of(tree, SURE._replace(right="return 1", wrong="return 2"), 60)
    assert (row["outcome"], row["caught_by"]) == ("survived", "")


def test_a_mutant_that_ends_the_process_is_caught(tree):
    row = outcome_of(tree, SURE._replace(wrong="import os; os.abort()"), 60)
    assert (row["outcome"], row["caught_by"]) == ("caught", "test_adding.py::test_add")


def test_a_mutant_that_never_ends_is_stopped(tree):
    row = outcome_of(tree, SURE._replace(wrong="\n    while True: pass"), 3)
    assert (row["outcome"], row["caught_by"]) == ("timed out", "")


def test_a_mutant_that_does_not_compile(tree):
    broken = Mutant("csrc/adding.h", "tiny", "another name", "int one", "int two")
    assert outcome_of(tree, broken, 60)["outcome"] == "did not build"
    assert tree.stale


def test_what_is_there_twice_is_refused(tree):
    with pytest.raises(ValueError, match="must hold once"):
        outcome_of(tree, SURE._replace(right="return", wrong="yield"), 60)
