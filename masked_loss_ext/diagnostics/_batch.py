# SPDX-License-Identifier: BSD-3-Clause
"""The batch: its tensors by name, which the mask is about, what to put into the padding, and the
same batch without it."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch

RANDOM, NAN, INF = "random values", "NaN", "inf"
OTHER, FLIPPED, UNIGNORED = "other values", "flipped", "labels for ignored"
ADDITIVE = -1e4  # what is at most this switches a key off when it is added to a score


def map_tensors(function, value, path=""):
    """The same nest of containers with ``function(name, tensor)`` in place of each tensor."""

    def mapped(name, item):
        return map_tensors(function, item, f"{path}.{name}" if path else str(name))

    if isinstance(value, torch.Tensor):
        return function(path or "batch", value)
    if isinstance(value, Mapping):
        mapping = {key: mapped(key, item) for key, item in value.items()}
        return mapping if type(value) is dict else _mapping_like(value, mapping)
    if hasattr(value, "_fields") and isinstance(value, tuple):  # a named tuple
        return type(value)(*map(mapped, value._fields, value))
    if isinstance(value, (list, tuple)):
        items = [map_tensors(function, item, f"{path}[{i}]") for i, item in enumerate(value)]
        return type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            item = mapped(field.name, getattr(value, field.name))
            object.__setattr__(result, field.name, item)  # frozen ones too
        return result
    return value


def _mapping_like(value, items):
    try:  # keeps the class, which the step may ask for attributes
        result = copy.copy(value)
        for key, item in items.items():
            result[key] = item
        return result
    except TypeError:  # read-only
        return items


class Entries(NamedTuple):
    """The batch's tensors, sorted by what the mask says about them."""

    keep: torch.Tensor  # bool, of the mask's shape (without trailing 1s that no entry has)
    tensors: dict[str, torch.Tensor]  # all of them, in the order of the batch
    checked: list[str]  # padding is where keep is off
    masks: list[str]  # these say what is padding, and stay
    others: list[str]  # their shape does not begin with the mask's


def sort_entries(batch, mask):
    tensors = {}
    map_tensors(tensors.setdefault, batch)
    plain = {name: tensor for name, tensor in tensors.items() if _is_plain(tensor)}
    keep = mask.detach() != 0
    while True:
        matching = [name for name, t in plain.items() if t.shape[: keep.dim()] == keep.shape]
        masks = [name for name in matching if _is_mask(plain[name], mask, keep)]
        if matching != masks or keep.dim() == 1 or keep.shape[-1] != 1:
            break
        keep = keep.squeeze(-1)
    checked = [name for name in matching if name not in masks]
    others = [name for name in tensors if name not in matching]
    return Entries(keep, tensors, checked, masks, others)


def _is_plain(tensor):
    """What can be filled at a mask's positions: no sparse, nested, quantised or meta one, no
    float8."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.itemsize > 1 or not tensor.is_floating_point()


def shape_of(tensor):
    return "nested" if tensor.is_nested else list(tensor.shape)


def inside(tensor, where):
    """The entries of a tensor where a mask of its first dimensions is on."""
    return tensor.detach()[where.to(tensor.device)]


def largest(tensor):
    """Of the absolute values that are finite."""
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _is_mask(tensor, mask, keep):
    """The mask itself (same memory), or 1 and 0 like it, its complement, or its additive form.

    It must be one number over all that is kept and another over all that is not: token ids that
    happen to be 0 in the padding alone are data.
    """
    if tensor is mask or (tensor.shape == mask.shape and tensor.data_ptr() == mask.data_ptr()):
        return True
    if tensor.is_complex() or tensor.numel() != keep.numel() or not keep.any():
        return False
    on, off = inside(tensor, keep), inside(tensor, ~keep)
    zero_on, zero_off = (on == 0).all(), (off == 0).all()
    same = (on == 1).all() & zero_off
    complement = zero_on & (off == 1).all()
    additive = zero_on & (off <= ADDITIVE).all() & tensor.is_floating_point()
    return bool(same | complement | additive)


# --- other content -------------------------------------------------------------------------------


def is_floating(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def split_labels(tensor, ignore_index):
    """Of an integer entry (as int64): where it says itself that it does not count, and the values
    that do count. Besides ``ignore_index`` that is said by a negative value if there is but one."""
    tensor = tensor.detach().long()
    values = tensor.unique()
    negative = values[values < 0]
    said = [int(negative)] if negative.numel() == 1 else []
    said += [] if ignore_index is None else [ignore_index]
    ignored = torch.tensor(said, dtype=torch.int64, device=tensor.device)
    return torch.isin(tensor, ignored), values[~torch.isin(values, ignored)]


def kinds_of(tensor, drop, *, nonfinite, ignore_index):
    """The changes that can be made to an entry's padding."""
    if is_floating(tensor):
        return [RANDOM, NAN, INF] if nonfinite else [RANDOM]
    if tensor.dtype == torch.bool:
        return [FLIPPED]
    ignored, values = split_labels(tensor, ignore_index)
    ignored = inside(ignored, drop)
    kinds = [OTHER] if values.numel() > 1 and not ignored.all() else []
    return kinds + ([UNIGNORED] if values.numel() and ignored.any() else [])


def changed(tensor, drop, kind, generator, ignore_index=None):
    """A copy with other content where ``drop``; all else has the same bits."""
    result, old = tensor.detach().clone(), inside(tensor, drop)
    if kind == FLIPPED:
        new = ~old
    elif kind in (OTHER, UNIGNORED):
        ignored, values = split_labels(tensor, ignore_index)
        new = _other_integers(old.long(), values, generator, other=kind == OTHER)
        new = torch.where(inside(ignored, drop) == (kind == UNIGNORED), new, old.long())
    else:
        new = _other_numbers(tensor.detach(), old, kind, generator)
    result[drop.to(tensor.device)] = new.to(result.dtype)
    return result


def _other_integers(old, values, generator, *, other):
    """Drawn from ``values`` (sorted, all that occur), so that each is a valid index or label."""
    draw = torch.randint(int(other), len(values), old.shape, generator=generator, device="cpu")
    place = torch.searchsorted(values, old) if other else 0
    return values[(place + draw.to(old.device)) % len(values)]


def _other_numbers(tensor, old, kind, generator):
    # Drawn on the CPU: the same on every device, and no device's generator moves.
    wide = torch.complex64 if tensor.is_complex() else torch.float32
    noise = torch.randn(old.shape, generator=generator, dtype=wide, device="cpu")
    if kind == NAN:
        return torch.full_like(old, float("nan"))
    if kind == INF:
        noise = torch.where(noise.real < 0, -float("inf"), float("inf"))
        return noise.to(old.device, old.dtype)
    # Ten times what is there, but so that a product of two does not overflow.
    scale = min(10 * (largest(tensor) or 1.0), torch.finfo(tensor.dtype).max ** 0.5)
    return (noise * scale).to(old.device, old.dtype)


# --- without padding -----------------------------------------------------------------------------


class Cut(NamedTuple):
    """A batch of copies of one padded row, and the same without the padding."""

    row: str  # which one, in words
    length: str  # "3 of 5"
    share: float  # of the row that is cut off
    padded: dict[str, torch.Tensor]
    alone: dict[str, torch.Tensor]


def cut_padding(entries, ignore_index):
    """A Cut, or why there is none.

    The batch is cut, never lengthened: positions beyond those it has may not exist in the model,
    and on a GPU an index out of range ends the process. Every row becomes the same one, so that
    entries of one number per row (lengths) stay true of what is left.
    """
    keep = entries.keep
    if keep.dim() > 2:
        return f"the mask has {keep.dim()} dimensions, rows are known of one or two"
    if not entries.masks and not _labels_are_masked(entries, ignore_index):
        return "the mask is not an entry of the batch, so it cannot be cut along"
    rows = keep if keep.dim() == 2 else keep[None]
    found = _row_with_padding(rows)
    if found is None:
        return "no row has padding at one of its ends"
    row, start, stop = found
    padded = dict(entries.tensors)
    for name, tensor in padded.items():
        if keep.dim() == 2 and tensor.layout == torch.strided and not tensor.is_nested:
            if tensor.dim() and tensor.shape[0] == len(rows):
                padded[name] = tensor.detach()[row : row + 1].expand_as(tensor)
    alone = {
        name: padded[name].narrow(keep.dim() - 1, start, stop - start)
        for name in entries.checked + entries.masks
    }
    total = rows.shape[1]
    return Cut(
        row=f"row {row}" if keep.dim() == 2 else "the row",
        length=f"{stop - start} of {total}",
        share=1 - (stop - start) / total,
        padded=padded,
        alone=padded | alone,
    )


def _row_with_padding(rows):
    """(row, start, stop): the one nearest to half padding, at the right if any is padded there."""
    right, left, total = [], [], rows.shape[1]
    for row, kept in enumerate(rows.cpu()):
        places = kept.nonzero().flatten().tolist()
        if places and places[-1] + 1 < total:
            right.append((row, 0, places[-1] + 1))
        elif places and places[0]:
            left.append((row, places[0], total))
    return min(right or left, key=lambda f: abs(2 * (f[2] - f[1]) - total), default=None)


def _labels_are_masked(entries, ignore_index):
    """Whether an integer entry holds ignored labels throughout the padding, as a mask would."""
    integers = (entries.tensors[name] for name in entries.checked)
    integers = (t for t in integers if not is_floating(t) and t.dtype != torch.bool)
    return any(inside(split_labels(t, ignore_index)[0], ~entries.keep).all() for t in integers)
