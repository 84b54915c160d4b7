# SPDX-License-Identifier: BSD-3-Clause
"""Image <-> tokens: one token per square cell of pixels, in an orthonormal cosine basis.

The usual cell is the one ``map_mask_to_latent`` maps a pixel mask to. The basis (rows, columns,
colours) is orthonormal, so a squared error of tokens is that of pixels and white noise stays white;
but a photograph's energy gathers in few coefficients, which is what denoising and compressing live
on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

CELL = 16


def channels(cell: int = CELL) -> int:
    """Values of a token."""
    return cell * cell * 3


@cache
def cosine_basis(size: int) -> Tensor:
    """[size, size] orthonormal DCT-II, a row per frequency."""
    frequency = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / size * (frequency + 0.5) * frequency[:, None])
    basis *= math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()


def bases(cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the rows, the columns and the colours of a cell."""
    return cosine_basis(cell), cosine_basis(cell), cosine_basis(3)


def grid(shape: tuple[int, int], cell: int = CELL) -> tuple[int, int]:
    """Rows and columns of cells in an image of H x W pixels."""
    return shape[0] // cell, shape[1] // cell


def encode(image: Tensor, cell: int = CELL) -> Tensor:
    """[3, H, W] -> [T, C], cells in row-major order."""
    rows, columns = grid(image.shape[1:], cell)
    cells = image.reshape(3, rows, cell, columns, cell)
    tokens = torch.einsum("craqb,ia,jb,kc->rqijk", cells, *bases(cell))
    return tokens.reshape(rows * columns, channels(cell))


def decode(tokens: Tensor, shape: tuple[int, int], cell: int = CELL) -> Tensor:
    """[T, C] -> [3, H, W], the inverse of :func:`encode`."""
    rows, columns = grid(shape, cell)
    coefficients = tokens.reshape(rows, columns, cell, cell, 3)
    image = torch.einsum("rqijk,ia,jb,kc->craqb", coefficients, *bases(cell))
    return image.reshape(3, *shape)


def cell_positions(shape: tuple[int, int], cell: int = CELL) -> Tensor:
    """[T, 2] row and column of each cell."""
    rows, columns = grid(shape, cell)
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()


def spectrum(regions: Sequence[Tensor], cell: int = CELL) -> Tensor:
    """[C] root mean square of each coefficient over the regions' cells."""
    whole = [r[:, : r.shape[1] // cell * cell, : r.shape[2] // cell * cell] for r in regions]
    return torch.cat([encode(region, cell) for region in whole]).square().mean(0).sqrt()
