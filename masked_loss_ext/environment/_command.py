# SPDX-License-Identifier: BSD-3-Clause
"""The command line of ``python -m masked_loss_ext``."""

import argparse
import json

from ._facts import collect
from ._text import rendered

DESCRIPTION = """What a report of a problem should tell: versions, how the library was built and
loaded, instruction set, CUDA, and what each operator takes. Exit status 1 where the library cannot
be loaded."""


def run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m masked_loss_ext", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="the same for programs")
    parser.add_argument("--build", action="store_true", help="compile the library if need be")
    options = parser.parse_args(arguments)
    facts = collect(may_compile=options.build)
    print(json.dumps(facts, indent=2) if options.json else rendered(facts))
    return int(facts["library"]["problem"] is not None)
