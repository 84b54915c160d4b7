# SPDX-License-Identifier: BSD-3-Clause
"""The table of cases of masked_cross_entropy: shapes, options, masks, strides; a reason each.

The CPU kernel changes what it does at the width of a vector (8 or 16 classes), at blocks of a row
(powers of two from 64 to 32768 are likely borders), where few rows make it cut a row into pieces
for several threads, and where most rows are dropped.
"""

from dataclasses import dataclass, field

import torch
from cases import FLOATING, MASK_DTYPES, stored_as

from masked_loss_ext.reference.cross_entropy import counted_rows

IGNORE = -100
TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")

PLAIN = {}
# Every keyword at once, none of them at a value that would make another one cancel.
EVERYTHING = {
    "label_smoothing": 0.1,
    "temperature": 0.8,
    "softcap": 20.0,
    "z_loss": 1e-2,
    "focal_gamma": 1.5,
}


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    shape: tuple  # of the logits
    options: dict = field(default_factory=dict)
    mask: str | None = "random"  # see _on
    ignored: float = 0.2  # share of labels that are ignore_index
    weight: bool = False
    token_weight: bool = False
    segments: bool = False
    temperatures: bool = False  # one per row, NaN where that does not count
    banned: float = 0.0  # share of logits that are -inf
    spread: float = 3.0  # standard deviation of the logits
    layout: str = "contiguous"  # of the logits; see stored_as and _stored_logits
    row_layout: str = "contiguous"  # of target, mask, token_weight and segment_ids
    target_dtype: torch.dtype = torch.int64
    mask_dtype: torch.dtype = torch.bool


def _size(classes, rows=5):
    reason = f"{classes} classes: a border of vectors, blocks or pieces"
    return [
        Case(f"v{classes}", reason, (rows, classes), ignored=0.0),
        Case(
            f"v{classes}_everything",
            reason,
            (rows, classes),
            {**EVERYTHING, "reduction": "none"},
            mask=None,
            weight=True,
            token_weight=True,
        ),
    ]


SMALL_VOCABULARIES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 257, 511, 513)
BLOCKS = (1000, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4097)
PIECES = (16383, 16384, 16385, 32767, 32768, 32769, 50257)
SIZES = [case for v in SMALL_VOCABULARIES + BLOCKS for case in _size(v)]
SIZES += [case for v in PIECES for case in _size(v, rows=2)]
SIZES += _size(128256, rows=1)
SIZES += [
    Case("one_row", "a row is cut for all threads", (1, 1000), mask=None, ignored=0.0),
    Case("two_rows", "more threads than rows", (2, 5000), mask=None, ignored=0.0),
    Case("hundred_rows", "rows for each thread", (100, 33)),
    Case("many_rows", "many chunks of rows", (5000, 11), weight=True, token_weight=True),
    Case("many_tiny_rows", "two classes", (4999, 2), {"label_smoothing": 0.3}),
    Case("few_of_many", "one row in forty counts", (400, 130), mask="rare"),
    Case("flat_row", "all classes alike", (3, 1000), spread=0.0, mask=None),
    Case("peaked", "p is 1 or 0 to rounding", (7, 300), EVERYTHING, spread=30.0),
]

OPTIONS = [
    Case(
        f"{name}_{reduction}", "each keyword alone", (3, 7, 37), {**options, "reduction": reduction}
    )
    for name, options in {
        "plain": {},
        "smoothing": {"label_smoothing": 0.1},
        "smoothing_all": {"label_smoothing": 1.0},
        "temperature_low": {"temperature": 0.25},
        "temperature_high": {"temperature": 3.0},
        "softcap": {"softcap": 5.0},
        "z_loss": {"z_loss": 0.05},
        "z_loss_large": {"z_loss": 0.5},
        "focal": {"focal_gamma": 2.0},
        "focal_root": {"focal_gamma": 0.5},
        "focal_smoothing": {"focal_gamma": 3.0, "label_smoothing": 0.2},
        "everything": EVERYTHING,
        "shift": {"shift": 1},
        "shift_far": {"shift": 6},
        "shift_all": {"shift": 7},
        "shift_beyond": {"shift": 100},
    }.items()
    for reduction in REDUCTIONS
]
OPTIONS += [
    Case("normalizer", "a caller's count", (3, 7, 37), {"normalizer": 321}),
    Case("normalizer_fraction", "never clamped to 1", (3, 7, 37), {"normalizer": 0.125}),
    Case(
        "normalizer_weight", "goes before class weights", (3, 7, 37), {"normalizer": 9}, weight=True
    ),
    Case("normalizer_zero", "the loss is 0", (3, 7, 37), {"normalizer": 0.0}),
    Case("ignore_0", "another label to ignore", (3, 7, 37), {"ignore_index": 0}),
    Case("ignore_36", "the last class", (3, 7, 37), {"ignore_index": 36}, target_dtype=torch.int32),
]
for _reduction in REDUCTIONS:
    _options = {"reduction": _reduction}
    _everything = {**EVERYTHING, **_options}
    OPTIONS += [
        Case(f"weight_{_reduction}", "class weights", (3, 7, 37), _options, weight=True),
        Case(f"token_weight_{_reduction}", "weights", (3, 7, 37), _options, token_weight=True),
        Case(
            f"both_weights_{_reduction}",
            "weights and every number",
            (3, 7, 37),
            _everything,
            weight=True,
            token_weight=True,
        ),
        Case(
            f"segments_{_reduction}",
            "packed documents",
            (3, 17, 37),
            {**_everything, "shift": 2},
            weight=True,
            token_weight=True,
            segments=True,
        ),
        Case(
            f"banned_{_reduction}",
            "a third of the classes is -inf",
            (3, 17, 37),
            {"temperature": 0.8, "z_loss": 1e-2, "focal_gamma": 1.5, **_options},
            banned=0.3,
        ),
    ]

_others = {name: value for name, value in EVERYTHING.items() if name != "temperature"}
TEMPERATURES = [
    Case(f"temperatures_{name}", reason, shape, options, temperatures=True, **more)
    for name, reason, shape, options, more in (
        ("mean", "one per row", (3, 7, 37), {}, {}),
        ("none", "one per row", (3, 7, 37), {"reduction": "none"}, {"mask": None}),
        ("everything", "with each keyword", (3, 7, 1025), _others, {"weight": True}),
        ("shift", "that of t", (3, 17, 37), {"shift": 2, **_others}, {"segments": True}),
        ("pieces", "a row is cut", (2, 16385), {"softcap": 20.0}, {"mask": None}),
        ("of_many", "many chunks", (5000, 11), {}, {"token_weight": True}),
        ("rank_1", "[V]", (37,), {}, {"mask": None, "ignored": 0.0}),
        ("transposed", "copied", (3, 7, 37), {}, {"row_layout": "transposed"}),
        ("expanded", "copied", (3, 7, 37), {}, {"row_layout": "expanded"}),
    )
]

MASKS = [
    Case("no_mask", "every row counts", (3, 7, 12), mask=None, ignored=0.0),
    Case("ignore_only", "labels alone drop rows", (3, 7, 12), mask=None, ignored=0.5),
    Case("mask_only", "the mask alone", (3, 7, 12), ignored=0.0),
    Case("padded", "right padding", (4, 9, 12), mask="padded"),
    Case("one_counts", "a count of 1", (3, 7, 12), mask="one", ignored=0.0),
    Case("nothing_counts", "empty selection", (3, 7, 12), mask="nothing"),
    Case("all_ignored", "the same by labels", (3, 7, 12), mask=None, ignored=1.0),
    Case("nothing_weighted", "denominator 0", (3, 7, 12), EVERYTHING, mask="nothing", weight=True),
]
MASKS += [
    Case(f"mask_{str(d)[6:]}", "masks of any dtype", (3, 7, 12), mask_dtype=d)
    for d in MASK_DTYPES[1:]
]
MASKS += [
    Case(f"target_{str(d)[6:]}", "labels of any integer", (3, 7, 12), target_dtype=d)
    for d in TARGET_DTYPES[1:]
]

EMPTY = [
    Case("no_rows", "N = 0", (0, 5)),
    Case("no_rows_weighted", "N = 0", (0, 5), EVERYTHING, weight=True, token_weight=True),
    Case("no_samples", "B = 0", (0, 4, 5), {"shift": 1}, segments=True),
    Case("no_tokens", "S = 0", (3, 0, 5), {"shift": 1}),
    Case("no_rows_none", "N = 0", (3, 0, 5), {"reduction": "none"}),
]

RANKS = [
    Case("rank_1", "[V]", (37,), mask=None, ignored=0.0),
    Case("rank_1_none", "[V]", (37,), {"reduction": "none"}, "everything", 0.0, weight=True),
    Case("rank_4", "[B, H, S, V]", (2, 3, 5, 19), EVERYTHING, weight=True, token_weight=True),
    Case("rank_4_shift", "the shift is along S", (2, 3, 5, 19), {"shift": 2}, segments=True),
    Case("rank_5", "[A, B, H, S, V]", (2, 2, 2, 3, 19), {"reduction": "none"}),
]

LAYOUTS = (
    ("row_slice", "logits[:, :-1]"),
    ("row_gaps", "columns of a wider tensor, NaN between"),
    ("misaligned", "begins one element late"),
    ("permuted", "leading dimensions exchanged"),
    ("expanded", "one sample for all: stride 0"),
    ("transposed", "classes are not adjacent: copied"),
    ("sliced", "every second class; NaN between: copied"),
)
STRIDES = [
    Case(f"{layout}_{kind}", reason, shape, {**options, "shift": 1}, layout=layout, weight=True)
    for layout, reason in LAYOUTS
    for kind, shape, options in (
        ("mean", (3, 7, 37), EVERYTHING),
        ("none", (3, 4, 1025), {"reduction": "none"}),
    )
]
STRIDES += [
    Case(
        f"rows_{layout}",
        "labels, mask, weights and segments apart",
        (3, 7, 37),
        {"shift": 1, "reduction": "none"},
        token_weight=True,
        segments=True,
        row_layout=layout,
    )
    for layout in ("transposed", "sliced", "expanded", "misaligned")
]

CASES = SIZES + OPTIONS + TEMPERATURES + MASKS + EMPTY + RANKS + STRIDES
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)
TENSORS = ("target", "mask", "weight", "token_weight", "segment_ids", "temperature")


def make(case, dtype, seed=0):
    """The tensor arguments of a case, by name; those that it does not have are missing."""
    g = torch.Generator().manual_seed(seed)
    *rows, classes = case.shape
    logits = torch.randn(case.shape, generator=g, dtype=torch.float64) * case.spread
    if case.banned:
        logits[torch.rand(case.shape, generator=g) < case.banned] = -torch.inf
    labels = torch.randint(0, classes, rows, generator=g)
    if case.banned:  # a label that is banned makes the loss infinite: tested apart
        labels = logits.argmax(-1)
    ignore = case.options.get("ignore_index", IGNORE)
    ignore = 255 if case.target_dtype == torch.uint8 else ignore
    labels[torch.rand(rows, generator=g) < case.ignored] = ignore
    inputs = {
        "logits": _stored_logits(logits.to(dtype), case.layout),
        "target": stored_as(labels.to(case.target_dtype), case.row_layout),
    }
    if case.mask is not None:
        inputs["mask"] = _mask(case, rows, g)
    if case.weight:
        inputs["weight"] = torch.rand(classes, generator=g).add(0.25).to(dtype)
    if case.token_weight:
        values = torch.randn(rows, generator=g).to(dtype)  # of both signs
        inputs["token_weight"] = stored_as(values, case.row_layout)
    if case.segments:
        ids = torch.rand(rows, generator=g).lt(0.2).cumsum(-1)
        inputs["segment_ids"] = stored_as(ids, case.row_layout)
    if case.temperatures:
        values = stored_as(torch.rand(rows, generator=g).add(0.5), case.row_layout)
        inputs["temperature"] = _of_rows_that_count(values, case, inputs, ignore)
    return inputs


def _of_rows_that_count(values, case, inputs, ignore):
    if case.row_layout == "expanded":  # an entry belongs to rows of each kind
        return values
    masks = (inputs["target"], inputs.get("mask"), ignore, case.options.get("shift", 0))
    _, on = counted_rows(inputs["logits"], *masks, inputs.get("segment_ids"))
    return values.masked_fill_(~on, float("nan"))


def options_of(case):
    options = dict(case.options)
    if case.target_dtype == torch.uint8:
        options["ignore_index"] = 255
    return options


def _stored_logits(logits, layout):
    if layout != "row_slice":
        return stored_as(logits, layout)
    gap = torch.full_like(logits[..., :1, :], float("nan"))
    return torch.cat([logits, gap], -2)[..., :-1, :]


def _mask(case, rows, generator):
    if case.mask == "padded":
        length = torch.arange(rows[0]) * 7 % rows[1]
        on = torch.arange(rows[1]) < (rows[1] - length)[:, None]
    elif case.mask == "one":
        on = torch.zeros(rows, dtype=torch.bool)
        on.view(-1)[on.numel() // 2] = True
    else:
        share = {"random": 0.6, "rare": 0.025, "nothing": 0.0, "everything": 1.1}[case.mask]
        on = torch.rand(rows, generator=generator) < share
    return stored_as(_values(on, case.mask_dtype), case.row_layout)


def _values(on, dtype):
    """Not 1 where the dtype has other values, and with low bytes of 0: on is what is not 0."""
    if dtype == torch.bool:
        return on
    value = 0.25 if dtype in FLOATING else torch.iinfo(dtype).min or 254
    return torch.where(on, torch.tensor(value, dtype=dtype), torch.tensor(0, dtype=dtype))
