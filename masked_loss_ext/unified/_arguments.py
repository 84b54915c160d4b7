# SPDX-License-Identifier: BSD-3-Clause
"""Argument errors that the modules of the unified loss share."""

import torch

from .._checks import (
    check_device,
    check_flags,
    check_int,
    check_integers,
    check_mask,
    check_number,
    check_rank,
    check_tensor,
    shape_text,
)
from ._rows import check_floating

LARGEST_SIZE = 2**31 - 1  # of a vocabulary, a sequence, a window


def check_size(name, argument, value, least=1, most=LARGEST_SIZE):
    """An int of this range: how many of something there are."""
    if isinstance(value, (bool, torch.Tensor)):  # the latter may be on a device
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    check_int(name, argument, value)
    if value < least:
        raise ValueError(f"{name}: {argument} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name}: {argument} must be at most {most}, got {value}")


def as_part(name, part, *args, **options):
    """``part(...)``, a class, module or method, for the module ``name``, which takes arguments by
    the same names: the errors are its own."""
    try:
        return part(*args, **options)
    except (ValueError, TypeError, IndexError) as error:
        owner = getattr(part, "__self__", part)
        kind = owner.__name__ if isinstance(owner, type) else type(owner).__name__
        text = str(error).replace(f"{kind}: ", f"{name}: ", 1)
        raise type(error)(text.replace("target_ids", "targets")) from None


def check_weights(name, weights):
    """Finite numbers by the names of the arguments."""
    for argument, value in weights.items():
        check_number(name, argument, value)


def check_ignore_index(name, ignore_index):
    check_size(name, "ignore_index", ignore_index, -(2**63), 2**63 - 1)


def may_be_on(name, active):
    """Whether heads are active, or only the device knows."""
    if isinstance(active, torch.Tensor):
        return True
    check_flags(name, {"mtp_active": active})
    return bool(active)


def check_smoothing(name, smoothing, most=1, argument="label_smoothing"):
    check_number(name, argument, smoothing, least=0, most=most)


def check_token_id(name, argument, token_id, vocab_size=None):
    """One int or None; below ``vocab_size`` where that is given: labels are, too."""
    if token_id is None:
        return
    check_size(name, argument, token_id, -(2**63), 2**63 - 1)
    if vocab_size is not None and not 0 <= token_id < vocab_size:
        raise ValueError(
            f"{name}: {argument} must be in [0, {vocab_size}), got {token_id}: there is no such "
            "class"
        )


def check_logits(name, logits, targets, vocab_size=None, argument="logits", like="targets"):
    """``[B, S, V]`` of the targets' B and S, and of the vocabulary that was promised."""
    check_floating(name, argument, logits)
    check_rank(name, argument, logits, 3, "[B, S, V]")
    check_device(name, like, targets, argument, logits)
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"{name}: {argument} must have the B and S of {like} {shape_text(targets)}, got "
            f"{shape_text(logits)}"
        )
    if vocab_size is not None and logits.shape[-1] != vocab_size:
        raise ValueError(
            f"{name}: {argument} must have vocab_size = {vocab_size} classes in the last "
            f"dimension, got {shape_text(logits)}: pass vocab_size={logits.shape[-1]} (padded "
            "vocabularies count in full)"
        )


def check_targets(name, targets, attention_mask, argument="targets"):
    check_integers(name, argument, targets)
    check_rank(name, argument, targets, 2, "[B, S]")
    if attention_mask is not None:
        check_tensor(name, "attention_mask", attention_mask)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"{name}: attention_mask must have 2 dimensions [B, S], the tokenizer's, got "
            f"{shape_text(attention_mask)} (a mask [B, 1, S, S] that attention adds to its scores "
            "says nothing about targets)"
        )
    check_mask(name, "attention_mask", attention_mask, argument, targets, 2)


def check_segments(name, segment_ids, targets, argument="targets"):
    """``[B, S]`` or ``[1, S]`` integers for targets ``[B, S]``; None passes."""
    if segment_ids is None:
        return
    check_integers(name, "segment_ids", segment_ids)
    batch, length = targets.shape
    if segment_ids.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"{name}: segment_ids must have the shape of {argument} {shape_text(targets)} (or one "
            f"row for all), got {shape_text(segment_ids)}"
        )
    check_device(name, "segment_ids", segment_ids, argument, targets)


def check_list(name, argument, value):
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: {argument} must be a list of tensors, got {type(value).__name__}")


def check_tokens(name, arguments, logits, targets, attention_mask):
    """Logits ``[..., V]``, targets ``[...]`` and a mask like them; ``arguments`` are the names of
    the first two."""
    check_floating(name, arguments[0], logits)
    check_integers(name, arguments[1], targets)
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name}: {arguments[1]} must have the shape of {arguments[0]} {shape_text(logits)} "
            f"without the last dimension, got {shape_text(targets)}"
        )
    check_device(name, arguments[1], targets, arguments[0], logits)
    check_mask(name, "attention_mask", attention_mask, arguments[1], targets, targets.dim())
