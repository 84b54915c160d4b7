# SPDX-License-Identifier: BSD-3-Clause
"""Build the library with sanitizers and run tests under them; exit 1 where one reports something.

Memory and undefined behaviour (AddressSanitizer and UndefinedBehaviorSanitizer): every operator
without PyTorch, the C++ test, a share of the Python tests, the CUDA sources in the simulator,
random malformed calls. Threads (ThreadSanitizer) and uninitialised memory (MemorySanitizer, where
clang is): every operator without PyTorch, of whose threads and memory these know nothing. Each is
shown a wrong line first.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .. import records
from ..instrument import ROOT
from .checks import CHECKS, SHORT, Check

REPORT = re.compile(
    r"ERROR: (?:Address|Leak)Sanitizer|WARNING: (?:Thread|Memory)Sanitizer|runtime error:"
)
OPTIONS = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS", "MSAN_OPTIONS", "LSAN_OPTIONS")
LOGS = ROOT / "build" / "instrumented" / "logs"
SHOWN = 6000  # characters of what is reported
SECONDS = 3600


def seconds_of_children() -> float:
    """Of processors, all together: a machine that others use too has no other measure."""
    used = os.times()
    return used.children_user + used.children_system


def run(check: Check) -> tuple[int, int, str]:
    """(how many, findings, what it said)."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in LOGS.glob("report.*"):
        old.unlink()
    environment = {**os.environ, **check.settings}
    for name in OPTIONS:  # in files: tests catch what their processes say
        ours = f"log_path={LOGS / 'report'}:print_stacktrace=1:halt_on_error=1"
        environment[name] = ":".join(filter(None, [environment.get(name), ours]))
    with (LOGS / "said").open("w+", errors="replace") as said:
        command = [*check.line]
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=said, stderr=said, timeout=SECONDS
            ).returncode
        except subprocess.TimeoutExpired:
            code = -1
        said.seek(0)
        text = said.read()
    text += "".join(path.read_text(errors="replace") for path in sorted(LOGS.glob("report.*")))
    return judged(check, code, text)


def judged(check: Check, code: int, text: str) -> tuple[int, int, str]:
    reports = len(REPORT.findall(text))
    if check.reported:
        return 1, int(code == 0 or check.reported not in text), text
    found = re.findall(check.count, text, re.M)
    count = sum(int(one) if one.isdigit() else 1 for one in found)
    return count, max(reports, int(code != 0), int(count == 0)), text


def row_of(check: Check, count: int, findings: int, seconds: float) -> dict[str, object]:
    return {
        "what": check.what,
        "sanitizer": check.sanitizer,
        "count": count,
        "unit": check.unit,
        "findings": findings,
        "processor seconds": round(seconds),
    }


def chosen(names: Iterable[str], short: bool) -> Iterator[Check]:
    for name in names:
        print(f"{name}: compiling what is not compiled yet", flush=True)
        yield from CHECKS[name](short)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.sanitize", description=__doc__)
    parser.add_argument("--short", action="store_true", help="what fits every change, 3 minutes")
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), help="these sanitizers")
    parser.add_argument("--write", action="store_true", help="into docs/trust/sanitize.csv")
    asked = parser.parse_args(arguments)
    if asked.write and (asked.short or asked.only):
        parser.error("--write is for the whole of it, without --short and --only")
    rows = []
    begin = time.monotonic()
    for check in chosen(asked.only or (SHORT if asked.short else CHECKS), asked.short):
        print(f"[{time.monotonic() - begin:4.0f} s] {check.sanitizer}: {check.what}", flush=True)
        since = seconds_of_children()
        count, findings, text = run(check)
        rows.append(row_of(check, count, findings, seconds_of_children() - since))
        print(f"         {count} {check.unit}, {findings} findings", flush=True)
        if findings:
            print(text[-SHOWN:], flush=True)
    if asked.write:
        print(records.write("sanitize", rows).relative_to(Path.cwd()))
    findings = sum(int(str(row["findings"])) for row in rows)
    print(f"{len(rows)} checks, {findings} findings, {time.monotonic() - begin:.0f} s")
    return int(findings > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
