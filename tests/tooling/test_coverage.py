# SPDX-License-Identifier: BSD-3-Clause
"""``make coverage``: gcov is read rightly, and lines are put into their rooms."""

import shutil
import subprocess

import pytest

from tools.coverage import native, tables
from tools.instrument import ROOT

PROGRAM = """\
int twice(int x) {
  if (x > 2) {
    return x + x;
  }
  return 2 * x;
}
int main(int count, char**) { return twice(count) == 0; }
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    if shutil.which("gcov") is None or shutil.which("g++") is None:
        pytest.skip("gcov and g++ are needed")
    monkeypatch.setattr(native, "CSRC", tmp_path)
    source = tmp_path / "twice.cpp"
    source.write_text(PROGRAM)
    command = ["g++", "-O0", "--coverage", source, "-o", tmp_path / "twice"]
    subprocess.run(command, check=True, cwd=tmp_path)
    return source


def covered(source):
    found = {}
    for counter in source.parent.glob("*.gcda"):
        native.merge(found, native.documents(counter))
    return {number for number, ran in found[source].items() if ran}, set(found[source])


def test_lines_that_were_run(project):
    subprocess.run([project.parent / "twice"], check=True)
    ran, all_of_them = covered(project)
    assert all_of_them == {1, 2, 3, 5, 7} and ran == {1, 2, 5, 7}
    subprocess.run([project.parent / "twice", "a", "b"], check=True)
    assert covered(project)[0] == all_of_them


def test_a_line_is_covered_where_any_object_has_run_it(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CSRC", tmp_path)
    header, counts = tmp_path / "a.h", [(0, 3, 0), (1, 0, 0)]
    documents = [
        {
            "current_working_directory": str(tmp_path),
            "files": [
                {"file": name, "lines": [{"line_number": n, "count": c} for n, c in enumerate(row)]}
                for name in ("a.h", "/usr/include/other.h")
            ],
        }
        for row in counts
    ]
    found = {}
    native.merge(found, documents)
    assert found == {header: {0: True, 1: True, 2: False}}


def test_rooms_and_languages():
    found = {
        ROOT / "csrc/elementwise/formula.h": {1: True, 2: False},
        ROOT / "csrc/elementwise/cpu/ops.cpp": {1: True, 2: True},
        ROOT / "csrc/elementwise/cuda/ops.cu": {7: False},
        ROOT / "csrc/schemas.cpp": {1: True},
        ROOT / "masked_loss_ext/ops/padding.py": {1: True},
        ROOT / "masked_loss_ext/padding.py": {1: False, 2: False, 3: False, 5: False},
    }
    rows = {(row["room"], row["language"]): row for row in tables.rows(found)}
    assert rows["elementwise", "C++"]["covered"] == 3
    assert rows["elementwise", "C++"]["share"] == "75.0 %"
    assert rows["elementwise", "CUDA"]["share"] == "0.0 %"
    assert rows["all", "C++"]["lines"] == 5 and rows["top", "C++"]["lines"] == 1
    assert rows["all", "Python"] == {
        "room": "all", "language": "Python", "lines": 5, "covered": 1, "share": "20.0 %",
    }  # fmt: skip
    assert "masked_loss_ext/padding.py: 1-3, 5" in tables.missing(found)
    assert len(tables.text(list(rows.values())).splitlines()) == 1 + len(rows)
