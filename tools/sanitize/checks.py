# SPDX-License-Identifier: BSD-3-Clause
"""What is run under which sanitizer."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .instruments import (
    ADDRESS,
    MEMORY,
    THREAD,
    torch_free_program,
    with_torch_program,
)

LEVELS = ("default", "avx2", "avx512")  # one that the machine has not is run at its best

# Of every room: its values, its layouts, its numbers at the edge, what it refuses.
SHORT_TESTS = (
    "tests/elementwise/test_hand_worked.py",
    "tests/elementwise/test_mask_laws.py",
    "tests/elementwise/test_errors.py",
    "tests/cross_entropy/test_hand_worked.py",
    "tests/cross_entropy/test_layouts.py",
    "tests/cross_entropy/test_empty.py",
    "tests/cross_entropy/test_sweep.py",
    "tests/cross_entropy_terms/test_errors.py",
    "tests/linear_cross_entropy/test_hand_worked.py",
    "tests/linear_cross_entropy/test_excluded.py",
    "tests/attention/test_block_mask_ops.py",
    "tests/repetition/test_values.py",
)
# But not how many pages a call touches, which a sanitizer changes.
TESTS = (
    *SHORT_TESTS,
    "tests/elementwise/test_values.py",
    "tests/elementwise/test_strides.py",
    "tests/elementwise/test_element_losses.py",
    "tests/elementwise/test_mask_dtypes.py",
    "tests/cross_entropy/test_values.py",
    "tests/cross_entropy/test_numbers.py",
    "tests/cross_entropy/test_digits.py",
    "tests/cross_entropy/test_inplace.py",
    "tests/cross_entropy/test_errors.py",
    "tests/cross_entropy/test_sweep_errors.py",
    "tests/cross_entropy/test_shift.py",
    "tests/cross_entropy/test_vocab_parallel.py",
    "tests/cross_entropy/test_vocab_parallel_errors.py",
    "tests/cross_entropy_terms/test_values.py",
    "tests/linear_cross_entropy/test_values.py",
    "tests/linear_cross_entropy/test_dtypes.py",
    "tests/linear_cross_entropy/test_errors.py",
    "tests/attention/test_block_mask_errors.py",
    "tests/attention/test_packed_layout.py",
    "tests/repetition/test_errors.py",
)
SIMULATOR_TESTS = (
    "tests/cuda/test_block_mask.py",
    "tests/cuda/test_repetition.py",
    "tests/cuda/test_cross_entropy.py",
    "tests/cuda/test_cross_entropy_terms.py",
    "tests/cuda/test_linear_cross_entropy.py",
)


@dataclass(frozen=True)
class Check:
    """A command, how what it did is counted, and what it must say where it is wrong on purpose."""

    what: str
    sanitizer: str
    unit: str
    line: Sequence[str]
    count: str  # a pattern; the numbers that it finds are added up
    settings: Mapping[str, str]
    reported: str = ""


def wrong_line(sanitizer: str, line: Sequence[str], kind: str, said: str) -> Check:
    words = [*line, "--wrong", kind]
    return Check(f"a wrong line ({kind}) is reported", sanitizer, "runs", words, "", {}, said)


def without_torch(sanitizer: str, line: Sequence[str], level: str = "") -> Check:
    settings = {"MASKED_LOSS_EXT_CPU_CAPABILITY": level} if level else {}
    what = "every operator, 1 to 8 threads" + (f", {level}" if level else "")
    return Check(what, sanitizer, "calls", line, r"^(\d+) calls", settings)


def pytest_check(what: str, files: Sequence[str], environment: Mapping[str, str]) -> Check:
    processes = ["-n", str(len(os.sched_getaffinity(0))), "--dist", "loadfile"]
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *processes, *files]
    return Check(what, "address, undefined", "tests", line, r"(\d+) passed", environment)


def address_checks(short: bool) -> Iterator[Check]:
    name = "address, undefined"
    library = ADDRESS.imported_library()
    program = [str(torch_free_program(ADDRESS)), str(library)]
    yield wrong_line(name, program, "overflow", "heap-buffer-overflow")
    yield wrong_line(name, program, "undefined", "shift exponent")
    for level in ("",) if short else LEVELS:
        yield without_torch(name, [*program, *(["--small"] if short else [])], level)
    environment = ADDRESS.environment()
    if not short:
        with_torch = str(with_torch_program(ADDRESS, library))
        yield Check("C++ through PyTorch", name, "checks", [with_torch], r"^(ok)", environment)
    yield pytest_check("tests", SHORT_TESTS if short else TESTS, environment)
    if not short:
        yield pytest_check("tests of the CUDA sources, simulated", SIMULATOR_TESTS, environment)
    line = [sys.executable, "-m", "tools.malformed", "--calls", "20" if short else "400"]
    line += ["--patience", "300"]  # under a sanitizer a call takes several times as long
    yield Check("malformed calls", name, "calls", line, r"^\w+ +(\d+) ", environment)


def thread_checks(short: bool) -> Iterator[Check]:
    program = [str(torch_free_program(THREAD)), str(THREAD.library())]
    yield wrong_line("thread", program, "race", "data race")
    yield without_torch("thread", [*program, *(["--small"] if short else [])])


def memory_checks(short: bool) -> Iterator[Check]:
    if shutil.which(MEMORY.compiler) is None:
        print(f"NOT DONE: memory, no {MEMORY.compiler} here")
        return
    program = [str(torch_free_program(MEMORY)), str(MEMORY.library())]
    yield wrong_line("memory", program, "uninitialised", "use-of-uninitialized-value")
    # A large gradient of fresh memory has rows that nobody writes: the system has zeroed them.
    yield without_torch("memory", [*program, "--small"])


CHECKS = {"address": address_checks, "thread": thread_checks, "memory": memory_checks}
SHORT = ("address", "thread")
