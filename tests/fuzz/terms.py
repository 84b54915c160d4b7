# SPDX-License-Identifier: BSD-3-Clause
"""Properties of what language-model losses are made of: cross_entropy_terms, what repeats in rows
of tokens, and what one of them tells the other."""

import torch
from cases_terms import assert_agrees, evaluate
from repetition_cases import both, both_by_definition, python_counts

from masked_loss_ext import reference
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms
from masked_loss_ext.ops.repetition import repetition_links
from tests.fuzz.agreement import assert_bits, is_close
from tests.fuzz.choices import CONVERTED, INTEGERS, laid, mask_values, poisoned
from tests.fuzz.rows import CLASSES, WIDE, labels_of, row_shape

TERMS = ("cross_entropy_terms", "_cross_entropy_terms_backward")


def terms(c):
    """All terms and their gradient; labels of few letters, so that n-grams come again."""
    rows, classes = row_shape(c), c.pick(CLASSES)
    if c.chance(0.01):
        classes = c.pick(WIDE)
    g, dtype, layout, row_layout = c.generator(), c.dtype(), c.layout(), c.layout()
    spread, banned = c.pick((2.0, 0.1, 10.0)), c.chance(0.1)
    logits = torch.randn((*rows, classes), generator=g, dtype=torch.float64) * spread
    letters = min(classes, c.pick((2, 3, 5, 9)))
    if banned:
        logits[..., letters:] = -torch.inf
    labels, label_dtype, ignore = labels_of(c, g, rows, letters)
    arguments = {"logits": logits.to(dtype), "target": labels, "ignore_index": ignore}
    arguments["temperature"] = c.pick((None, 0.7, 1.0, 2.5, 0.2))
    on, has_mask, kind = labels != ignore, c.below(2), c.mask_dtype()
    asked, n, ways = c.pick((None, 2, 0, 3)), c.pick((2, 1, 3)), c.below(4)
    mask = torch.rand(rows, generator=g) < c.pick((0.8, 0.3, 1.0))
    if has_mask:
        arguments["mask"], on = mask, on & mask
    arguments["unscaled"] = ways != 1
    if ways > 1 and asked is not None:
        arguments["classes"] = torch.randint(-1, letters, (*rows, asked), generator=g)
    if ways > 2 and labels.numel() and rows:
        links = repetition_links(*[x.reshape(-1, rows[-1]) for x in (labels, on)], n)
        arguments["links"] = [x.reshape(rows) for x in links]
    _say(c, arguments, dtype, layout)
    given = dict(arguments)
    for name, how in (("logits", layout), ("target", row_layout), ("classes", row_layout)):
        if name in given:
            given[name] = laid(given[name], how)
    given["target"] = laid(labels.to(label_dtype), row_layout)
    if has_mask:
        given["mask"] = laid(mask_values(mask, kind), row_layout)
    _compare(c, arguments, given, on)


def _compare(c, arguments, given, on):
    bad = dict(given)
    bad["logits"] = poisoned(given["logits"], ~on.unsqueeze(-1), c.poison())
    if "mask" in given:
        bad["target"] = poisoned(given["target"], ~(arguments["mask"] != 0), "nan")
    actual = evaluate(cross_entropy_terms, given)
    doubled = {**arguments, "logits": arguments["logits"].double()}
    truth = evaluate(reference.cross_entropy_terms, doubled)
    if not is_close(actual, truth, arguments["logits"].shape[-1]):
        assert_agrees(actual, arguments, "cross_entropy_terms")
    assert_bits(evaluate(cross_entropy_terms, bad), actual, "garbage")
    c.saw(*TERMS, calls=2)


def _say(c, arguments, dtype, layout):
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.dim():
            value = list(value.shape)
        c.said[name] = value
    c.said |= {"dtype": dtype, "layout": layout}


def repetition(c):
    """Counts and links of rows of few different tokens, any strides, any mask."""
    rows, length = c.pick((2, 1, 3, 0, 5)), c.pick((5, 9, 1, 2, 17, 0, 30, 64))
    g, dtype, layout = c.generator(), c.pick((*INTEGERS, *CONVERTED)), c.layout()
    letters, scale, n = c.pick((2, 1, 3, 10)), c.pick((1, 1, 2**40)), c.pick((2, 1, 3, 4, 7, 40))
    share, has_mask, kind = c.pick((0.9, 0.5, 1.0, 0.0)), c.below(2), c.mask_dtype()
    tokens = torch.randint(0, letters, (rows, length), generator=g)
    if dtype == torch.int64:
        tokens = (tokens - letters // 2) * scale
    given = laid(tokens.to(dtype), layout)
    on = torch.rand((rows, length), generator=g) < share if has_mask else None
    valid = None if on is None else laid(mask_values(on, kind), c.layout())
    c.said |= {"tokens": f"{dtype}{list(tokens.shape)}/{layout}", "valid": kind, "n": n}
    actual = both(given, valid, n)
    for ours, theirs in zip(actual, both_by_definition(tokens, on, n), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    masks = [[True] * length] * rows if on is None else on.tolist()
    counts = torch.stack(actual[:4], 1).tolist()
    for row, mask, count in zip(tokens.tolist(), masks, counts, strict=True):
        assert python_counts(row, mask, n) == tuple(count)
    if on is not None:
        again = both(poisoned(given, ~on, "nan"), valid, n)
        for ours, theirs in zip(again, actual, strict=True):
            assert torch.equal(ours, theirs), "garbage"
    c.saw("repetition_counts", "repetition_links", calls=1 if on is None else 2)
