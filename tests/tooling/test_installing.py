# SPDX-License-Identifier: BSD-3-Clause
"""What make says while pip installs, and the Pythons that it refuses."""

import shutil
import subprocess
import sys

import pytest

from tools import installing
from tools.kernels import ROOT

PIP = """
import sys
print("Collecting torch==2.13.0 (from -r requirements.txt (line 3))")
print("  Downloading https://index/torch-2.13.0-cp311.whl.metadata (29 kB)")
print("  Downloading https://index/torch-2.13.0-cp311.whl (848.7 MB)")
print("Requirement already satisfied: numpy==2.4.6 in x (2.4.6)")
print("  Downloading numpy-2.4.6.whl (16.6 MB)")
print("Installing collected packages: torch")
print("ERROR: no space left")
sys.exit(3)
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_large_downloads_and_failures_are_said(capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert installing.run([sys.executable, "-c", PIP], 90) == 3
    said = capsys.readouterr().err
    assert "torch-2.13.0-cp311.whl, 848.7 MB\n" in said.replace("\033[K", "")
    assert "numpy-2.4.6.whl, " not in said  # small
    assert said.endswith("ERROR: no space left\n")
    assert ("2/90 packages" in said) == terminal


def test_packages_are_counted_once():
    text = (ROOT / "requirements.txt").read_text()
    count = installing._count(ROOT / "requirements.txt")
    assert 60 < count < text.count("==")


def test_make_says_what_is_wrong_with_a_python(tmp_path):
    if shutil.which("make") is None or not (ROOT / "Makefile").is_file():
        pytest.skip("needs make and the Makefile")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name, body, sentence in [
        ("shim", "exit 127", "shim is there but does not start"),
        ("old", 'case "$2" in "") exit 0;; *) exit 1;; esac', "Python 3.10 or newer is needed"),
        ("none", None, "none is missing: install Python 3.10 or newer"),
    ]:
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        if body is not None:
            program.write_text(f"#!/bin/sh\n{body}\n")
            program.chmod(0o755)
        done = subprocess.run(
            ["make", ".venv/bin/python", f"PYTHON={program}"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode and sentence in done.stdout, done.stdout + done.stderr
