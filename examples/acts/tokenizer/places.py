# SPDX-License-Identifier: BSD-3-Clause
"""Where patches and registers are, as features that attention compares.

The inner product of two features is large where the places are near. A register has a place too,
as much as it has none: the first is spread over the whole crop, the n-th over about 1/n of it. So
the registers differ from the start, the first few tell the most, and the rest tell details.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HALF_WAVES = 6  # per side of a crop, the constant one included
PATTERNS = HALF_WAVES**2
FEATURES = PATTERNS + 3  # patterns, height and width of the crop, is it a source?
SOURCE = FEATURES - 1


def patterns(centres: Tensor, size: Tensor | None = None) -> Tensor:
    """[N, 2] in (0, 1) -> [N, PATTERNS] products of cosines, blurred to places of ``size`` [N]."""
    order = torch.arange(HALF_WAVES, device=centres.device)
    waves = torch.cos(math.pi * order * centres[:, :, None])
    if size is not None:
        waves = waves * torch.exp(-0.5 * (order * size[:, None, None]).square())
    return (waves[:, 0, :, None] * waves[:, 1, None, :]).flatten(1)


def features(waves: Tensor, sides: Tensor, source: bool) -> Tensor:
    """[N, FEATURES]; ``sides`` [N, 2]; a source is what the others should read."""
    return torch.cat([waves, sides, torch.full_like(sides[:, :1], float(source))], dim=1)


def register_patterns(registers: int) -> Tensor:
    """[registers, PATTERNS] The points of Halton's sequence, any first n of which fill the crop."""
    points = [[radical_inverse(i, base) for base in (2, 3)] for i in range(1, registers + 1)]
    centres = torch.tensor(points)
    centres[0] = 0.5
    return patterns(centres, torch.arange(1.0, registers + 1).rsqrt())


def radical_inverse(number: int, base: int) -> float:
    """The digits of ``number`` mirrored at the point: 6 = 110 in base 2 gives 0.011 = 0.375."""
    found, digit = 0.0, 1.0
    while number:
        digit /= base
        found += digit * (number % base)
        number //= base
    return found
