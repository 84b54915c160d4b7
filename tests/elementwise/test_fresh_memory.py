# SPDX-License-Identifier: BSD-3-Clause
"""Large gradients: huge pages, and rows that are not written where memory is zero already."""

import resource

import pytest
import torch

import masked_loss_ext as mle

MIB = 1 << 20


def dirty_then_free(mib):
    """Leave memory behind that is not zero, for the next allocation of this size to find."""
    garbage = torch.full((mib * MIB // 4,), torch.nan)
    assert garbage.isnan().all()


def resident_mib():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * resource.getpagesize() / MIB


# 3: below what is looked at; 20: from the heap, used before; 40: fresh from the system each time
@pytest.mark.parametrize("mib", [3, 20, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_zero_in_used_and_in_fresh_memory(mib, dtype):
    channels = 48
    tokens = mib * MIB // dtype.itemsize // channels
    mask = torch.rand(1, tokens) < 0.5
    mask[:, tokens // 2 : tokens // 2 + 3 * MIB // dtype.itemsize // channels] = (
        False  # whole pages
    )
    prediction = torch.ones(1, tokens, channels, dtype=dtype, requires_grad=True)
    target = torch.zeros(1, tokens, channels, dtype=dtype, requires_grad=True)
    for _ in range(3):
        dirty_then_free(mib)
        prediction.grad = target.grad = None
        mle.AttentionMaskMseLoss(reduction="sum")(prediction, target, mask).backward()
        expected = torch.where(mask[..., None], 2 / channels, 0.0).to(dtype).expand_as(prediction)
        torch.testing.assert_close(prediction.grad, expected)
        assert (prediction.grad[~mask] == 0).all() and (target.grad[~mask] == 0).all()
        assert torch.equal(target.grad, -prediction.grad)


def test_a_gradient_without_a_kept_token_takes_no_memory():
    prediction = torch.ones(64, 1024, 1024, requires_grad=True)  # 256 MiB
    target = torch.zeros(1).expand(64, 1024, 1024)
    loss = mle.AttentionMaskMseLoss()(prediction, target, torch.zeros(64, 1024))
    before = resident_mib()
    loss.backward()
    grown = resident_mib() - before
    assert not prediction.grad.any()
    assert grown < 64, f"{grown:.0f} MiB of a gradient that is all zero"
