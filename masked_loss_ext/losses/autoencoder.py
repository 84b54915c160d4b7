# SPDX-License-Identifier: BSD-3-Clause
"""Reconstruction errors of masked autoencoders: only the hidden positions count."""

from torch import Tensor

from .._checks import check_choice, check_leading_mask, check_prediction
from ..ops.masked_squared_error import check_element_loss, squared_error_over

REDUCTIONS = ("sum", "mean", "batch_mean")


def _reconstruction_error(function, x_recon, x, mask, reduction, normalizer, loss, delta):
    check_choice(function, "reduction", reduction, REDUCTIONS, "unknown reduction: ")
    check_prediction(function, "x_recon", x_recon, "x", x)
    check_leading_mask(function, "mask", mask, "x_recon", x_recon)
    check_element_loss(function, loss, delta)
    tensors = (x_recon, x, mask, None, None, 1.0, 1.0)
    how = {"reduction": reduction, "loss": loss, "delta": delta}
    return squared_error_over(function, normalizer, *tensors, **how)


def masked_sse(
    x_recon: Tensor,
    x: Tensor,
    mask: Tensor,
    *,
    reduction: str = "batch_mean",
    normalizer: float | Tensor | None = None,
    loss: str = "mse",
    delta: float | Tensor = 1.0,
) -> Tensor:
    r"""Sum of squared errors over the positions that ``mask`` includes.

    .. math:: S = \sum_{i:\, m_i} (\hat x_i - x_i)^2, \qquad
        \text{sum} = S, \quad \text{batch\_mean} = S / B, \quad \text{mean} = S / \#\{i : m_i\}

    >>> mask = ~visible  # True = hidden = counts
    >>> expected = ((x_recon[mask] - x[mask]) ** 2).sum() / x.shape[0]
    >>> torch.testing.assert_close(masked_sse(x_recon, x, mask), expected)

    "batch_mean" grows with the number of hidden positions per sample; only "mean" does not. With
    nothing included all three are 0, attached to the graph, where the line above would fail or give
    NaN for "mean". Positions outside are not read: NaN there changes nothing.

    Args:
        x_recon: ``[B, L]``, ``[B, L, D]`` or any other rank, float16, bfloat16, float32 or float64.
        x: the same shape, any of these dtypes.
        mask: ``[B, L]`` (leading dimensions of x), any dtype, included where not 0. A size of 1
            stands for any: ``[B, 1, H, W]`` against ``[B, C, H, W]`` includes its pixels in every
            channel, and counts C of them each.
        reduction: "batch_mean", "sum" or "mean".
        normalizer: what the two means divide by instead of B and of the number of elements (n * D):
            those of all micro-batches and ranks. A number or a 0-d tensor.
        loss, delta: what stands in the place of the square, as in ``masked_edit_token_mean_loss``.

    Returns:
        ``[]`` float32, float64 where x_recon or x is. Differentiable in x_recon and x.
    """
    return _reconstruction_error("masked_sse", x_recon, x, mask, reduction, normalizer, loss, delta)


def masked_mse(
    x_recon: Tensor,
    x: Tensor,
    mask: Tensor,
    *,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    loss: str = "mse",
    delta: float | Tensor = 1.0,
) -> Tensor:
    r"""Mean of squared errors over the positions that ``mask`` includes.

    .. math:: \frac{1}{n} \sum_{i:\, m_i} (\hat x_i - x_i)^2, \qquad n = \#\{i : m_i\}

    >>> mask = ~visible
    >>> torch.testing.assert_close(
    ...     masked_mse(x_recon, x, mask), ((x_recon[mask] - x[mask]) ** 2).mean())

    For ``[B, L, D]`` and a ``[B, L]`` mask the mean is over n * D elements. All else is as in
    ``masked_sse``.
    """
    return _reconstruction_error("masked_mse", x_recon, x, mask, reduction, normalizer, loss, delta)
