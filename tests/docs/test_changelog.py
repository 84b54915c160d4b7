# SPDX-License-Identifier: BSD-3-Clause
"""CHANGELOG.md has the version of the package, and names what there is."""

import re
from pathlib import Path

import masked_loss_ext as mle

TEXT = (Path(__file__).resolve().parents[2] / "CHANGELOG.md").read_text()


def test_this_version_has_a_section():
    sections = re.findall(r"^## (\S+)", TEXT, re.MULTILINE)
    assert sections[0] == "Unreleased" and sections[1] == mle.__version__


def test_every_public_name_has_come_with_some_release():
    dicts = "Nested(Dropout|dropout)|SequenceUnpacker|nested_dropout|sample_keep_k|RowStatistics"
    left = {name for name in mle.__all__ if name not in TEXT and not re.search(dicts, name)}
    assert left <= {"__version__", "create_unified_loss", "distributed"}
