# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.malformed.child PROGRESS SEED CALLS OPERATOR...``: makes the calls, one after
another, from the one that PROGRESS says on. That file is the memory which its parent shares: it
says what the child was at when it was killed."""

from __future__ import annotations

import faulthandler
import mmap
import os
import resource
import sys
import warnings
from pathlib import Path

from . import calls

# What a call may take beyond what the process has; of more than there is PyTorch says so.
MEMORY = 4 << 30
COUNTED = (calls.REFUSED, calls.ACCEPTED, calls.UNEXPLAINED)


class Progress:
    """The number of the call under way, the child that is at it, what calls came to so far."""

    def __init__(self, path: Path, operators: int):
        size = 8 * (2 + len(COUNTED) * operators)
        if not path.exists():
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self.numbers = memoryview(mmap.mmap(file.fileno(), size)).cast("q")

    @property
    def at(self) -> int:
        return self.numbers[0]

    @at.setter
    def at(self, number: int) -> None:
        self.numbers[0] = number

    @property
    def begun(self) -> int:
        """The process that has imported all it needs."""
        return self.numbers[1]

    @begun.setter
    def begun(self, process: int) -> None:
        self.numbers[1] = process

    def count(self, operator: int, what: str) -> None:
        self.numbers[2 + operator * len(COUNTED) + COUNTED.index(what)] += 1

    def counts(self, operator: int) -> dict[str, int]:
        first = 2 + operator * len(COUNTED)
        return dict(zip(COUNTED, self.numbers[first : first + len(COUNTED)], strict=True))


def bound_memory() -> None:
    """Not beneath a sanitizer, whose shadow takes terabytes of addresses; it has a bound itself."""
    if "asan" in os.environ.get("LD_PRELOAD", "") or "ASAN_OPTIONS" in os.environ:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def main(path: str, seed: str, each: str, *operators: str) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    bound_memory()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    progress = Progress(Path(path), len(operators))
    progress.begun = os.getpid()
    while progress.at < len(operators) * int(each):
        which, number = divmod(progress.at, int(each))
        call = calls.malformed(operators[which], int(seed), number)
        what, text = calls.outcome(call)
        progress.count(which, what)
        if what == calls.UNEXPLAINED:
            print(f"call {number}, {text:.500}\n{calls.described(call)}", flush=True)
        progress.at += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
