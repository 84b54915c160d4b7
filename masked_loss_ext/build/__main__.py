# SPDX-License-Identifier: BSD-3-Clause
"""``python masked_loss_ext/build --cmake`` writes the lists of sources.py as CMake code."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from build.sources import cmake_lists  # noqa: E402

if sys.argv[1:] != ["--cmake"]:
    sys.exit("usage: python masked_loss_ext/build --cmake")
sys.stdout.buffer.write(os.fsencode(cmake_lists()))  # paths need not be UTF-8
