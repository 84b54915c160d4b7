# SPDX-License-Identifier: BSD-3-Clause
"""What the mask excludes is never read, of any operator on the CPU, by two instruments.

Pages: what lies on pages of its own is closed, and so are the pages around each tensor; whoever
reads it is killed. Counts: a library that counts every access, byte by byte, finds the rest: of a
mask per element whole lines of the cache are not read, and each gradient of 0 is written once.
"""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accuracy import assert_same_bits
from closed_pages import PAGE, all_closed, closed_pages
from excluded_cases import FAMILIES, REASONS
from operator_calls import operators, ops

from masked_loss_ext.build import sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)


def run_closed(case, at_end):
    """The results of a call of which all that may not be read is closed; how much that was.

    What an operator writes over stays open, but for a gradient that it shall leave as it is."""
    op = getattr(ops, case.operator).default
    open_ones = [] if case.name == "by 1" else case.written()
    with all_closed(case.given, case.excluded, at_end, open_ones) as (given, closed):
        found = op(**given)
    found = [found] if isinstance(found, torch.Tensor) else list(found or [])
    return found + [given[name] for name in open_ones], closed


@every_family
def test_closed_pages_are_not_read(family):
    closed = 0
    for i, case in enumerate(family()):
        for at_end in (i % 2 == 0, i % 2 == 1)[: 2 if case.elements else 1]:
            found, size = run_closed(case, at_end)
            closed += size
            for one, expected in zip(found, case.results(), strict=False):
                assert_same_bits(one, expected, f"{case.operator} {case.name}")
    assert closed >= 3 * PAGE


@functools.cache
def counted():
    """{"rows": ..., "bare": ...} of counted_excluded.py, which is run in a process of its own."""
    import cpu_counted
    from cuda_sim import compiler

    if compiler() is None:
        pytest.skip("counting accesses needs g++, and there is none")
    library = cpu_counted.build(sources)
    command = [sys.executable, ROOT / "tests/common/counted_excluded.py", library]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_counted_bytes():
    wrong = [row for row in counted()["rows"] if row["wrong"]]
    assert not wrong, wrong[:5]
    assert all(row["unread"] for row in counted()["rows"])


def test_every_operator_is_in_the_table():
    found = {row["operator"] for row in counted()["rows"]}
    assert not found & set(REASONS)
    assert sorted(found | set(REASONS)) == operators()
    zeroed = {row["operator"] for row in counted()["rows"] if row["zeroed"]}
    assert zeroed == {name for name in found if "backward" in name or "sweep" in name}


def test_reading_shows():
    """Both instruments, of what is read: this shows that the tests above can fail."""
    assert "prediction" in " ".join(counted()["bare"]["wrong"])
    code = (
        "import torch, masked_loss_ext\n"
        "from closed_pages import closed_pages\n"
        "x = torch.randn(3, 1024)\n"
        "off = torch.tensor([[0], [1], [0]]).bool().expand(3, 1024)\n"
        "with closed_pages(x, off) as (closed, size):\n"
        "    print(size, flush=True)\n"
        "    torch.ops.masked_loss_ext.masked_squared_error(closed, x, None)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests/common")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert (done.stdout, done.returncode) == (b"4096\n", -signal.SIGSEGV), done.stderr


def test_what_lies_around_is_closed():
    """Other bytes than the tensor's: of a row that is shorter than its page, those of no tensor."""
    x = torch.randn(2, 1000)
    for at_end in (False, True):
        with closed_pages(x, torch.zeros(x.shape, dtype=torch.bool), at_end) as (copy, size):
            assert size == 0 and torch.equal(copy, x)
            end = copy.data_ptr() + copy.nbytes
            assert (end if at_end else copy.data_ptr()) % PAGE == 0
