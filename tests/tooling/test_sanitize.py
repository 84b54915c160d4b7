# SPDX-License-Identifier: BSD-3-Clause
"""``make sanitize``: what it runs is there, and what the programs say is read rightly."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import masked_loss_ext  # noqa: F401 (loads the library)
from tools.instrument import COUNTS_ACCESSES, Instrument
from tools.sanitize import __main__ as command
from tools.sanitize import checks, instruments

ROOT = Path(__file__).resolve().parents[2]
GOOD = checks.without_torch("thread", ["program", "library"])
WRONG = checks.wrong_line("thread", ["program", "library"], "race", "data race")
TESTS = checks.pytest_check("tests", ["tests/a.py"], {})

RACE = """==================
WARNING: ThreadSanitizer: data race (pid=7)
  Read of size 8 at 0x7ffc by thread T3:
"""
OVERFLOW = "==1==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x60e\n"
UNDEFINED = "csrc/a.h:3:5: runtime error: signed integer overflow\n"


@pytest.mark.parametrize(
    "check, code, text, count, findings",
    [
        (GOOD, 0, "elementwise: 31 cases\n1340 calls, 0 failures\n", 1340, 0),
        (GOOD, 66, RACE + RACE + "1340 calls, 0 failures\n", 1340, 2),
        (GOOD, 1, "FAIL x is never called\n1340 calls, 1 failures\n", 1340, 1),
        (GOOD, 0, "", 0, 1),  # it has done nothing
        (WRONG, 66, RACE, 1, 0),
        (WRONG, 0, "not reported (499500)\n", 1, 1),
        (WRONG, 1, OVERFLOW, 1, 1),
        (TESTS, 0, "827 passed, 2 skipped in 50.86s\n", 827, 0),
        (TESTS, 1, "1 failed, 826 passed in 50.86s\n", 826, 1),
        (TESTS, 0, UNDEFINED + "827 passed in 50.86s\n", 827, 1),  # of a child, that a test expects
    ],
)
def test_what_is_said_is_judged(check, code, text, count, findings):
    assert command.judged(check, code, text)[:2] == (count, findings)


def test_calls_of_every_operator_are_added_up():
    malformed = r"^\w+ +(\d+) "
    text = "operator   calls  refused\n_snapshot    20   1\npacked_rows  20  19\n"
    check = checks.Check("malformed calls", "address", "calls", [], malformed, {})
    assert command.judged(check, 0, text)[:2] == (40, 0)


def test_what_is_run_is_there():
    files = (*checks.TESTS, *checks.SIMULATOR_TESTS)
    assert [name for name in files if not (ROOT / name).is_file()] == []
    assert len(set(files)) == len(files)
    rooms = {path.parent.name for path in (ROOT / "csrc").glob("*/cpu")} - {"common"}
    names = {"block_mask": "attention"}  # its tests' folder
    for files in (checks.SHORT_TESTS, checks.TESTS):
        assert {names.get(room, room) for room in rooms} == {name.split("/")[1] for name in files}


def test_a_check_of_a_program_that_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "LOGS", tmp_path)
    program = f"echo 3 calls; echo '{OVERFLOW}' > {tmp_path}/report.7; exit 1"
    died = checks.without_torch("address", ["sh", "-c", program])
    assert command.run(died)[:2] == (3, 1)
    assert command.run(checks.without_torch("address", ["sh", "-c", "echo 3 calls"]))[:2] == (3, 0)


def test_the_compiler_gets_the_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(Instrument, "folder", tmp_path)
    said = lambda one, *words: subprocess.run(  # noqa: E731
        [one.command(), *words], capture_output=True, text=True
    ).stdout.split()
    instrument = Instrument("test", ("-O1", "-fsanitize=address"), compiler="echo")
    assert said(instrument, "-c", "x.cpp") == ["-c", "x.cpp", "-O1", "-fsanitize=address"]
    counting = said(instrument, "-c", COUNTS_ACCESSES)
    assert counting == ["-c", COUNTS_ACCESSES]  # which no other sanitizer goes with
    before = instrument.digest()
    assert Instrument("test", ("-O2",), compiler="echo").digest() != before
    assert said(instruments.THREAD, "--version")[:1] != []


def test_the_stand_in_has_all_that_the_library_asks_of_pytorch():
    """Else the programs without PyTorch do not load it, which `make sanitize` alone would say."""
    if shutil.which("nm") is None:
        pytest.skip("nm is missing: apt-get install binutils")
    library = next(path for path in torch.ops.loaded_libraries if "masked_loss_ext" in path)
    said = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True)
    asked = set(re.findall(r"\b(?:aoti_)?torch_\w+", said.stdout))
    texts = "".join(path.read_text() for path in (ROOT / "tests/cpp/stand_in").glob("*.cpp"))
    there = set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", texts))
    there |= {f"aoti_torch_dtype_{name}" for name in re.findall(r"STAND_IN_DTYPE\((\w+)", texts)}
    there |= {f"aoti_torch_{name}" for name in re.findall(r"STAND_IN_NUMBER\((\w+)", texts)}
    of_cuda_kernels = {name for name in asked if "cuda" in name}
    assert len(asked) > 20 and asked - there - of_cuda_kernels == set()
