# SPDX-License-Identifier: BSD-3-Clause
"""Properties of heads that predict the next tokens, from logits, classifiers and hidden states."""

import torch
import torch.nn.functional as F
from simulated_cross_entropy import assert_close

import masked_loss_ext as mle
from masked_loss_ext import reference
from tests.fuzz.agreement import assert_bits
from tests.fuzz.choices import INTEGERS, laid, mask_values, poisoned
from tests.unified.test_hidden_state_mtp import by_torch


def _rows(c, g, classes):
    """Labels, mask and documents ``[B, S]``, plain and as they are given."""
    shape = c.pick((2, 1, 3)), c.pick((5, 1, 2, 7, 3))
    labels = torch.randint(0, classes, shape, generator=g)
    labels = torch.where(torch.rand(shape, generator=g) < c.pick((0.0, 0.3)), -100, labels)
    mask = torch.rand(shape, generator=g) < c.pick((0.8, 0.4, 0.0, 1.0))
    ids = (torch.rand(shape, generator=g) < 0.3).cumsum(-1)
    wanted, dtype, kind, layout = c.byte(), c.pick(INTEGERS[:4]), c.mask_dtype(), c.layout()
    plain = {"attention_mask": mask if wanted & 1 else None}
    plain["segment_ids"] = ids if wanted & 2 else None
    given = {"attention_mask": laid(mask_values(mask, kind), layout) if wanted & 1 else None}
    given["segment_ids"] = laid(ids.to(dtype), layout) if wanted & 2 else None
    c.said |= {"shape": shape, "masked": wanted & 1, "documents": wanted & 2}
    return labels, laid(labels.to(dtype), layout), plain, given


def multi_token_prediction(c):
    """MultiTokenPredictionLoss of logits, or of hidden states and heads."""
    classes, g = c.pick((3, 2, 5, 9)), c.generator()
    labels, given_labels, plain, given = _rows(c, g, classes)
    heads, dtype, layout, linear = c.pick((2, 1, 3, 4)), c.dtype(), c.layout(), c.below(2)
    weights, factor = [c.below(4) + 0.5 for _ in range(heads)], c.pick((1.0, -0.5))
    how = {"mask_sources": bool(c.below(2)), "renormalize_empty_heads": bool(c.below(2))}
    in_place, normalizer, kind = c.below(2), c.pick((None, None, 5, 0.5)), c.poison()
    module = mle.MultiTokenPredictionLoss(
        heads, weights, **how, inplace_backward=bool(in_place and not linear)
    )
    c.said |= {"heads": heads, "dtype": dtype, "linear": linear, "normalizer": normalizer, **how}
    width = 3 if linear else classes
    values = [torch.randn(*labels.shape, width, generator=g).to(dtype) for _ in range(heads)]
    layers = [torch.randn(classes, width, generator=g).to(dtype) for _ in range(heads)]

    def ours(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        inputs = [x * 1 for x in tensors] if in_place and not linear else tensors
        more = {"heads": layers} if linear else {}
        total, parts = module(inputs, given_labels, normalizer=normalizer, **given, **more)
        assert torch.equal(parts["total_multitoken_loss"], total)
        grads = torch.autograd.grad(total, tensors, torch.full_like(total, factor))
        return _named(total, [parts[f"loss_t{i + 1}"] for i in range(heads)], grads)

    def theirs(wide):
        tensors = [x.to(wide).requires_grad_() for x in values]
        logits = tensors
        if linear:
            logits = [F.linear(x, w.to(wide)) for x, w in zip(tensors, layers, strict=True)]
        normal = [w / sum(weights) for w in weights]
        total, losses = reference.multi_token_prediction_loss(
            logits, labels, weights=normal, normalizer=normalizer, **how, **plain
        )
        grads = torch.autograd.grad(total, tensors, torch.full_like(total, factor))
        return _named(total, losses, grads)

    if linear and dtype.itemsize == 2:  # whose logits are halves, too: linear.py
        values, layers = ([x.float() for x in tensors] for tensors in (values, layers))
        dtype = torch.float32
    actual = ours([laid(x, layout) for x in values])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    truth, in_dtype = theirs(torch.float64), theirs(wide)
    for name, result in actual.items():
        assert_close(result, truth[name], in_dtype[name], name, 8.0)
    off = _unused(module, labels, plain, heads)
    bad = [poisoned(laid(x, layout), off[i][..., None], kind) for i, x in enumerate(values)]
    assert_bits(ours(bad), actual, "garbage")


def _named(total, losses, grads):
    found = {"total": total.detach()} | {f"loss {i}": x.detach() for i, x in enumerate(losses)}
    return found | {f"grad {i}": grad for i, grad in enumerate(grads)}


def _unused(module, labels, plain, heads):
    """By head, the positions that predict nothing."""
    found = []
    for i in range(heads):
        moved = reference.shift_labels(
            labels, plain["attention_mask"], plain["segment_ids"], shift=i + 1
        )
        off = moved == -100
        if module.mask_sources and plain["attention_mask"] is not None:
            off = off | ~plain["attention_mask"]
        found.append(off)
    return found


def hidden_state_mtp(c):
    """HiddenStateMTPLoss in float64 against its heads by F.cross_entropy."""
    classes, width, heads, g = (
        c.pick((3, 2, 5)),
        c.pick((4, 2, 3)),
        c.pick((2, 1, 3)),
        c.generator(),
    )
    labels, given_labels, plain, given = _rows(c, g, classes)
    temperature, sources, in_place = c.pick((1.0, 1.7, 0.3)), bool(c.below(2)), bool(c.below(2))
    layout, kind, factor = c.layout(), c.poison(), c.pick((1.0, -0.5))
    plain["segment_ids"] = given["segment_ids"] = None
    mask = plain["attention_mask"]
    with torch.random.fork_rng():
        torch.manual_seed(int(g.initial_seed()))
        module = mle.HiddenStateMTPLoss(
            classes, width, heads, temperature=temperature, mask_sources=sources,
            inplace_backward=in_place,
        ).double()  # fmt: skip
    hidden = torch.randn(*labels.shape, width, generator=g, dtype=torch.float64)
    c.said |= {"heads": heads, "temperature": temperature, "sources": sources, "in_place": in_place}
    parameters = list(module.parameters())

    def gradients(loss, x):
        found = torch.autograd.grad(
            loss, [x, *parameters], torch.full_like(loss, factor), materialize_grads=True
        )
        return {f"grad {i}": grad for i, grad in enumerate(found)}

    def ours(values):
        x = values.detach().requires_grad_()
        out = module(x, given_labels, **given)
        parts = {f"loss {i}": loss for i, loss in enumerate(out["per_token_losses"])}
        return {"total": out["mtp_loss"].detach(), **parts, **gradients(out["mtp_loss"], x)}

    actual = ours(laid(hidden, layout))
    x = hidden.detach().requires_grad_()
    on = torch.ones_like(labels) if mask is None else mask
    losses = by_torch(module, x, labels, on, on if sources else None)
    total = 0.1 * torch.stack(losses).sum() / max(min(heads, labels.shape[1] - 1), 1)
    expected = {"total": total.detach(), **{f"loss {i}": y.detach() for i, y in enumerate(losses)}}
    expected |= gradients(total, x)
    for name, result in actual.items():
        torch.testing.assert_close(result, expected[name], rtol=1e-9, atol=1e-11)
    used = torch.zeros_like(labels, dtype=torch.bool)
    for off in _unused(module, labels, plain, heads):
        used |= ~off
    assert_bits(ours(poisoned(laid(hidden, layout), ~used[..., None], kind)), actual, "garbage")
