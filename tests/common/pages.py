# SPDX-License-Identifier: BSD-3-Clause
"""The pages of the documentation, and the code in them.

Every fenced block names its language. What is in a block of

    ```python             is run, in the page's own namespace, which later blocks share
    ```python not-run     is shown alone: needs a machine, a package or a file that is not here
    ```text output        is what the block before it printed; "..." stands for anything
    ```pycon              is run in the same namespace as a doctest, outputs compared
    ```sh, cpp, text ...  is shown
"""

import contextlib
import doctest
import io
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    p.relative_to(ROOT).as_posix() for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"))
)
# What a page may import beyond the package; where it is missing the block is left out, by name.
OPTIONAL = ("accelerate", "lightning", "transformers", "trl")
SHOWN = set("sh cpp cmake console csv diff json make math text toml yaml".split())
FENCE = re.compile(r"^( *)(`{3,}|~{3,}) *([^\n`]*)\n(.*?)^\1\2[`~]* *$", re.MULTILINE | re.DOTALL)
SAME = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    language: str
    words: tuple[str, ...]  # after the language
    text: str
    line: int  # of the page, where the text begins

    @property
    def runs(self):
        return self.language in ("python", "pycon") and "not-run" not in self.words


def blocks(text):
    """Every fenced block of a page, in order."""
    for match in FENCE.finditer(text):
        language, *words = match[3].split() or [""]
        line = text.count("\n", 0, match.start(4)) + 1
        yield Block(language, tuple(words), textwrap.dedent(match[4]), line)


def unknown(block):
    """What is wrong with how a block is marked, or nothing."""
    if block.language.startswith("{"):  # a directive of the site's generator
        return "python code in a directive is not run" if "python" in block.words else ""
    allowed = {"python": ("not-run",), "pycon": ("not-run",), "text": ("output",)}
    if block.language not in SHOWN | set(allowed):
        return f"no language of {sorted(SHOWN | set(allowed))}"
    wrong = set(block.words) - set(allowed.get(block.language, ()))
    return f"unknown words {sorted(wrong)}" if wrong else ""


def run(text, name):
    """Run a page's code. Returns the optional packages that were missing."""
    namespace, missing, printed = {"__name__": "__main__"}, set(), None
    for block in blocks(text):
        place = f"{name}:{block.line}"
        if block.words == ("output",):
            assert printed is not None, f"{place}: output of no block"
            compare(block.text, printed, place)
        printed = None
        if not block.runs:
            continue
        try:
            printed = (run_session if block.language == "pycon" else run_block)(
                block, namespace, name
            )
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            missing.add(error.name)
    return missing


def run_block(block, namespace, name):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):  # lines of a traceback are those of the page
        exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
    return out.getvalue()


def run_session(block, namespace, name):
    test = doctest.DocTestParser().get_doctest(block.text, {}, name, name, block.line - 1)
    test.globs = namespace  # shared with the other blocks, not a copy
    report = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=SAME)
    runner.run(test, out=report.append, clear_globs=False)
    assert not runner.failures, "".join(report)


def compare(expected, printed, place):
    same = doctest.OutputChecker().check_output(expected, printed, SAME)
    assert same, f"{place}: the page says\n{expected}\nbut its code printed\n{printed}"
