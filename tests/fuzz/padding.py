# SPDX-License-Identifier: BSD-3-Clause
"""Properties of what makes masks and labels."""

import torch
from cases import FLOATING

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.fuzz.choices import CONVERTED, INTEGERS, laid, mask_values


def padding(c):
    """One of the six functions."""
    kind, g = c.below(len(FUNCTIONS)), c.generator()
    c.said["function"] = FUNCTIONS[kind].__name__
    FUNCTIONS[kind](c, g)


def lengths_to_mask(c, g):
    rows, longest, dtype = (
        c.pick((3, 1, 0, 5)),
        c.pick((4, 0, 1, 9)),
        c.pick((*INTEGERS, *CONVERTED)),
    )
    lengths = torch.randint(0, longest + 1, (rows,), generator=g)
    most, clip, as_list = c.pick((None, longest, longest + 3, longest // 2)), c.below(2), c.below(3)
    c.said |= {"lengths": lengths.tolist(), "max_len": most, "clip": clip}
    given = {0: laid(lengths.to(dtype), c.layout()), 1: lengths.tolist(), 2: lengths}[as_list]
    if most is not None and not clip and rows and most < int(lengths.max()):
        try:
            mle.lengths_to_mask(given, most)
        except ValueError as error:
            assert str(error).startswith("lengths_to_mask: lengths must be at most max_len")
            return
        raise AssertionError("a length beyond max_len was taken")
    found = mle.lengths_to_mask(given, most, clip=bool(clip))
    if rows == 0:
        assert found.shape == (0, most or 0) and found.dtype == torch.bool
        return
    assert torch.equal(found, reference.lengths_to_mask(lengths, most))


def pad_latents(c, g):
    channels, count, dtype = c.pick((3, 1, 0, 4)), c.pick((2, 1, 4)), c.pick(FLOATING)
    lengths = [c.below(6) for _ in range(count)]
    more, layout = c.pick((None, 0, 3)), c.layout()
    most = None if more is None else max(lengths) + more
    latents = [torch.randn(n, channels, generator=g).to(dtype) for n in lengths]
    c.said |= {"lengths": lengths, "channels": channels, "max_seq_len": most, "dtype": dtype}
    leaves = [laid(x, layout).requires_grad_() for x in latents]
    padded, mask = mle.pad_latents_for_multi_res(leaves, most)
    expected, expected_mask = reference.pad_latents_for_multi_res(latents, most)
    assert torch.equal(padded, expected) and torch.equal(mask, expected_mask)
    grad = torch.randn(padded.shape, generator=g).to(dtype)
    for row, (x, found) in enumerate(
        zip(latents, torch.autograd.grad(padded, leaves, grad), strict=True)
    ):
        assert torch.equal(found, grad[row, : len(x)])


def unpad(c, g):
    shape = (c.pick((2, 1, 3, 0)), c.pick((3, 1, 5, 0)), *c.pick(((2,), (), (2, 2))))
    mask = torch.rand(shape[:2], generator=g) < c.pick((0.6, 1.0, 0.0))
    padded, kind = torch.randn(shape, generator=g), c.mask_dtype()
    c.said |= {"shape": shape, "mask": kind}
    found = mle.unpad(laid(padded, c.layout()), laid(mask_values(mask, kind), c.layout()))
    for ours, theirs in zip(found, reference.unpad(padded, mask), strict=True):
        assert torch.equal(ours, theirs)


def _labels(c, g):
    shape = c.pick(((2, 5), (7,), (1, 1), (2, 3, 4), (0, 3), (3, 0)))
    dtype = c.pick((*INTEGERS, *CONVERTED))
    ignore = c.pick((-100, -100, 0, 5)) if dtype.is_signed else c.pick((100, 0, 5))
    labels = torch.randint(0, 9, shape, generator=g)
    labels = torch.where(torch.rand(shape, generator=g) < 0.2, ignore, labels)
    mask = torch.rand(shape, generator=g) < c.pick((0.7, 0.3, 1.0, 0.0))
    c.said |= {"labels": f"{dtype}{shape}", "ignore_index": ignore}
    return labels, laid(labels.to(dtype), c.layout()), mask, ignore


def mask_labels(c, g):
    labels, given, mask, ignore = _labels(c, g)
    kind = c.mask_dtype()
    found = mle.mask_labels(given, laid(mask_values(mask, kind), c.layout()), ignore_index=ignore)
    assert found.dtype == given.dtype
    expected = reference.mask_labels(labels, mask, ignore_index=ignore)
    assert torch.equal(found.long(), expected)


def shift_labels(c, g):
    labels, given, mask, ignore = _labels(c, g)
    wanted, kind, shift = c.byte(), c.mask_dtype(), c.pick((1, 2, 0, 9))
    ids = (torch.rand(labels.shape, generator=g) < 0.4).cumsum(-1)
    plain = {"mask": mask if wanted & 1 else None, "segment_ids": ids if wanted & 2 else None}
    how = {"shift": shift, "ignore_index": ignore}
    c.said |= {**how, "masked": wanted & 1, "segments": wanted & 2}
    found = mle.shift_labels(
        given,
        laid(mask_values(mask, kind), c.layout()) if wanted & 1 else None,
        laid(ids.to(c.pick(INTEGERS)), c.layout()) if wanted & 2 else None,
        **how,
    )
    assert found.dtype == given.dtype
    assert torch.equal(found.long(), reference.shift_labels(labels, **plain, **how))


def map_mask_to_latent(c, g):
    shape = c.pick((1, 2, 0)), c.pick((16, 32, 39, 3)), c.pick((16, 32, 0, 37))
    if shape[1] // 8 % 2 or shape[2] // 8 % 2:
        return
    values, dtype = torch.rand(shape, generator=g), c.pick((*FLOATING, torch.bool, torch.uint8))
    values = values.to(dtype) if dtype.is_floating_point else mask_values(values < 0.3, dtype)
    c.said |= {"shape": shape, "dtype": dtype}
    found = mle.map_mask_to_latent(laid(values, c.layout()))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    if min(shape[1:]) < 16:
        assert found.shape == (shape[0], 0)
        return
    truth = reference.map_mask_to_latent(values.double() if dtype.is_floating_point else values)
    torch.testing.assert_close(found.double(), truth.double(), rtol=1e-6, atol=1e-7)


FUNCTIONS = (lengths_to_mask, pad_latents, unpad, mask_labels, shift_labels, map_mask_to_latent)
