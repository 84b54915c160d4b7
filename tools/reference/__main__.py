# SPDX-License-Identifier: BSD-3-Clause
"""Print a page of the reference, or write all of them into a folder, as `make docs` does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .overview import every_page


def write(folder: Path) -> None:
    """All pages; files that do not change keep their date, those of names that are gone go."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = every_page()
    for old in folder.glob("*.rst"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.reference", description=__doc__)
    parser.add_argument("name", nargs="?", help="of a page: masked_cross_entropy")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="all pages, as files")
    options = parser.parse_args(arguments)
    if options.write:
        write(options.write)
        return
    pages = every_page()
    if f"{options.name}.rst" not in pages:
        sys.exit("one of: " + " ".join(sorted(name[:-4] for name in pages)))
    print(pages[f"{options.name}.rst"], end="")


if __name__ == "__main__":
    main()
