# SPDX-License-Identifier: BSD-3-Clause
"""Layouts, operands and the definition that packed_attention is held against."""

import torch

import masked_loss_ext as mle

MODES = ["full", "causal", "causal_last", "prefix"]

# name: segment lengths, keep_k, further arguments of the layout
LAYOUTS = {
    "nothing_dropped": ([[7, 5], [3, 9]], None, {}),
    "some_dropped": ([[7, 5], [3, 9], [6, 4]], [2, 0, 9], {}),
    "middle_segment": ([[4, 6, 3], [2, 5, 4]], [2, 0], {"droppable": 1}),
    "every_segment": ([[4, 6], [5, 5]], [[2, 3], [0, 4]], {}),
    "nothing_kept": ([[4, 6], [5, 5]], [[0, 0], [3, 2]], {}),
    "aligned": ([[7, 4], [5, 3]], [1, 2], {"align_samples": 16}),
    "empty_segments": ([[0, 5], [4, 0], [0, 0]], [3, 2, 1], {}),
    "one_segment": ([[9], [6]], [4, 6], {}),
}


def layout_of(name):
    lengths, keep_k, options = LAYOUTS[name]
    return mle.PackedLayout(lengths, keep_k, pad_to_multiple=8, **options)


def options_of(mode, layout):
    prefix = [3, 99, 0][: layout.num_samples]
    return {"mode": mode} | ({"prefix": prefix} if mode == "prefix" else {})


def operands(rows, columns=None, heads=2, kv_heads=2, batch=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows)
    columns = rows if columns is None else columns
    shapes = (batch, heads, rows, 8), (batch, kv_heads, columns, 8), (batch, kv_heads, columns, 6)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def by_definition(q, k, v, allowed, scale=None):
    """Softmax over what is allowed; 0 where nothing is."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    live = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & live, -torch.inf).softmax(-1)
    return torch.where(live, weights, 0) @ v


def with_gradients(function, tensors, grad):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def compare(function, tensors, allowed, **options):
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=torch.float64)
    expected = with_gradients(lambda *x: by_definition(*x, allowed, **options), tensors, grad)
    found = with_gradients(function, tensors, grad)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
    rows = allowed.any(-1)
    for x in found[:2]:
        assert (x.masked_fill(rows.unsqueeze(-1), 0) == 0).all(), "not exactly 0"
    return found
