# SPDX-License-Identifier: BSD-3-Clause
"""The table of cases: shapes, masks, weights and strides, each with the reason why it is there.

The CPU kernel changes what it does at 1024 columns (a block), at 32768 elements (a chunk), between
one mask value per row and one per element, and between tensors used in place and others.
"""

from dataclasses import dataclass

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    *FLOATING,
)
REDUCTIONS = ("mean", "sum", "batch_mean", "token_sum", "token", "none")


@dataclass(frozen=True)
class Case:
    name: str
    reason: str
    shape: tuple
    mask: str | None = "padded"  # see _mask
    edit: str | None = None  # "tokens", "elements", or "one_row" for all samples
    weighting: tuple | None = None  # its shape
    layout: str = "contiguous"  # of prediction; see _stored_as
    target_layout: str | None = None  # None: the same
    mask_layout: str = "contiguous"
    mask_dtype: torch.dtype = torch.bool
    target_dtype: torch.dtype | None = None  # None: that of prediction
    weighting_dtype: torch.dtype | None = None
    edit_dtype: torch.dtype | None = None  # an integer one: 0 and 255
    loss: str = "mse"
    delta: float | None = None


SIZES = [
    Case("single", "one element", (1, 1, 1)),
    Case("one_channel", "rows of one element merge into one row", (3, 5, 1), weighting=(3, 5, 1)),
    Case("three_channels", "no vector fits, tail of 3", (2, 7, 3), edit="tokens"),
    Case("one_vector", "whole vectors, no tail", (2, 9, 64), edit="tokens", weighting=(2, 9, 1)),
    Case("tail_of_1", "one past a vector", (2, 9, 65), edit="tokens"),
    Case("tail_of_15", "longest AVX-512 tail", (2, 5, 31), weighting=(2, 5, 31)),
    Case("below_block", "1023 of 1024 columns", (1, 3, 1023), mask="elements"),
    Case("one_block", "1024 columns", (1, 3, 1024), mask="elements", weighting=(1024,)),
    Case("above_block", "second block of 1 column", (1, 3, 1025), weighting=(1, 3, 1025)),
    Case("two_blocks_tail", "tail of 3 in the third block", (2, 2, 2051), mask="elements"),
    Case("below_chunk", "32767 columns in one chunk", (1, 2, 32767), weighting=(1, 2, 1)),
    Case("one_chunk", "32768 columns", (1, 2, 32768), mask="elements"),
    Case("above_chunk", "a row is cut in two", (1, 2, 32769), mask="elements", edit="tokens"),
    Case("flat_chunks", "no mask: all is one row", (3, 100, 257), mask=None),
    Case("many_rows", "many chunks of rows", (64, 600, 3), mask="random", edit="tokens"),
    Case("rows_of_chunk", "512 rows of 64 are one chunk, 513 two", (1, 513, 64)),
    Case("long_row", "sums of a million terms stay exact", (1, 1, 1 << 20), weighting=(1, 1, 1)),
]

MASKS = [
    Case("no_mask", "every element counts", (2, 5, 6), mask=None, weighting=(2, 5, 1)),
    Case("all_dropped", "empty selection: 0 and zero gradients", (2, 5, 6), mask="nothing"),
    Case("all_dropped_elements", "the same per element", (2, 5, 6), mask="no_element"),
    Case("one_kept", "a count of 1", (2, 5, 6), mask="one", weighting=(2, 5, 1)),
    Case("all_kept", "a mask that drops nothing", (2, 5, 6), mask="everything"),
    Case("random_tokens", "gaps between kept rows", (4, 33, 6), mask="random", edit="tokens"),
    Case("elements", "mask per element", (4, 33, 6), mask="elements", edit="tokens"),
    Case("empty_rows", "element mask that empties whole rows", (4, 9, 6), mask="holes"),
    Case("samples", "mask of the first dimension only", (6, 3, 4), mask="samples"),
    Case("edit_elements", "edit mask per element", (3, 7, 5), edit="elements"),
    Case("edit_no_mask", "edit mask alone", (3, 7, 5), mask=None, edit="tokens"),
]
MASKS += [
    Case("one_row", "[1, T] for all samples", (4, 9, 6), mask="one_row", edit="one_row"),
    Case("column", "[B, 1] for all tokens", (4, 9, 6), mask="column", weighting=(4, 9, 6)),
    Case("pixels", "[B, 1, H, W] for all channels", (2, 3, 4, 5), mask="pixels"),
    Case("pixels_long", "the same, longer than a block", (2, 3, 30, 40), mask="pixels"),
    Case("pixels_edit", "[1, T, 1] of [B, T, C]", (3, 7, 5), mask="middle", edit="tokens"),
    Case("edit_int64", "on where not 0", (3, 7, 5), edit="tokens", edit_dtype=torch.int64),
    Case("edit_uint8", "255 is 1", (3, 7, 5), edit="elements", edit_dtype=torch.uint8),
]
MASKS += [
    Case(f"mask_{str(d)[6:]}_{kind}", "masks of any dtype", (2, 6, 5), mask=kind, mask_dtype=d)
    for d in MASK_DTYPES[1:]
    for kind in ("random", "elements")
]

EMPTY = [
    Case("no_samples", "B = 0", (0, 5, 6), weighting=(1, 5, 1), edit="tokens"),
    Case("no_tokens", "T = 0", (3, 0, 6), weighting=(3, 1, 1), edit="tokens"),
    Case("no_channels", "C = 0", (3, 5, 0), weighting=(3, 5, 1), edit="tokens"),
    Case("no_channels_elements", "C = 0", (3, 5, 0), mask="elements", weighting=(3, 5, 0)),
    Case("nothing_no_mask", "no element, no mask", (0, 5, 6), mask=None),
]

WEIGHTS = [
    Case("weight_scalar", "one number", (2, 5, 6), weighting=()),
    Case("weight_one", "rank 1, one number", (2, 5, 6), weighting=(1,)),
    Case("weight_channel", "one per channel", (2, 5, 6), weighting=(6,)),
    Case("weight_sample", "one per sample", (2, 5, 6), weighting=(2, 1, 1), edit="tokens"),
    Case("weight_token_shared", "one per position", (2, 5, 6), weighting=(5, 1)),
    Case("weight_sample_channel", "per sample and channel", (2, 5, 6), weighting=(2, 1, 6)),
    Case("weight_element", "one per element", (2, 5, 6), mask="elements", weighting=(2, 5, 6)),
    Case("weight_sample_flat", "no mask merges T and C", (2, 5, 6), None, weighting=(2, 1, 1)),
    Case("weight_all", "all factors per element", (2, 5, 6), "elements", "elements", (2, 5, 6)),
]

RANKS = [
    Case("rank_0", "a number", (), mask=None, weighting=()),
    Case("rank_1", "one dimension", (37,), mask="elements"),
    Case("rank_2", "[B, L]", (5, 37), mask="elements", weighting=(37,)),
    Case("rank_2_rows", "[B, L], whole samples", (5, 37), mask="samples"),
    Case("rank_4", "[B, T, H, D]", (2, 3, 4, 5), mask="random", weighting=(2, 3, 1, 1)),
    Case("rank_5", "[B, T, H, W, D]", (2, 3, 2, 4, 3), mask="elements", edit="tokens"),
]

STRIDES = [
    Case("transposed", "columns are not adjacent", (3, 7, 5), edit="tokens", layout="transposed"),
    Case("sliced", "every second element; NaN between", (3, 7, 5), layout="sliced"),
    Case("sliced_long", "the same over block borders", (1, 2, 1500), "elements", layout="sliced"),
    Case("row_gaps", "rows apart, columns adjacent", (3, 7, 64), layout="row_gaps"),
    Case("expanded", "one sample for all: stride 0", (3, 7, 5), layout="expanded"),
    Case("misaligned", "begins one element late", (3, 7, 65), layout="misaligned"),
    Case("permuted", "stored [T, B, C]", (3, 7, 5), weighting=(3, 7, 1), layout="permuted"),
    Case("unlike", "two layouts", (3, 7, 5), layout="transposed", target_layout="sliced"),
    Case("target_only", "only target is odd", (3, 7, 64), target_layout="transposed"),
    Case("mask_transposed", "mask stored [T, B]", (3, 7, 5), mask_layout="transposed"),
    Case("mask_sliced", "mask elements apart", (3, 7, 5), "elements", mask_layout="sliced"),
    Case("mask_expanded", "one row mask for all", (3, 7, 5), mask_layout="expanded"),
    Case("rank_5_strides", "nothing merges", (2, 3, 2, 3, 4), "elements", layout="transposed"),
]

_f16, _bf16, _f32, _f64 = FLOATING
MIXED = [
    Case("target_f32", "half prediction, float target", (2, 7, 65), target_dtype=_f32),
    Case("target_f64", "float64 widens the result", (2, 7, 65), target_dtype=_f64),
    Case("target_bf16", "bf16 target", (2, 7, 65), target_dtype=_bf16, layout="sliced"),
    Case("weight_f16", "half weights", (2, 7, 5), weighting=(2, 7, 5), weighting_dtype=_f16),
    Case("weight_f64", "wide weights", (2, 7, 5), weighting=(2, 7, 1), weighting_dtype=_f64),
]

# Errors are about 1.4 in size: a third of them lie below 0.5.
LOSSES = [
    Case("smooth_l1_at_0", "beta 0 is l1", (2, 9, 65), loss="smooth_l1", delta=0.0),
    Case("huber_default", "delta 1 where none is given", (2, 9, 65), loss="huber"),
    Case("pseudo_huber_long", "three blocks", (1, 3, 2051), loss="pseudo_huber", delta=2.0),
    Case("l1_chunks", "a row is cut in two", (1, 2, 32769), mask="elements", loss="l1"),
    Case("huber_mixed", "converted", (2, 7, 65), target_dtype=_f64, loss="huber", delta=0.5),
]
for _loss in ("l1", "smooth_l1", "huber", "pseudo_huber"):
    _how = {"loss": _loss, "delta": 0.5}
    LOSSES += [
        Case(f"{_loss}_rows", "row by row", (2, 9, 65), edit="tokens", weighting=(2, 9, 1), **_how),
        Case(f"{_loss}_all", "all factors", (2, 5, 6), "elements", "elements", (2, 5, 6), **_how),
        Case(f"{_loss}_sliced", "converted", (3, 7, 5), weighting=(5,), layout="sliced", **_how),
    ]

CASES = SIZES + MASKS + EMPTY + WEIGHTS + RANKS + STRIDES + MIXED + LOSSES
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)


def make(case, dtype, seed=0):
    """The operator's tensor arguments for a case, by name."""
    g = torch.Generator().manual_seed(seed)

    def values(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    edit_shape = {
        **{"tokens": case.shape[:2], "elements": case.shape, None: None},
        "one_row": (1, *case.shape[1:2]),
    }[case.edit]
    weighting = None
    if case.weighting is not None:
        weighting = values(case.weighting).abs().add(0.1).to(case.weighting_dtype or dtype)
    mask = _mask(case.mask, case.shape, g)
    if mask is not None:
        mask = stored_as(_mask_values(mask, case.mask_dtype), case.mask_layout)
    target_layout = case.target_layout or case.layout
    edit = None if edit_shape is None else torch.rand(edit_shape, generator=g)
    if case.edit_dtype is not None:
        edit = (edit < 0.5).to(case.edit_dtype) * 255
    element_loss = {}
    if case.loss != "mse":
        element_loss["loss"] = case.loss
        element_loss["delta"] = None if case.delta is None else torch.tensor(case.delta)
    return {
        "prediction": stored_as(values(case.shape).to(dtype), case.layout),
        "target": stored_as(values(case.shape).to(case.target_dtype or dtype), target_layout),
        "mask": mask,
        "edit_mask": edit,
        "weighting": weighting,
        **element_loss,
    }


def _mask(kind, shape, generator):
    if kind is None:
        return None
    tokens = shape[:1] if len(shape) == 1 else shape[:2]

    def random(shape, p=0.6):
        return torch.rand(shape, generator=generator) < p

    if kind == "padded":  # right-padded samples of unequal length, the first one full
        length = torch.arange(tokens[0]) * 7 % max(tokens[1], 1)
        return torch.arange(tokens[1]) < (tokens[1] - length)[:, None]
    if kind == "holes":
        return random(shape) & random((*tokens, 1))
    if kind == "one":
        return torch.arange(tokens[0] * tokens[1]).reshape(tokens) == tokens[1]
    return {
        "random": lambda: random(tokens),
        "elements": lambda: random(shape),
        "samples": lambda: random(shape[:1]),
        "one_row": lambda: random((1, *shape[1:2])),
        "column": lambda: random((shape[0], 1)),
        "pixels": lambda: random((shape[0], 1, *shape[2:])),
        "middle": lambda: random((1, shape[1], 1)),
        "nothing": lambda: torch.zeros(tokens, dtype=torch.bool),
        "no_element": lambda: torch.zeros(shape, dtype=torch.bool),
        "everything": lambda: torch.ones(tokens, dtype=torch.bool),
    }[kind]()


def _mask_values(mask, dtype):
    """Values other than 0 and 1 where the dtype has them: a mask is on where it is not 0."""
    if dtype == torch.bool:
        return mask
    on = 0.25 if dtype.is_floating_point else torch.iinfo(dtype).max - 1
    if dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        on = torch.iinfo(dtype).min  # its low bytes are 0: a mask that is cut short would be off
    return torch.where(mask, torch.tensor(on, dtype=dtype), torch.tensor(0, dtype=dtype))


def stored_as(tensor, layout):
    """The same values with other strides; whatever lies between them is NaN (or on)."""
    shape = tensor.shape
    gap = float("nan") if tensor.is_floating_point() else 1
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        order = list(range(tensor.dim()))[::-1]
        return tensor.permute(order).contiguous().permute(order)
    if layout == "permuted":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded":
        return tensor[:1].expand(shape)
    if layout == "misaligned":
        storage = torch.full((tensor.numel() + 1,), gap, dtype=tensor.dtype)
        return storage[1:].view(shape).copy_(tensor)
    size = (*shape[:-1], shape[-1] * 2 + 1)
    storage = torch.full(size, gap, dtype=tensor.dtype)
    view = storage[..., 1::2] if layout == "sliced" else storage[..., 1 : shape[-1] + 1]
    return view.copy_(tensor)
