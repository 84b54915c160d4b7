# SPDX-License-Identifier: BSD-3-Clause
"""The table of cases of cross_entropy_terms, and how a result is measured.

The kernel changes what it does at temperature 1 (one sum serves both), where only one temperature
has a gradient, at the width of a vector and at blocks of 2048 classes.
"""

from dataclasses import dataclass

import torch
from cases import stored_as
from simulated_cross_entropy import assert_close

from masked_loss_ext import reference

DIFFERENTIABLE = reference.CrossEntropyTerms._fields[:6]
LARGEST_UPSTREAM = 4.0  # of upstream_of; at the label it cancels with p times the same
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    shape: tuple = (2, 12, 37)  # of the logits
    temperature: float | None = 0.7
    asked: int | None = 2  # classes per row, some negative, some the label
    linked: bool = True
    alphabet: int = 3  # labels are this few, so that n-grams come again
    mask: float | None = 0.85  # share that is on
    ignored: float = 0.0
    banned: float = 0.0
    spread: float = 3.0
    unscaled: bool = True
    layout: str = "contiguous"
    row_layout: str = "contiguous"
    target_dtype: torch.dtype = torch.int64


CASES = [
    Case("all", "everything at once"),
    Case("t1", "one sum for both temperatures", temperature=None),
    Case("t1_number", "1 is None", temperature=1.0),
    Case("hot", "T > 1", temperature=2.5),
    Case("cold", "T far below 1", temperature=0.2),
    Case("scaled_only", "one temperature alone", asked=None, linked=False, unscaled=False),
    Case("scaled_only_t1", "", temperature=None, asked=None, linked=False, unscaled=False),
    Case("nothing_asked", "no classes, no links", asked=None, linked=False),
    Case("classes_only", "", linked=False, asked=7),
    Case("classes_none", "K = 0", linked=False, asked=0),
    Case("links_only", "", asked=None),
    Case("one_letter", "the label is the only candidate there could be", alphabet=1),
    Case("long_chains", "many earlier places, each class once", (1, 150, 11), alphabet=9),
    Case("sparse", "no n-gram comes again", (2, 6, 50), alphabet=50),
    Case("v1", "one class", (2, 5, 1), alphabet=1),
    Case("v2", "", (2, 9, 2), alphabet=2),
    Case("v31", "a border of vectors", (1, 9, 31)),
    Case("v32", "", (1, 9, 32)),
    Case("v33", "", (1, 9, 33), temperature=None),
    Case("v2047", "a border of blocks", (1, 5, 2047)),
    Case("v2049", "", (1, 5, 2049)),
    Case("v4097", "", (1, 5, 4097), temperature=None),
    Case("v50257", "odd rows are not aligned", (1, 4, 50257), alphabet=2),
    Case("many_rows", "many chunks", (40, 60, 9)),
    Case("no_mask", "every row counts", mask=None),
    Case("ignored", "labels drop rows too", ignored=0.2),
    Case("nothing_counts", "empty selection", mask=0.0),
    Case("banned", "a third of the classes is -inf", banned=0.3),
    Case("flat", "all classes alike", spread=0.0),
    Case("rank_1", "[V]", (37,), linked=False, mask=None),
    Case("rank_2", "[S, V]", (12, 37)),
    Case("rank_4", "the links run along the last dimension", (2, 2, 9, 37)),
    Case("no_rows", "N = 0", (2, 0, 5)),
    Case("int32", "labels of any integer", target_dtype=torch.int32),
    Case("uint8", "", target_dtype=torch.uint8, ignored=0.2),
    Case("row_gaps", "NaN between the rows", layout="row_gaps"),
    Case("permuted", "leading dimensions exchanged", layout="permuted"),
    Case("misaligned", "begins one element late", (2, 3, 1025), layout="misaligned"),
    Case("expanded", "one sample for all: stride 0", layout="expanded"),
    Case("transposed", "classes are not adjacent: copied", layout="transposed"),
    Case("rows_sliced", "labels, mask, classes and links apart", row_layout="sliced"),
    Case("rows_transposed", "", row_layout="transposed"),
]
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)


def links_of(target, valid, n=2):
    """(context_before, ngram_after), one row after another. Not as ``repetition_links``: these lead
    to every earlier window with the same context, equal to that at t or not."""
    size = target.shape[-1]
    before = torch.full(target.shape, -1, dtype=torch.int32)
    after = torch.full(target.shape, size, dtype=torch.int32)
    rows = (target, valid, before, after)
    if target.numel() == 0:
        return before, after
    for tokens, on, b, a in zip(*(x.view(-1, size) for x in rows), strict=True):
        grams = {
            t: tuple(tokens[t - n + 1 : t + 1].tolist())
            for t in range(n - 1, size)
            if on[t - n + 1 : t + 1].all()
        }
        for t, gram in grams.items():
            b[t] = max((u for u in grams if u < t and grams[u][:-1] == gram[:-1]), default=-1)
            a[t] = min((u for u in grams if u > t and grams[u] == gram), default=size)
    return before, after


def make(case, dtype, seed=0):
    """The arguments of a case, by name; those that it does not have are missing."""
    g = torch.Generator().manual_seed(seed)
    *rows, classes = case.shape
    logits = torch.randn(case.shape, generator=g, dtype=torch.float64) * case.spread
    letters = min(case.alphabet, classes)
    if case.banned:
        banned = torch.rand(case.shape, generator=g) < case.banned
        banned[..., :letters] = False  # a label that is banned is tested apart
        logits[banned] = -torch.inf
    target = torch.randint(0, letters, rows, generator=g)
    ignore = 255 if case.target_dtype == torch.uint8 else -100
    target[torch.rand(rows, generator=g) < case.ignored] = ignore
    on = target != ignore
    arguments = {
        "logits": stored_as(logits.to(dtype), case.layout),
        "target": stored_as(target.to(case.target_dtype), case.row_layout),
        "temperature": case.temperature,
        "ignore_index": ignore,
        "unscaled": case.unscaled,
    }
    if case.mask is not None:
        mask = torch.rand(rows, generator=g) < case.mask
        on = on & mask
        arguments["mask"] = stored_as(mask, case.row_layout)
    if case.asked is not None:
        asked = torch.randint(-1, min(classes, 5), (*rows, case.asked), generator=g)
        arguments["classes"] = stored_as(asked, case.row_layout)
    if case.linked:
        arguments["links"] = [stored_as(x, case.row_layout) for x in links_of(target, on)]
    return arguments


def upstream_of(terms, seed=5):
    """A gradient for each term that has one, of both signs, different for each row."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn((*term.shape, 2), generator=g, dtype=torch.float64)[..., 1]
        for name, term in terms._asdict().items()
        if term is not None and name in DIFFERENTIABLE
    }


def evaluate(function, arguments, upstream=None):
    """The terms by name, and the gradient of the logits."""
    arguments = dict(arguments)
    logits = arguments.pop("logits").detach().requires_grad_()
    terms = function(logits, arguments.pop("target"), arguments.pop("mask", None), **arguments)
    upstream = upstream_of(terms) if upstream is None else upstream
    outputs = [getattr(terms, name) for name in upstream]
    grads = [g.to(out.dtype) for g, out in zip(upstream.values(), outputs, strict=True)]
    results = {name: term.detach() for name, term in terms._asdict().items() if term is not None}
    results["grad logits"] = torch.autograd.grad(outputs, logits, grads)[0]
    return results


def assert_agrees(results, arguments, what, upstream=None):
    """``results`` of ``evaluate`` or the simulator with the reference's, by the rule of
    simulated_cross_entropy.py; log-probabilities are differences of numbers of their row's size."""
    dtype = arguments["logits"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    in_dtype, truth = (
        evaluate(
            reference.cross_entropy_terms,
            {**arguments, "logits": arguments["logits"].to(kind)},
            upstream,
        )
        for kind in (wide, torch.float64)
    )
    assert results.keys() == truth.keys()
    log_p = arguments["logits"].double().log_softmax(-1)
    means = (truth["scaled_mean_log_prob"].abs(), log_p.abs().nan_to_num(0, 0, 0).mean(-1))
    size = max((x.nan_to_num(0, 0, 0).max().item() for x in means if x.numel()), default=0.0)
    # A rounding of log p is 1 / (1 - p) of them in log(1 - p), and as many more in its slope.
    rest = -torch.expm1(log_p.nan_to_num(-1, 0, -1).clamp(max=-(2.0**-24)))
    unlikely = 1 / rest.min().item() if rest.numel() and arguments.get("links") else 1.0
    for name, result in results.items():
        is_gradient = name == "grad logits"
        assert result.dtype == (dtype if is_gradient else wide), name
        own = LARGEST_UPSTREAM / (arguments.get("temperature") or 1) if is_gradient else size
        if name in ("unlikelihood", "grad logits") and wide == torch.float64:
            own *= unlikely ** (1 + is_gradient)
        if result.numel():
            assert_close(result, truth[name], in_dtype[name], f"{what} {name}", own)
