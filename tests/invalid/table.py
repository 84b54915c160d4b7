# SPDX-License-Identifier: BSD-3-Clause
"""All entries in one list."""

from tests.invalid import entries, entries_masks, entries_operators, entries_unified

ENTRIES = [
    *entries.ENTRIES,
    *entries_masks.ENTRIES,
    *entries_unified.ENTRIES,
    *entries_operators.ENTRIES,
]
