# SPDX-License-Identifier: BSD-3-Clause
"""What one wrong line is."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """A slip that somebody could make: in ``place`` stands ``right``, once, and would stand
    ``wrong``. ``room`` names the tests that are to catch it (rooms.py)."""

    place: str
    room: str
    what: str  # what the fault would mean
    right: str
    wrong: str
    why: str = ""  # of one that no test can catch: why it is harmless

    @property
    def part(self) -> str:
        if not self.place.startswith("csrc/"):
            return "Python"
        if "/cuda/" in self.place:
            return "CUDA kernels"
        if "/cpu/" in self.place:
            return "CPU kernels"
        return "formulas" if self.place.endswith(FORMULAS) else "checks and calls"


FORMULAS = ("formula.h", "shards.h")
