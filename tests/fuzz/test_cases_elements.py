# SPDX-License-Identifier: BSD-3-Clause
"""See seeded.py."""

import pytest

from tests.fuzz import seeded

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", seeded.PARTS["elements"])
def test_seeded_cases(name):
    seeded.check_seeded(name)
