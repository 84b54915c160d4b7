# SPDX-License-Identifier: BSD-3-Clause
"""Random keep_k: its distributions, sample by sample."""

import pytest
import torch

import masked_loss_ext as mle


@pytest.mark.parametrize("n", [1, 2, 7, 200, 256])
@pytest.mark.parametrize("mode", ["uniform", "pow2", "uniform_pow2"])
def test_sample_keep_k(mode, n):
    if mode == "pow2" and n & (n - 1):
        with pytest.raises(ValueError, match="sample_keep_k: n must be a power of two"):
            mle.sample_keep_k(n, 3, mode)
        return
    keep_k = mle.sample_keep_k(n, 20000, mode, torch.Generator().manual_seed(1))
    assert keep_k.dtype == torch.int64 and keep_k.shape == (20000,)
    uniform = {k: 1 / n for k in range(1, n + 1)}
    powers = [2**e for e in range(n.bit_length()) if 2**e <= n]
    expected = {"uniform": uniform, "pow2": {k: 1 / len(powers) for k in powers}}.get(mode, {})
    if mode == "uniform_pow2":
        for k in range(1, n + 1):
            up = min(n, 1 << (k - 1).bit_length())
            expected[up] = expected.get(up, 0) + 1 / n
    counts = torch.bincount(keep_k, minlength=n + 1).tolist()
    assert {k for k, c in enumerate(counts) if c} <= set(expected), "nothing beyond n, no 0"
    for k, p in expected.items():  # six standard deviations
        assert abs(counts[k] - 20000 * p) <= 6 * (20000 * p * (1 - p)) ** 0.5


def test_sample_keep_k_per_sample():
    sizes = [1, 8, 64, 5]
    for n in (sizes, torch.tensor(sizes)):
        drawn = torch.stack([mle.sample_keep_k(n, 4) for _ in range(200)])
        assert (drawn >= 1).all() and (drawn <= torch.tensor(sizes)).all()
        assert drawn.amax(0).tolist()[3] == 5 and drawn.amax(0)[2] > 40
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    first, second = (mle.sample_keep_k(100, 50, generator=g) for g in seeds)
    assert torch.equal(first, second)
