# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.scale`` prints the tables; ``--write`` puts them into docs/scale.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import tables

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "scale.md"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.scale", description=tables.__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    what.add_argument("--check", action="store_true", help="compare them with docs/scale.md")
    options = parser.parse_args(arguments)
    if not (options.write or options.check):
        print("\n".join(f"{name}\n{tables.table(name)}" for name in tables.TABLES))
        return
    text = DOCUMENT.read_text()
    fresh = tables.regenerate(text)
    if options.write:
        DOCUMENT.write_text(fresh)
    elif fresh != text:
        sys.exit(f"{DOCUMENT.name} differs from the formulas; run `python -m tools.scale --write`")


if __name__ == "__main__":
    main()
