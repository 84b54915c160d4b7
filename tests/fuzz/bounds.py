# SPDX-License-Identifier: BSD-3-Clause
"""Numbers at their bounds are taken, those beyond are refused: by the documented exception, which
names the function and the argument."""

import math

import torch

import masked_loss_ext as mle
from masked_loss_ext.ops import repetition
from tests.fuzz import squared_error
from tests.fuzz.linear import LinearProblem
from tests.fuzz.rows import Problem

NAN, INF, TINY = math.nan, math.inf, torch.finfo(torch.float32).tiny
NO_NUMBER = ("1", [1.0], 1j)
NO_INT = (1.5, "1", None, NAN)
# argument: what is at its bounds, what is beyond
SHARED = {
    "label_smoothing": ((0, 1, 0.0, 1.0), (-1e-9, 1.0000001, NAN, INF, *NO_NUMBER)),
    "temperature": ((TINY, 1e30), (0, -1.0, NAN, INF, TINY / 2, *NO_NUMBER)),
    "softcap": ((TINY, 1e38, INF, None), (0, -1.0, NAN, TINY / 2, *NO_NUMBER)),
    "z_loss": ((0, 1e30), (-1e-9, NAN, INF, *NO_NUMBER)),
    "focal_gamma": ((0, 100.0), (-1e-9, NAN, INF, *NO_NUMBER)),
    "shift": ((0, 2**40, 2**48), (-1, 2**63, *NO_INT)),
    "ignore_index": ((-(2**63), 2**63 - 1), (2**63, -(2**63) - 1, *NO_INT)),
    "reduction": ((), ("avg", "", None, 1, "Mean")),
}
HIDDEN = SHARED | {
    "chunk_rows": ((1, 2**40, None), (0, -1, 2**63, 1.5, "1")),
    "num_valid": ((2**40, None), (-1, 2**63, 1.5, "1")),
}
DIMENSIONS = {"class_dim": ((-1,), (9, -9, 2**63, *NO_INT))}
STATISTICS = {name: SHARED[name] for name in ("temperature", "softcap", "ignore_index")}
SQUARED = {
    "foreground_weight": ((0, -1e30, 1e30), (NAN, INF, None, *NO_NUMBER)),
    "background_weight": ((0, -1e30, 1e30), (NAN, INF, None, *NO_NUMBER)),
    "reduction": ((), ("avg", "", None, 1)),
    "loss": ((), ("mae", "", None, 1)),
    "eps": ((0, 1e30), (-1e-9, NAN, *NO_NUMBER)),
}
ERRORS = (ValueError, TypeError, IndexError)


def _rows(c):
    problem = Problem(c)
    name, function, table = c.pick(
        (
            ("masked_cross_entropy", mle.masked_cross_entropy, SHARED | DIMENSIONS),
            ("row_statistics", mle.row_statistics, STATISTICS | DIMENSIONS),
        )
    )
    return name, function, table, _given(problem, ("logits", "target", "mask"))


def _hidden(c):
    problem = LinearProblem(c)
    name, function, table = c.pick(
        (
            ("masked_linear_cross_entropy", mle.masked_linear_cross_entropy, HIDDEN),
            ("linear_row_statistics", mle.linear_row_statistics, STATISTICS),
        )
    )
    given = _given(problem, ("hidden", "target", "mask", "bias"))
    return name, function, table, {"weight": problem.given["head"], **given}


def _given(problem, names):
    given = {name: problem.given[name] for name in names if name in problem.given}
    return given | {"ignore_index": problem.options.get("ignore_index", -100)}


def _tokens(c):
    shape = squared_error.some_shape(c, 3)
    inputs, _ = squared_error.tensors(c, c.generator(), shape, None, shape[:2], shape[:2])
    given = {"model_pred": inputs["prediction"], "target": inputs["target"]}
    name = "masked_edit_token_mean_loss"
    return name, mle.masked_edit_token_mean_loss, SQUARED, given


def _ngrams(c):
    tokens = torch.randint(0, 3, (2, c.pick((5, 0, 1))), generator=c.generator())
    name, function = c.pick(
        (
            ("repetition_counts", repetition.repetition_counts),
            ("repetition_links", repetition.repetition_links),
        )
    )
    table = {"ngram_size": ((1, 2**63 - 1), (0, -1, 2**63, *NO_INT))}
    return name, function, table, {"tokens": tokens}


FAMILIES = (_rows, _hidden, _tokens, _ngrams)


def refused(call, name, argument):
    try:
        call()
    except ERRORS as error:
        text = str(error)
        assert text.startswith(f"{name}: "), f"{text!r} does not begin with the function"
        assert argument in text, f"{text!r} does not name {argument}"
        return
    raise AssertionError(f"{name} took it")


def bounds(c):
    """A number at its bound, or one beyond, of a random call."""
    name, function, table, given = c.pick(FAMILIES)(c)
    argument = c.pick(list(table))
    at, beyond = table[argument]
    value, within = c.pick(beyond), bool(at) and bool(c.below(2))
    if within:
        value = c.pick(at)
    shapes = {n: list(x.shape) for n, x in given.items() if isinstance(x, torch.Tensor)}
    c.said |= {"function": name, argument: value, "shapes": shapes}
    given[argument] = value
    if not within:
        refused(lambda: function(**given), name, argument)
        return
    if argument == "shift" and given["target"].dim() == 0:  # of no sequence
        return
    if argument == "ignore_index":  # labels that were ignored are none of the classes
        given["mask"] = torch.zeros(given["target"].shape, dtype=torch.bool)
    function(**given)


def labels(c):
    """A label that is no class, at a row that counts, is named."""
    problem = LinearProblem(c) if c.below(2) else Problem(c)
    if not problem.on.any() or problem.options.get("ignore_index", -100) < 0:
        problem.options.pop("ignore_index", None)
    name = "masked_linear_cross_entropy" if problem.values == "hidden" else "masked_cross_entropy"
    plain = dict(problem.plain)
    ignore = problem.options.get("ignore_index", -100)
    wrong = c.pick((problem.classes, -1, 2**31, -(2**31)))
    counted = problem.read().nonzero()
    if wrong == ignore or not len(counted):
        return
    at = tuple(counted[c.below(len(counted))].tolist())
    plain["target"] = plain["target"].clone()
    plain["target"][at] = wrong
    c.said |= {"function": name, "label": wrong, "at": at}
    weight = {"class_weight": plain.pop("weight", None)} if name.startswith("masked_l") else {}
    if weight:
        plain["weight"] = plain.pop("head")
    function = getattr(mle, name)
    refused(lambda: function(**plain, **weight, **problem.options), name, "target")
