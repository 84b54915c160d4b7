# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.installing FILE...``: pip, which says what it is at, for make.

The packages of requirements.txt are some 90 and, with a CUDA build of PyTorch, several GB: on a
terminal a line counts them, large downloads are named, and of a failure pip's last lines are shown.
Runs before anything is installed: Python alone.
"""

import re
import subprocess
import sys
import time

LARGE = re.compile(r"^\s*Downloading (\S+) .*?\((\d{3,}(?:\.\d+)? MB|[\d.]+ GB)\)")
STEP = re.compile(r"^(?:Collecting|Requirement already satisfied:|Processing|Looking in) ?(\S*)")
LINES = 15  # of a failure


def installs(files):
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *(word for file in files for word in ("-r", file))]
    return run(command, sum(_count(file) for file in files))


def _count(file):
    """Packages that are pinned, each once however many Pythons it is pinned for."""
    with open(file) as text:
        return len({line.partition("==")[0].lower() for line in text if "==" in line})


def run(command, count):
    """pip's exit status."""
    started, said, names = time.monotonic(), [], set()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        for line in pip.stdout:
            said = [*said[1 - LINES :], line]
            if large := LARGE.match(line):
                _show(f"      {large[1].rpartition('/')[2]}, {large[2]}", "\n")
            if (step := STEP.match(line)) and step[1]:
                names.add(re.split(r"[<>=!~;\[ ]", step[1])[0].lower())
                seconds = time.monotonic() - started
                _show(f"      {min(len(names), count)}/{count} packages, {seconds:.0f} s", "")
            if line.startswith("Installing collected"):
                _show("      unpacking", "")
    _show("", "")
    if pip.returncode:
        print("".join(said), file=sys.stderr, end="")
    return pip.returncode


def _show(text, end):
    """A line that stays, or, on a terminal alone, one that the next writes over."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K", end=end, file=sys.stderr, flush=True)
    elif end:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(installs(sys.argv[1:]))
