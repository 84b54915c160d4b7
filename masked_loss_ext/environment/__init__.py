# SPDX-License-Identifier: BSD-3-Clause
"""What a report of a problem should tell: ``python -m masked_loss_ext``, ``show_config()``.

Imports nothing that can fail: the program also speaks where PyTorch or the library cannot load.
"""

import re
import sys

PROGRAM = re.compile(r"(-\w*m)?masked_loss_ext(\.__main__)?")


def is_program() -> bool:
    """Does this import belong to ``python -m masked_loss_ext``, which loads the package first?"""
    words = getattr(sys, "argv", [])  # a program that embeds Python may have none
    if words[:1] != ["-m"]:  # what stands there while Python looks for the module
        return False
    module = sys.orig_argv[-len(words)]  # behind it are the same words in both
    return PROGRAM.fullmatch(module) is not None


def show_config() -> str:
    """Environment report: versions, the library, instruction set, CUDA, each operator's way.

    What ``python -m masked_loss_ext`` prints; bug reports should have it, logs of a training run
    may. Nothing in it is private: the home folder is ``~``, other folders are cut to their last
    two names, and no environment variables but the package's own are read.

    >>> mle.show_config().splitlines()[0] == f"masked_loss_ext {mle.__version__}"
    True

    Returns:
        A text of some 30 lines; ``python -m masked_loss_ext --json`` prints the same for programs.
    """
    from ._facts import collect
    from ._text import rendered

    return rendered(collect())


def main() -> int:
    from ._command import run

    return run(sys.argv[1:])
