# SPDX-License-Identifier: BSD-3-Clause
"""Run ninja on a build file: what it will do is said before, how far it is meanwhile, and the
compiler's own words if it fails."""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if __package__:
    from ._toolchain import BuildError, Toolchain, answer_of, say, setting, show
else:  # imported as a plain file, by CMake and setup.py
    from _toolchain import BuildError, Toolchain, answer_of, say, setting, show

SECONDS_PER_CPU_SOURCE, SECONDS_PER_CUDA_SOURCE = 8, 70  # rough, for the progress message alone
CANNOT_WRITE = re.compile("No space left on device|Disk quota exceeded|Read-only file system")


@dataclass
class Ninja:
    tools: Toolchain
    folder: Path
    lock: int | None  # inherited by all that ninja starts, see _files.locked
    advice: str  # where the folder cannot be written to

    def bring_up_to_date(self, note):
        command = [self.tools.ninja, "-C", str(self.folder), *_jobs()]
        steps = answer_of([*command, "-n"]).stdout
        if "no work to do" in steps:
            return
        kinds = "the CPU kernels"
        if self.tools.cuda_home:
            kinds += f" and the CUDA kernels ({', '.join(self.tools.architectures)})"
        seconds, torch = _estimate(steps), self.tools.torch_version
        say(f"compiling {kinds} with PyTorch {torch}, takes about {seconds} s{note}")
        started = time.monotonic()
        self._run(command, started)
        say(f"compiled in {time.monotonic() - started:.0f} s")

    def _run(self, command, started):
        verbose = setting("MASKED_LOSS_EXT_VERBOSE") == "1"
        # Errors in English, so that a full disk is known by its name.
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
        output = []
        with subprocess.Popen(
            [*command, *(["-v"] if verbose else [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            umask=0o022,
            pass_fds=[] if self.lock is None else [self.lock],
        ) as ninja:
            for line in ninja.stdout:
                output.append(line)
                _progress(line, started, verbose)
        if _is_terminal():
            show("\r\033[K", end="")
        if ninja.returncode:
            raise BuildError(self._disk_trouble(output) or failure(output, self.folder))

    def _disk_trouble(self, output):
        found = CANNOT_WRITE.search("".join(output))
        if found is None:
            return None
        scratch = os.environ.get("TMPDIR") or tempfile.gettempdir()
        return (
            f"the compiler could not write to {self.folder} or, for its own files, to {scratch}: "
            f"{found[0]}; {self.advice} (or TMPDIR)"
        )


def _jobs():
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if not wanted:
        return []
    if not re.fullmatch("0*[1-9][0-9]{0,5}", wanted):
        raise BuildError(f"MAX_JOBS must be a whole number from 1 on, got {wanted!r}")
    return ["-j", wanted]


def _estimate(steps):
    """Seconds, roughly, for ninja's list of steps."""
    cuda = len(re.findall(r"^\[.*bin/nvcc ", steps, re.M))
    cpu = len(re.findall(r"^\[.* -c .*\.cpp ", steps, re.M)) - cuda
    cores = len(os.sched_getaffinity(0))
    longest = SECONDS_PER_CUDA_SOURCE if cuda else SECONDS_PER_CPU_SOURCE
    total = cuda * SECONDS_PER_CUDA_SOURCE + cpu * SECONDS_PER_CPU_SOURCE
    return max(total // cores, longest)


def _is_terminal():
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def _progress(line, started, verbose):
    step = re.match(r"\[\d+/\d+\]", line)
    if verbose:
        show(line, end="")
    elif step and _is_terminal():
        seconds = time.monotonic() - started
        show(f"\rmasked_loss_ext: compiling {step[0]} {seconds:.0f} s", end="")


def failure(output, folder):
    """The first failed step in the compiler's own words, without the long command line."""
    start = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if start is None:
        return f"ninja failed in {folder}: " + "".join(output[-3:]).strip()
    step = re.sub(r"^FAILED:\s*(\[code=\d+\])?", "", output[start]).strip()
    words = [line for line in output[start + 2 :] if not line.startswith("ninja:")]
    return f"the compiler failed at {step}:\n" + "".join(words[:30])
