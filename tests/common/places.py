# SPDX-License-Identifier: BSD-3-Clause
"""Packages that `make places` installs and `make test` does not."""

import os
from importlib.util import find_spec

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def place(*packages):
    """Skip the file where one is missing; with REQUIRE_PLACES=1 that is an error."""
    missing = [name for name in packages if find_spec(name) is None]
    if not missing:
        return
    reason = f"not installed: {', '.join(missing)}; make places"
    if os.environ.get("REQUIRE_PLACES") == "1":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)
