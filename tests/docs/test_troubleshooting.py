# SPDX-License-Identifier: BSD-3-Clause
"""What docs/guide/troubleshooting.md quotes is what the package says."""

import re
from pathlib import Path

import masked_loss_ext

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "guide" / "troubleshooting.md"
OF_PYTORCH = {"one of the variables needed for gradient computation has been modified"}


def texts():
    """Of all modules, with string literals that stand beside each other joined."""
    package = Path(masked_loss_ext.__file__).parent
    for path in package.rglob("*.py"):
        yield re.sub(r'"\s*\n\s*(rule \+= )?f?"', "", path.read_text())


def quoted(text):
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_what_the_page_quotes_is_said():
    said = "\n".join(texts())
    found = [quote for quote in quoted(PAGE.read_text()) if quote not in OF_PYTORCH]
    assert len(found) > 15
    assert not [quote for quote in found if quote not in said]
    assert "a text that nobody says" not in said
