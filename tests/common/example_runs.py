# SPDX-License-Identifier: BSD-3-Clause
"""An example as a user starts it, and the figures of the line that it ends with."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 600  # seconds; a quick run takes 5 to 40 on two cores that nobody else uses
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def run_example(name, *arguments):
    """What it printed; it must show a progress bar and fail at nothing."""
    line = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+/\d+", done.stderr + done.stdout), "no progress was shown"
    return done.stdout


def last_figures(text, start):
    """Of the last line, which begins with these words."""
    line = text.rstrip().splitlines()[-1]
    assert line.startswith(start), line
    return [float(figure) for figure in NUMBER.findall(line[len(start) :])]
