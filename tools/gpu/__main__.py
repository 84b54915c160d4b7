# SPDX-License-Identifier: BSD-3-Clause
"""Build, ask, test, sanitize and measure on a machine with a GPU, within a given time.

Each step goes on when another fails. Logs, figures.csv and summary.txt go to --results, else $OUT,
else benchmarks/results/<name of the GPU>; the summary is printed last. Nothing is installed and
nothing outside the repository is needed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from . import about, summary
from .reading import Outcome
from .steps import ROOT, Command, Step, all_steps

BUDGET_S = 465
LEAST_S = 5  # with less, a command is not begun


def parser() -> argparse.ArgumentParser:
    names = [step.name for step in all_steps(Path("."), 1)]
    top = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    top.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    top.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=", ".join(names))
    top.add_argument("--budget", type=int, default=BUDGET_S, help=f"seconds (default {BUDGET_S})")
    top.add_argument("--results", type=Path, help="folder for logs and figures")
    return top


def results_folder(wanted: Path | None, gpus: Sequence[str]) -> Path:
    if wanted is not None:
        return wanted
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return ROOT / "benchmarks" / "results" / about.folder_name(gpus)


def environment_of(command: Command) -> dict[str, str]:
    ours = {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "TORCH_EXTENSIONS_DIR": str(ROOT / "build" / "torch_extensions"),
    }
    return {**os.environ, **ours, **(command.environment or {})}


def shown(command: Command) -> str:
    words = [f"{key}={value}" for key, value in (command.environment or {}).items()]
    line = [Path(word).name if word == sys.executable else word for word in command.line]
    return " ".join([*words, shlex.join(line)])


def wait_for(command: Command, seconds: float, output: BinaryIO) -> str:
    try:
        process = subprocess.Popen(
            command.line,
            cwd=ROOT,
            env=environment_of(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return f"failed (cannot be started: {error.strerror})"
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"out of time after {seconds:.0f} s"
    return "ok" if code == 0 else f"failed ({code})"


def run_command(command: Command, seconds: float, log: Path) -> Outcome:
    """Its output goes to ``log``; at the end of its time it is ended with all that it started."""
    if command.missing:
        return Outcome(command.line, f"missing: {command.missing}", 0, "")
    if seconds < LEAST_S:
        return Outcome(command.line, "no time left", 0, "")
    begin = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n$ {shown(command)}\n".encode())
        file.flush()
        start = file.tell()
        status = wait_for(command, seconds, file)
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    return Outcome(command.line, status, time.monotonic() - begin, text)


def run_step(
    step: Step,
    deadline: float,
    log: Path,
    run: Callable[[Command, float, Path], Outcome] = run_command,
    now: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Its commands one after another, each with what is left less some for those behind it."""
    log.write_text("".join(f"{note}\n" for note in step.notes))
    outcomes = []
    for place, command in enumerate(step.commands):
        left = deadline - now()
        later = len(step.commands) - place - 1
        # Half of an equal share is kept for each of those that follow.
        kept = later * left / (2 * (later + 1))
        outcomes.append(run(command, left - kept, log))
        print(f"  {outcomes[-1].status}: {shown(command)}", flush=True)
    return outcomes


def deadlines(steps: Sequence[Step], begin: float, budget: float) -> list[float]:
    """When each step has to end so that all later ones have their own seconds."""
    scale = min(1.0, budget / sum(step.seconds for step in steps))
    later = [sum(step.seconds for step in steps[place + 1 :]) for place in range(len(steps))]
    return [begin + budget - scale * seconds for seconds in later]


def rehearse(steps: Sequence[Step], results: Path, begin: float, budget: float) -> None:
    print(f"results would go to {results}: summary.txt, figures.csv, a log for each step")
    for step, deadline in zip(steps, deadlines(steps, begin, budget), strict=True):
        print(f"{step.name}: {step.about}; until second {deadline - begin:.0f} at the latest")
        for note in step.notes:
            print(f"  note: {note}")
        for command in step.commands:
            missing = f"NOT RUN, {command.missing} is missing: " if command.missing else ""
            print(f"  {missing}{shown(command)}")


def main(arguments: Sequence[str] | None = None) -> int:
    wanted = parser().parse_args(arguments)
    begin = time.monotonic()
    gpus = about.gpu_lines()
    results = results_folder(wanted.results, gpus).resolve()
    steps = all_steps(results, len(os.sched_getaffinity(0)))
    steps = [step for step in steps if not wanted.only or step.name in wanted.only]
    if wanted.dry_run:
        rehearse(steps, results, begin, wanted.budget)
        return 0
    if not gpus:
        print("no GPU is found (nvidia-smi names none); --dry-run says what would be done")
        return 1
    results.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for step, deadline in zip(steps, deadlines(steps, begin, wanted.budget), strict=True):
        print(f"[{time.monotonic() - begin:.0f} s] {step.name}: {step.about}", flush=True)
        outcomes[step.name] = run_step(step, deadline, results / f"{step.name}.log")
    lines = summary.lines_of(gpus, outcomes, results, time.monotonic() - begin)
    (results / "summary.txt").write_text("\n".join(lines) + "\n")
    print("\n" + "\n".join(lines))
    ends = [one.status for step in outcomes.values() for one in step]
    return int(any(not end.startswith(("ok", "missing")) for end in ends))


if __name__ == "__main__":
    sys.exit(main())
