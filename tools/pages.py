# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.pages docs/guide/masks.md ...`` executes the Python of pages, block by block,
and compares what a block prints with the ``text`` block behind it; ``--write`` puts it there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A block, and what it prints where the page shows that.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n(```text\n)(.*?)^```\n)?", re.M | re.S)
# Packages that a page may need beyond those of the library, and who brings them.
OPTIONAL = {"transformers": "hf", "accelerate": "hf", "matplotlib": "docs"}


@dataclass(frozen=True)
class Block:
    code: str
    line: int  # of the page, where the code begins
    shown: str | None  # what the page says it prints


def blocks(text: str) -> list[Block]:
    return [
        Block(found[1], text.count("\n", 0, found.start(1)), found[3])
        for found in BLOCK.finditer(text)
    ]


def same_text(printed: str, shown: str) -> bool:
    one, other = ([line.rstrip() for line in text.strip().split("\n")] for text in (printed, shown))
    return one == other


def execute(page: Path) -> tuple[list[str], set[str]]:
    """What each block prints, the later ones with the names of the earlier; and the packages that
    some block would need and did not find."""
    namespace: dict = {"__name__": "__page__"}
    printed, missing = [], set()
    for block in blocks(page.read_text()):
        out = io.StringIO()
        code = "\n" * block.line + block.code  # so that an error names the line of the page
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(code, str(page), "exec"), namespace)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            missing.add(error.name)
        printed.append(out.getvalue())
    return printed, missing


def differences(page: Path, printed: Sequence[str]) -> list[str]:
    return [
        f"{page}:{block.line}: prints\n{text}and not\n{block.shown}"
        for block, text in zip(blocks(page.read_text()), printed, strict=True)
        if block.shown is not None and not same_text(text, block.shown)
    ]


def rewritten(text: str, printed: Sequence[str]) -> str:
    """The page with what its blocks print in the places that are there for it."""
    left = iter(printed)

    def shown(found: re.Match[str]) -> str:
        output = next(left)
        if found[3] is None:
            return found[0]
        lines = "\n".join(line.rstrip() for line in output.strip("\n").split("\n"))
        return f"```python\n{found[1]}```\n\n```text\n{lines}\n```\n"

    return BLOCK.sub(shown, text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.pages", description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="put the output into the page")
    options = parser.parse_args(arguments)
    wrong = []
    for page in options.pages:
        printed, missing = execute(page)
        if options.write and not missing:
            page.write_text(rewritten(page.read_text(), printed))
        found = differences(page, printed) if not missing else []
        wrong += found
        verdict = f"{len(found)} differ" if found else "ok"
        print(f"{page}: {len(printed)} blocks, {verdict}", *sorted(missing), flush=True)
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
