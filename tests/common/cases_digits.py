# SPDX-License-Identifier: BSD-3-Clause
"""Rows that float32 sums lose digits of: one class that has almost all, and large logits.

Values are worked out in float64 from differences, so that they keep their own digits. The tests on
the CPU and those under the simulator share them.
"""

import torch

MARGINS = (5.0, 20.0, 30.0, 80.0)
TOLERANCE = 1e-5
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def confident(margin, dtype, shape=(3, 997)):
    """Logits of which class `best` of each row stands `margin` or more above all others; `best`."""
    torch.manual_seed(int(margin))
    others = torch.randn(shape).clamp(-2, 2).to(dtype).double()
    best = torch.tensor([0, shape[1] // 2 + 3, shape[1] - 1])
    x = others.scatter(1, best[:, None], margin + 2)
    return x.to(dtype), best


def truth_beside(x, best):
    """ln p of the best class, entropy, and p of the others with -(1 - p) of the best; float64."""
    d = x.double()
    below = d - d.gather(1, best[:, None])
    others = below.exp().scatter(1, best[:, None], 0.0)
    rest = others.sum(1, keepdim=True)
    entropy = torch.log1p(rest) - (others * below).sum(1, keepdim=True) / (1 + rest)
    gradient = (others / (1 + rest)).scatter(1, best[:, None], -rest / (1 + rest))
    return -torch.log1p(rest[:, 0]), entropy[:, 0], gradient


def assert_relative(actual, truth, tolerance=TOLERANCE):
    """Each entry on its own, but for the rounding of its dtype, below whose numbers it may be 0."""
    info = torch.finfo(actual.dtype)
    tolerance = tolerance + (info.eps if info.eps > 1e-4 else 0)
    smallest = info.tiny * (info.eps if info.eps > 1e-4 else 1)
    error = (actual.double() - truth).abs()
    assert (error <= tolerance * truth.abs() + smallest).all(), (error / truth.abs()).max()


def large(name, dtype):
    """Logits, labels and options of rows with large numbers."""
    torch.manual_seed(7)
    y = torch.randint(64, (32,))
    x = torch.randn(32, 64, dtype=torch.float64)
    if name == "wide":
        x = 1000 * x
    elif name == "shifted":  # and an unlikely label
        x = x + 1e4
        x[torch.arange(32), y] -= 50
    elif name == "huge":
        x = 1e6 + 2.0**14 * torch.randint(-3, 3, x.shape)
    else:
        x = 100 * x
    return x.to(dtype), y


LARGE = ("wide", "shifted", "huge", "hundreds")
OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.25},
    "smooth": {"label_smoothing": 0.1},
    "capped": {"softcap": 2e4},
    "z_loss": {"z_loss": 1e-6},
    "focal": {"focal_gamma": 2.0},
}


def loss_from_differences(x, y, o):
    """The row losses of float64 copies, from differences."""
    cap, temperature = o.get("softcap"), o.get("temperature", 1.0)
    z = (cap * torch.tanh(x / cap) if cap else x) / temperature
    top = z.max(1, keepdim=True).values
    log_sum = torch.logsumexp(z - top, 1, keepdim=True)
    minus_log_p = log_sum - (z - top)
    ce = minus_log_p.gather(1, y[:, None])[:, 0]
    eps = o.get("label_smoothing", 0.0)
    loss = (1 - eps) * ce + eps * minus_log_p.mean(1)
    if o.get("focal_gamma"):
        loss = loss * torch.expm1(-ce).abs() ** o["focal_gamma"]
    if o.get("z_loss"):
        loss = loss + o["z_loss"] * (top + log_sum)[:, 0].square()
    return loss


def truth_of_large(x, y, options):
    leaf = x.double().requires_grad_()
    loss = loss_from_differences(leaf, y, options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_as_good_as_torch(gradient, x, y, options):
    """Of the largest entry: what F.cross_entropy reaches, and the rounding of the dtype."""
    _, truth = truth_of_large(x, y, options)
    info = torch.finfo(gradient.dtype)
    allowed = 1e-13 if info.bits == 64 else (1e-6 if options else 3e-7)
    allowed += info.eps if info.eps > 1e-4 else 0
    error = (gradient.double() - truth).abs().max() / truth.abs().max()
    assert error <= allowed, f"{error:.2g} of the largest entry"
