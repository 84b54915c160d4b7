# SPDX-License-Identifier: BSD-3-Clause
"""A C++ compiler that does not optimise, for tests of how the library is packaged and loaded."""

import os


def quick_compiler(folder):
    """Put it there as c++, and return a PATH on which it comes first."""
    program = folder / "c++"
    # Behind the flags of the build, so that it is the last -O that counts.
    program.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX") or "g++"} "$@" -O0\n')
    program.chmod(0o755)
    return os.pathsep.join((str(folder), os.environ.get("PATH") or os.defpath))
