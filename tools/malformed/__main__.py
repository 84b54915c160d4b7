# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.malformed --calls 10000`` makes so many random malformed calls of every
operator of the library, private ones included, in child processes: wrong types, dtypes, shapes,
strides, devices, numbers and data, one to four of them in a call that is good else. Half of the
calls have their tensors between closed pages, so that who reads beyond one is killed.

A child that dies or hangs is counted, its call is printed, and another goes on behind it. Children
inherit the environment, a sanitizer in LD_PRELOAD for instance. ``--operator NAME --only N`` makes
one call again, with the same seed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.common.operator_calls import operators

from .. import records
from . import calls
from .child import Progress

TO_END_S = 120
TEXT_OF_A_DEATH = 6000  # characters of what a child said last


class Stopped(NamedTuple):
    """A call that did not return."""

    operator: str
    number: int
    why: str
    text: str

    @property
    def hangs(self) -> bool:
        return self.why.startswith("no end")


class Run:
    """All calls of all operators, in one child after another."""

    def __init__(self, operators: Sequence[str], each: int, seed: int, patience: float):
        self.operators, self.each, self.seed, self.patience = operators, each, seed, patience
        self.stopped: list[Stopped] = []
        self.said = ""

    def finish(self, folder: Path) -> list[dict[str, object]]:
        path = folder / "progress"
        self.progress = Progress(path, len(self.operators))
        while self.progress.at < len(self.operators) * self.each:
            self._child(path, folder / "said")
        return [self._row(i) for i in range(len(self.operators))]

    def command(self) -> list[str]:
        """Of a child, before what it is told."""
        return [sys.executable, "-m", "tools.malformed.child"]

    def _child(self, path: Path, log: Path) -> None:
        """Until it has made all calls, or until one of them stops it."""
        told = [str(path), str(self.seed), str(self.each), *self.operators]
        with log.open("w+") as said:
            child = subprocess.Popen([*self.command(), *told], stdout=said, stderr=said)
            why = self._watch(child)
            said.seek(0)
            text = said.read()
        self.said += text if not why else ""
        at = self.progress.at
        if not why:
            return
        if at == len(self.operators) * self.each:
            raise SystemExit(f"a child {why} after its last call:\n{text[-TEXT_OF_A_DEATH:]}")
        which, number = divmod(at, self.each)
        self.stopped.append(Stopped(self.operators[which], number, why, text[-TEXT_OF_A_DEATH:]))
        self.progress.at = at + 1

    def _watch(self, child: subprocess.Popen[bytes]) -> str:
        """How it ended; nothing where that is well."""
        at, since = -1, time.monotonic()
        while child.poll() is None:
            if self.progress.at != at or self.progress.begun != child.pid:
                at, since = self.progress.at, time.monotonic()
                self._show()
            # What a call may take is not what an interpreter takes to end on a busy machine.
            ending = self.progress.at == len(self.operators) * self.each
            patience = max(self.patience, TO_END_S) if ending else self.patience
            if time.monotonic() - since > patience:
                child.kill()
                child.wait()
                return f"no end after {patience:g} s"
            time.sleep(0.05)
        self._show()
        if child.returncode < 0:
            return f"killed by {signal.Signals(-child.returncode).name}"
        return f"ended with {child.returncode}" if child.returncode else ""

    def _show(self) -> None:
        if sys.stderr.isatty():
            done, all_of_them = self.progress.at, len(self.operators) * self.each
            print(f"\r{done} of {all_of_them} calls", end="", file=sys.stderr, flush=True)

    def _row(self, which: int) -> dict[str, object]:
        operator = self.operators[which]
        stopped = [one.hangs for one in self.stopped if one.operator == operator]
        counts = self.progress.counts(which)
        return {
            "operator": operator,
            "calls": self.each,
            **counts,
            "signals": stopped.count(False),
            "hangs": stopped.count(True),
        }


def table(rows: list[dict[str, object]]) -> str:
    lines = ["{:52}" + "{:>12}" * (len(rows[0]) - 1)]
    lines = [
        lines[0].format(*map(str, row)) for row in (rows[0].keys(), *(r.values() for r in rows))
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.malformed", description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="of each operator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--operator", action="append", choices=operators(), help="not all")
    parser.add_argument("--only", type=int, help="show and make this call alone, in this process")
    parser.add_argument("--patience", type=float, default=60, help="seconds that a call may take")
    parser.add_argument("--write", action="store_true", help="into docs/trust/malformed.csv")
    asked = parser.parse_args(arguments)
    chosen = asked.operator or operators()
    if asked.only is not None:
        for operator in chosen:
            call = calls.malformed(operator, asked.seed, asked.only)
            print(calls.described(call), flush=True)
            print(*calls.outcome(call))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        run = Run(chosen, asked.calls, asked.seed, asked.patience)
        rows = run.finish(Path(folder))
    print(table(rows))
    print(run.said, end="")
    for one in run.stopped:
        print(f"\n{one.operator} --seed {asked.seed} --only {one.number}: {one.why}\n{one.text}")
    if asked.write:
        print(records.write("malformed", rows))
    return 1 if run.stopped or any(row[calls.UNEXPLAINED] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
