# SPDX-License-Identifier: BSD-3-Clause
"""The repository's own rules about its text: no path of one machine, a licence line per source."""

import re
import subprocess
import sys
from pathlib import Path

MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|opt|root|home/\w|tmp/\w|mnt|Users/\w)[\w/.-]*")
SOURCES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}


def problems(path):
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:  # a picture
        return
    for number, line in enumerate(lines, 1):
        if path != Path(".ci/check_text.py") and MACHINE_PATH.search(line):
            yield f"{path}:{number}: names a path of one machine: {line.strip()}"
    if path.suffix in SOURCES and "SPDX-License-Identifier: BSD-3-Clause" not in "".join(lines[:3]):
        yield f"{path}:1: no SPDX line"


def main():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    found = [
        p for name in tracked.splitlines() if Path(name).is_file() for p in problems(Path(name))
    ]
    print("\n".join(found) if found else f"text of {len(tracked.splitlines())} files: ok")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
