# SPDX-License-Identifier: BSD-3-Clause
"""A copy of the working tree, in which lines may be wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .mutant import Mutant

HOME = Path(__file__).resolve().parents[2]
PLUGIN = "tools.mutation.first_failure"
TESTS_FAILED = (1, 2)  # pytest's codes; 2 where a file of tests cannot be read
TAIL = 4000  # characters of what a program said


class Ended(NamedTuple):
    code: int | None  # None: out of time
    said: str


class Tree:
    """``place`` becomes the same as ``source``, build outputs aside, and stays so but for the time
    in which a mutant is applied."""

    def __init__(self, source: Path, place: Path):
        self.source, self.place = source, place
        self.stale = True  # the library is not that of the sources
        self.failure = place.parent / "first_failure"
        self._copy()

    def _copy(self):
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=self.source,
            capture_output=True,
            check=True,
            text=True,
        )
        names = {name for name in listed.stdout.split("\0") if (self.source / name).is_file()}
        for name in names:
            # Dates of what is the same stay, for ninja.
            new, old = (self.source / name).read_bytes(), self.place / name
            if not old.is_file() or old.read_bytes() != new:
                old.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.source / name, old)
        for folder in {Path(name).parts[0] for name in names if "/" in name}:
            for path in (self.place / folder).rglob("*"):
                name = path.relative_to(self.place).as_posix()
                if path.is_file() and name not in names and not made(path):
                    path.unlink()

    @contextlib.contextmanager
    def applied(self, mutant: Mutant) -> Iterator[None]:
        path = self.place / mutant.place
        text = path.read_text()
        if text.count(mutant.right) != 1:
            raise ValueError(f"{mutant.place} must hold once what {mutant.what!r} replaces")
        native = mutant.place.startswith("csrc/")
        self.stale |= native
        try:
            path.write_text(text.replace(mutant.right, mutant.wrong))
            yield
        finally:
            path.write_text(text)
            self.stale |= native

    def build(self, seconds: float) -> Ended:
        """The library in place, where it is not that of the sources."""
        if not self.stale:
            return Ended(0, "")
        ended = self._run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds)
        self.stale = ended.code != 0
        return ended

    def test(self, tests: Sequence[str], seconds: float) -> tuple[Ended, str]:
        """Of the tests, until one fails: how that ended, and the name of the one that failed or
        ended the process."""
        self.failure.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        # Each test name is one argument, however many there are.
        arguments = self.place.parent / "arguments"
        arguments.write_text("\n".join(tests))
        ended = self._run([*command, "-p", PLUGIN, f"@{arguments}"], seconds, compiler=1)
        failed = ended.code is not None and (ended.code < 0 or ended.code in TESTS_FAILED)
        if ended.code not in (0, None) and not (failed and self.failure.is_file()):
            raise RuntimeError(f"pytest could not run ({ended.code}):\n{ended.said}")
        return ended, self.failure.read_text() if failed else ""

    def _run(self, command, seconds, compiler=None):
        # Inductor knows operators by name alone: what it made of others is not for these.
        inherited = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}
        environment = {
            **inherited,
            "PYTHONPATH": f"{self.place}{os.pathsep}{HOME}",  # home: of the plugin
            "PYTHONDONTWRITEBYTECODE": "1",
            "TORCH_EXTENSIONS_DIR": str(self.place.parent / "torch_extensions"),
            "MUTATION_FAILURE": str(self.failure),
        }
        if compiler and "CXX" in environment:  # inductor and the simulator take one word of it
            environment["CXX"] = environment["CXX"].split()[-1]
        log = self.place.parent / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=self.place,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, seconds)
        return Ended(code, log.read_text(errors="replace")[-TAIL:])


def _wait(process, seconds):
    """Its exit code; None where it took too long, and then nothing of it is left."""
    until = time.monotonic() + seconds
    try:
        return process.wait(until - time.monotonic())
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def made(path: Path) -> bool:
    """By a build or by Python."""
    return path.suffix in (".so", ".pyc")
