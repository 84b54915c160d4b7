# SPDX-License-Identifier: BSD-3-Clause
"""docs/guide/names.md has every public name, and no other."""

import re
from pathlib import Path

import masked_loss_ext as mle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "names.md"
NO_FUNCTIONS = {"__version__", "distributed"}


def test_every_public_name_is_on_the_page():
    first = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    found = {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}
    missing = set(mle.__all__) - found - NO_FUNCTIONS
    assert not missing
    missing = {f"distributed.{name}" for name in mle.distributed.__all__} - found
    assert missing == {"distributed.PendingCount"}  # which global_token_count returns
    for name in found - {"torch.ops.masked_loss_ext"}:
        of = mle
        for part in name.split("."):
            __import__("masked_loss_ext.ops.cross_entropy_terms")
            of = getattr(of, part)
