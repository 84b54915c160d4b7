# SPDX-License-Identifier: BSD-3-Clause
"""make matrix, compilers and aarch64: what they would try, and how they read what came of it."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from masked_loss_ext.build import sources
from tools import aarch64, compilers, kernels, matrix, records, trees


def test_every_python_meets_the_pinned_and_the_newest_torch():
    every = matrix.environments()
    assert len({one.name for one in every}) == len(every)
    for python in matrix.PYTHONS:
        assert {matrix.NEWEST, matrix.pinned_torch()} <= {
            e.torch for e in every if e.python == python
        }
    asked = {one.requirement for one in every}
    assert asked == {"torch", "torch==2.10.*", "torch==2.11.*", "torch==2.12.*", "torch==2.13.0"}


def test_the_oldest_python_and_torch_are_those_that_the_package_names():
    root = Path(kernels.ROOT)
    assert f'requires-python = ">={matrix.PYTHONS[0]}"' in (root / "pyproject.toml").read_text()
    assert f"torch>={matrix.RELEASES[0]}" in (root / "setup.py").read_text()
    assert aarch64.TORCH.startswith(matrix.RELEASES[0])


def test_the_share_names_tests_that_are_there():
    for name in matrix.SHARE:
        file, _, function = name.partition("::")
        text = (kernels.ROOT / "tests" / file).read_text()
        assert not function or re.search(rf"^def {function}\(", text, re.M), name


def test_this_python_is_found_and_another_is_not():
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert matrix.find_python(version)
    assert matrix.find_python("3.1") is None


def test_an_absent_python_is_named_in_the_table(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    monkeypatch.setattr(matrix, "FOLDER", tmp_path)
    written = {}
    monkeypatch.setattr(matrix, "read_table", lambda: {})
    monkeypatch.setattr(matrix, "write_table", written.update)
    one = matrix.environments()[0]
    assert matrix.try_all([one], tmp_path / "a.whl")
    assert written[one.name]["result"] == f"not tried: no Python {one.python} here"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("3 passed, 2 skipped in 1.0s\n", (3, 0, 2, "passed")),
        ("FAILED a.py::b - no\n1 failed, 3 passed in 1s\n", (3, 1, 0, "a.py::b - no")),
        ("ERROR a.py\n1 error in 1s\n", (0, 1, 0, "a.py")),
        ("no tests ran in 1s\n", (0, 0, 0, "no tests ran in 1s")),
        ("", (0, 0, 0, "nothing was printed")),
    ],
)
def test_what_pytest_said_is_a_row(monkeypatch, tmp_path, said, expected):
    monkeypatch.setattr(matrix, "install", lambda *_: tmp_path / "python")
    monkeypatch.setattr(matrix, "about", lambda *_: ("2.10.0", "12.8"))
    monkeypatch.setattr(matrix, "make_tree", lambda *_: tmp_path)
    monkeypatch.setattr(matrix, "run", lambda *_, **__: said)
    row = matrix.tried(matrix.environments()[0], "python", tmp_path, tmp_path)
    assert (row.passed, row.failed, row.skipped, row.result) == expected
    assert (row.torch, row.cuda) == ("2.10.0", "12.8")


def test_a_tree_has_the_package_only_with_a_library(tmp_path):
    bare = trees.make_tree(tmp_path / "bare", None)
    assert (bare / "tests" / "conftest.py").is_file() and not (bare / "masked_loss_ext").exists()
    (tmp_path / "library").write_text("library")
    tree = trees.make_tree(tmp_path / "tree", tmp_path / "library")
    assert (tree / "masked_loss_ext" / sources.LIBRARY).read_text() == "library"
    assert list(tree.rglob("*.so")) == [tree / "masked_loss_ext" / sources.LIBRARY]


def test_compilers_are_found_by_name_and_number(monkeypatch, tmp_path):
    for name in ("g++-9", "g++-12", "clang++-19", "g++", "clang-19", "aarch64-linux-gnu-g++-12"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")
    assert compilers.compilers_here() == ["clang++-19", "g++-9", "g++-12"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels are those of x86-64")
def test_loops_that_are_no_vectors_are_seen(tmp_path):
    if not (shutil.which("g++") and shutil.which("objdump")):
        pytest.skip("g++ or objdump is missing")
    text = "void f(float* a, int n) { for (int i = 0; i < n; ++i) a[i] = a[i] * 3 + 1; }"
    for source in sources.LEVEL_SOURCES:
        unit = tmp_path / f"{source}.avx2.o"
        unit.parent.mkdir(parents=True, exist_ok=True)
        scalar = ["-fno-tree-vectorize"] if source == sources.LEVEL_SOURCES[0] else ["-O3"]
        command = ["g++", "-O2", *scalar, *sources.AVX2_FLAGS, "-x", "c++", "-", "-c", "-o", unit]
        subprocess.run(list(map(str, command)), input=text, text=True, check=True)
    found = compilers.packed_products(tmp_path / "library", "avx2")
    first, *others = sources.LEVEL_SOURCES
    assert found[first] == 0 and all(found[name] > 0 for name in others)


def test_a_compiler_takes_the_place_of_its_own_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "FOLDER", tmp_path)
    monkeypatch.setattr(records.read, "__defaults__", (tmp_path,))
    monkeypatch.setattr(records.write, "__defaults__", (tmp_path,))
    for result in ("failed", "passed"):
        compilers.add_to_table([compilers.Row("g++-12", "12.2.0", "avx2", result=result)])
    compilers.add_to_table([compilers.Row("clang++-14", "14.0.6", "avx2", result="passed")])
    found = [(row["compiler"], row["result"]) for row in records.read("compilers")]
    assert found == [("clang++-14", "passed"), ("g++-12", "passed")]


def test_without_an_emulator_the_short_form_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(aarch64.shutil, "which", lambda name: None)
    assert aarch64.main(["--short"]) == 0
    assert "NOT DONE: apt-get install g++-aarch64-linux-gnu qemu-user" in capsys.readouterr().out
    assert aarch64.main([]) == 1
