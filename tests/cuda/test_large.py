# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^31 elements on a GPU, in bf16: every offset has to be 64 bits wide.

The last rows lie beyond that; they have to come to what they come to alone.
"""

import pytest
import torch
from gpu_device import need_gpu

import masked_loss_ext as mle

LIMIT = 2**31
CLASSES, CHANNELS = 128256, 64
LAST = 5  # rows


def need_memory(tensors):
    """Of that many tensors of 2^31 elements in bf16, and some more."""
    need_gpu()
    torch.cuda.empty_cache()
    free, wanted = torch.cuda.mem_get_info()[0], tensors * (LIMIT + (1 << 28)) * 2
    if free < wanted:
        pytest.skip(f"{wanted >> 30} GiB of GPU memory are needed, {free >> 30} are free")


def large(rows, columns):
    """Values in the first and the last rows, 0 between them."""
    tensor = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    assert tensor[-LAST].storage_offset() > LIMIT
    tensor[-LAST:] = torch.randn(LAST, columns, device="cuda")
    tensor[:LAST] = torch.randn(LAST, columns, device="cuda")
    return tensor


def gradient_of(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_cross_entropy(inplace_backward):
    need_memory(3)
    logits = large(LIMIT // CLASSES + 10, CLASSES)
    target = torch.full(logits.shape[:1], -100, device="cuda")
    target[:LAST] = target[-LAST:] = torch.arange(LAST, device="cuda") * 20000
    alone = torch.cat([logits[:LAST], logits[-LAST:]]).requires_grad_(True)
    labels = torch.cat([target[:LAST], target[-LAST:]])
    expected = mle.masked_cross_entropy(alone, labels)
    expected_gradient = gradient_of(expected, alone)
    leaf = logits.requires_grad_(True)
    loss = mle.masked_cross_entropy(leaf, target, inplace_backward=inplace_backward)
    torch.testing.assert_close(loss, expected)
    gradient = gradient_of(loss, leaf)
    torch.testing.assert_close(gradient[:LAST], expected_gradient[:LAST])
    torch.testing.assert_close(gradient[-LAST:], expected_gradient[LAST:])
    assert not gradient[LAST:-LAST].any()


def test_squared_error():
    need_memory(4)
    prediction = large(LIMIT // CHANNELS + 10, CHANNELS)
    target = torch.zeros_like(prediction)
    mask = torch.zeros(prediction.shape[:1], dtype=torch.bool, device="cuda")
    mask[:LAST] = mask[-LAST:] = True
    leaf = prediction.requires_grad_(True)
    loss = mle.masked_mse(leaf, target, mask)
    alone = torch.cat([prediction[:LAST], prediction[-LAST:]]).float()
    torch.testing.assert_close(loss, alone.square().mean())
    gradient = gradient_of(loss, leaf)
    expected = (2 * alone / alone.numel()).bfloat16()
    torch.testing.assert_close(gradient[:LAST], expected[:LAST])
    torch.testing.assert_close(gradient[-LAST:], expected[LAST:])
    assert not gradient[LAST:-LAST].any()


def test_element_mask_of_as_many():
    need_memory(5)
    prediction = large(LIMIT // CHANNELS + 10, CHANNELS)
    mask = torch.zeros(prediction.shape, dtype=torch.bool, device="cuda")
    mask[-1, ::2] = True
    loss = mle.masked_sse(prediction, torch.zeros_like(prediction), mask)
    expected = prediction[-1, ::2].float().square().sum() / len(prediction)  # a mean over the batch
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
