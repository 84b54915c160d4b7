# SPDX-License-Identifier: BSD-3-Clause
"""Formulas as MathML Core, made when the site is built: browsers set it without a script.

The font that they need for it (sums, brackets that grow) is STIX Two Math, cut to what formulas use
and put beside the pages: few systems without an office suite have one.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ExtensionError

FUNCTIONS = "arg|cos|exp|ln|log|max|min|sin|sup|tanh"
OPENING = r"(?=<mo[^>]*>(?:\(|&#x00028;))"
GLYPHS = [
    *range(0x20, 0x7F), *range(0xA0, 0x100), *range(0x2B0, 0x400), *range(0x2000, 0x2070),
    *range(0x2100, 0x2400), *range(0x27C0, 0x2AFF), *range(0x1D400, 0x1D800),
]  # fmt: skip


def mathml(latex: str, display: str) -> str:
    latex = re.sub(r"\s+", " ", latex.strip())
    try:
        made = _tidied(convert(_prepared(latex), display=display))
    except Exception as error:
        raise ExtensionError(f"formula that latex2mathml does not know: {latex}") from error
    if "\\" in made:
        raise ExtensionError(f"a command that latex2mathml does not know: {latex} gives {made}")
    return made


def _prepared(latex: str) -> str:
    """What latex2mathml takes literally or gives no space to."""
    latex = re.sub(r"\\text\{[^}]*\}", lambda text: text[0].replace(r"\_", "_"), latex)
    return latex.replace(r"\arg", r"\operatorname{arg}")


def _tidied(made: str) -> str:
    """Words as words, and the space around names of functions that TeX leaves."""
    letters = r"<mrow>((?:<mi mathvariant=\"normal\">\w</mi>){2,})</mrow>"
    made = re.sub(letters, lambda word: f"<mi>{re.sub('<[^>]*>', '', word[1])}</mi>", made)
    thin, none = 'lspace="0.167em" rspace="0.167em"', 'lspace="0.167em" rspace="0"'
    made = re.sub(rf"<m[io]>({FUNCTIONS})</m[io]>{OPENING}", rf"<mo {none}>\1</mo>", made)
    made = re.sub(rf"<m[io]>({FUNCTIONS})</m[io]>", rf"<mo {thin}>\1</mo>", made)
    # A bracket with an index does not grow: the index goes to an empty box beside it.
    raised = r'\2<\1><mspace width="0" height="1em" depth="0.4em"/>'
    made = re.sub(r"<(msup|msub)>(<mo minsize[^>]*>[^<]*</mo>)", raised, made)
    bars = "(?:&#x0007C;|&#x02016;|[|])"  # of an absolute value or a norm
    made = re.sub(
        rf"<mo[^>]*>({bars})</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>', made
    )
    made = made.replace('<mo accent="true">&#x02015;</mo>', '<mo class="bar">&#x0203E;</mo>')
    return made.replace("<mi>:</mi>", "<mo>:</mo>")


def visit_inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block(self, node: nodes.math_block) -> None:
    formula = mathml(node.astext(), "block")
    self.body.append(f'<div class="formula" tabindex="0">{formula}</div>\n')
    raise nodes.SkipNode


def write_font(app, error) -> None:
    """After a build, beside the style sheets."""
    path = Path(app.outdir) / "_static" / "math.woff"
    if error or app.builder.format != "html" or path.exists():
        return
    import ziamath
    from fontTools import subset

    source = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(flavor="woff", layout_features=["*"], name_IDs=[0, 13, 14])
    font = subset.load_font(str(source), options)
    chosen = subset.Subsetter(options)
    chosen.populate(unicodes=GLYPHS)
    chosen.subset(font)
    subset.save_font(font, str(path), options)


def setup(app):
    app.add_html_math_renderer(
        "mathml", inline_renderers=(visit_inline, None), block_renderers=(visit_block, None)
    )
    app.connect("build-finished", write_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
