# SPDX-License-Identifier: BSD-3-Clause
"""Image <-> tokens: one token per cell of 16 x 16 pixels, in an orthonormal cosine basis.

The cell is the one ``map_mask_to_latent`` maps a pixel mask to. The basis (rows, columns, colours)
is orthonormal, so a squared error of tokens is that of pixels and white noise stays white; but a
photograph's energy gathers in few coefficients, which is what a denoiser lives on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CELL = 16
CHANNELS = CELL * CELL * 3


def cosine_basis(size: int) -> Tensor:
    """[size, size] orthonormal DCT-II, a row per frequency."""
    frequency = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (frequency + 0.5) * frequency[:, None])
    basis *= math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()


CELL_BASIS, COLOUR_BASIS = cosine_basis(CELL), cosine_basis(3)


def grid(shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of cells in an image of H x W pixels."""
    return shape[0] // CELL, shape[1] // CELL


def encode(image: Tensor) -> Tensor:
    """[3, H, W] -> [T, C], cells in row-major order."""
    rows, columns = grid(image.shape[1:])
    cells = image.reshape(3, rows, CELL, columns, CELL)
    bases = (CELL_BASIS, CELL_BASIS, COLOUR_BASIS)
    tokens = torch.einsum("craqb,ia,jb,kc->rqijk", cells, *bases)
    return tokens.reshape(rows * columns, CHANNELS)


def decode(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """[T, C] -> [3, H, W], the inverse of :func:`encode`."""
    rows, columns = grid(shape)
    coefficients = tokens.reshape(rows, columns, CELL, CELL, 3)
    bases = (CELL_BASIS, CELL_BASIS, COLOUR_BASIS)
    return torch.einsum("rqijk,ia,jb,kc->craqb", coefficients, *bases).reshape(3, *shape)


def cell_positions(shape: tuple[int, int]) -> Tensor:
    """[T, 2] row and column of each cell."""
    rows, columns = grid(shape)
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
