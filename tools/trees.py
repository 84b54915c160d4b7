# SPDX-License-Identifier: BSD-3-Clause
"""Trees in which the tests run with another library or another package than the checkout's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tools.kernels import ROOT, sources

# What the checkout is worked in with: a tree elsewhere must not find this one.
SETTINGS = ("PYTHON", "MASKED_LOSS_EXT_", "TORCHINDUCTOR_", "TORCH_EXTENSIONS_DIR", "VIRTUAL_ENV")


def clean_environment(**ours: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
    # aot: what is there is used, or nothing; never a library that is compiled by the way.
    return {**clean, "OMP_WAIT_POLICY": "passive", "MASKED_LOSS_EXT_BUILD": "aot", **ours}


def make_tree(tree: Path, library: Path | None) -> Path:
    """The tests with the tools that they use, and beside them the package with that library; with
    none no package, so that what is installed is what they import."""
    shutil.rmtree(tree, ignore_errors=True)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for part in ("tests", "tools", *(("masked_loss_ext", "csrc") if library else ())):
        shutil.copytree(ROOT / part, tree / part, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", tree)
    if library:
        shutil.copy(library, tree / "masked_loss_ext" / sources.LIBRARY)
    return tree
