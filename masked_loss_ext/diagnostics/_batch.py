# SPDX-License-Identifier: BSD-3-Clause
"""The batch: its tensors by name, which the mask is about, and what to put into the padding."""

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
    if isinstance(value, torch.Tensor):
        return function(path or "batch", value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(function, item, _join(path, key)) for key, item in value.items()}
        return _mapping_like(value, items)
    if isinstance(value, (list, tuple)):
        fields = getattr(value, "_fields", None)  # of a named tuple
        names = [f"{path}[{i}]" for i in range(len(value))]
        names = [_join(path, name) for name in fields] if fields else names
        items = [map_tensors(function, *pair) for pair in zip(value, names, strict=True)]
        return type(value)(*items) if fields else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        result = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(function, getattr(value, field.name), _join(path, field.name))
            object.__setattr__(result, field.name, item)  # frozen ones too
        return result
    return value


def _join(path, name):
    return f"{path}.{name}" if path else str(name)


def _mapping_like(value, items):
    if type(value) is dict:
        return items
    try:  # keeps the class, which the step may ask for attributes
        result = copy.copy(value)
        for key, item in items.items():
            result[key] = item
        return result
    except TypeError:  # read-only
        return items


def tensors_of(batch):
    """name -> tensor, in the order of the batch."""
    found = {}
    map_tensors(found.setdefault, batch)
    return found


class Entries(NamedTuple):
    """The batch's tensors, sorted by what the mask says about them."""

    keep: torch.Tensor  # bool, of the mask's shape (without trailing 1s that no entry has)
    tensors: dict  # all of them
    checked: list  # names: padding is where keep is off
    masks: list  # names: these say what is padding, and stay
    others: list  # names: their shape does not begin with the mask's


def sort_entries(batch, mask):
    tensors = tensors_of(batch)
    plain = {name: tensor for name, tensor in tensors.items() if _is_plain(tensor)}
    keep = mask.detach() != 0
    matching, masks = _sorted(plain, mask, keep)
    while matching == masks and keep.dim() > 1 and keep.shape[-1] == 1:
        keep = keep.squeeze(-1)
        matching, masks = _sorted(plain, mask, keep)
    return Entries(
        keep=keep,
        tensors=tensors,
        checked=[name for name in matching if name not in masks],
        masks=masks,
        others=[name for name in tensors if name not in matching],
    )


def _is_plain(tensor):
    """What can be filled at a mask's positions: no sparse, nested, quantised or meta one, no
    float8."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    return tensor.itemsize > 1 or not tensor.is_floating_point()


def shape_of(tensor):
    return "nested" if tensor.is_nested else list(tensor.shape)


def _sorted(tensors, mask, keep):
    matching = [name for name, t in tensors.items() if t.shape[: keep.dim()] == keep.shape]
    return matching, [name for name in matching if _is_mask(tensors[name], mask, keep)]


def _is_mask(tensor, mask, keep):
    """The mask itself (same memory), or 1 and 0 like it, its complement, or its additive form.

    It must be one number over all that is kept and another over all that is not: token ids that
    happen to be 0 in the padding alone are data.
    """
    if tensor is mask or (tensor.shape == mask.shape and tensor.data_ptr() == mask.data_ptr()):
        return True
    keep = keep.to(tensor.device)
    if tensor.is_complex() or tensor.numel() != keep.numel() or not keep.any():
        return False
    on, off = tensor.detach()[keep], tensor.detach()[~keep]
    zero_on, zero_off = (on == 0).all(), (off == 0).all()
    same = (on == 1).all() & zero_off
    complement = zero_on & (off == 1).all()
    additive = zero_on & (off <= ADDITIVE).all() & tensor.is_floating_point()
    return bool(same | complement | additive)


def is_floating(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def split_labels(tensor, ignore_index):
    """Of an integer entry (as int64): where it says itself that it does not count, and the values
    that do count. Besides ``ignore_index`` that is said by a negative value if there is but one."""
    tensor = tensor.detach().long()
    values = tensor.unique()
    negative = values[values < 0]
    ignored = [int(negative)] if negative.numel() == 1 else []
    if ignore_index is not None:
        ignored.append(ignore_index)
    ignored = torch.tensor(ignored, dtype=torch.int64, device=tensor.device)
    return torch.isin(tensor, ignored), values[~torch.isin(values, ignored)]


def kinds_of(tensor, drop, *, nonfinite, ignore_index):
    """The changes that can be made to an entry's padding."""
    if is_floating(tensor):
        return [RANDOM, NAN, INF] if nonfinite else [RANDOM]
    if tensor.dtype == torch.bool:
        return [FLIPPED]
    ignored, values = split_labels(tensor, ignore_index)
    inside = ignored[drop.to(tensor.device)]
    kinds = [OTHER] if values.numel() > 1 and not inside.all() else []
    return kinds + ([UNIGNORED] if values.numel() and inside.any() else [])


def changed(tensor, drop, kind, generator, ignore_index=None):
    """A copy with other content where ``drop``; all else has the same bits."""
    drop = drop.to(tensor.device)
    result = tensor.detach().clone()
    inside = result[drop]
    if kind == FLIPPED:
        result[drop] = ~inside
    elif kind in (OTHER, UNIGNORED):
        ignored, values = split_labels(tensor, ignore_index)
        ignored, inside = ignored[drop], inside.long()
        new = _other_integers(inside, values, generator, other=kind == OTHER)
        new = torch.where(ignored == (kind == UNIGNORED), new, inside)
        result[drop] = new.to(result.dtype)
    else:
        result[drop] = _other_numbers(tensor.detach(), inside, kind, generator)
    return result


def _other_integers(inside, values, generator, *, other):
    """Drawn from ``values`` (sorted, all that occur), so that each is a valid index or label."""
    shape = inside.shape
    draw = torch.randint(int(other), len(values), shape, generator=generator, device="cpu")
    place = torch.searchsorted(values, inside) if other else 0
    return values[(place + draw.to(inside.device)) % len(values)]


def _other_numbers(tensor, inside, kind, generator):
    # Drawn on the CPU: the same on every device, and no device's generator moves.
    wide = torch.complex64 if tensor.is_complex() else torch.float32
    noise = torch.randn(inside.shape, generator=generator, dtype=wide, device="cpu")
    if kind == NAN:
        return torch.full_like(inside, float("nan"))
    if kind == INF:
        noise = torch.where(noise.real < 0, -float("inf"), float("inf"))
        return noise.to(inside.device, inside.dtype)
    finite = tensor[tensor.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    # Ten times what is there, but so that a product of two does not overflow.
    scale = min(10 * (largest or 1.0), torch.finfo(tensor.dtype).max ** 0.5)
    return (noise * scale).to(inside.device, inside.dtype)
