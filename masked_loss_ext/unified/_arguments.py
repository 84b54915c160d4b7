# SPDX-License-Identifier: BSD-3-Clause
"""Argument errors that the modules of the unified loss share."""

import torch

from .._checks import check_int, check_integers, check_mask, check_rank, check_tensor, shape_text


def require(name, argument, value, fits, rule):
    if not fits:  # NaN fits nothing
        raise ValueError(f"{name}: {argument} must be {rule}, got {value}")


def check_smoothing(name, smoothing):
    require(name, "label_smoothing", smoothing, 0 <= smoothing <= 1, "in [0, 1]")


def check_token_id(name, argument, token_id, vocab_size, is_class):
    """One int or None. ``is_class``: its probability will be asked for."""
    if token_id is None:
        return
    check_int(name, argument, token_id)
    if is_class and vocab_size is not None:
        inside = 0 <= token_id < vocab_size
        require(name, argument, token_id, inside, f"in [0, {vocab_size})")


def check_logits(name, logits, targets, vocab_size=None, argument="logits"):
    """``[B, S, V]`` of the targets' B and S, and of the vocabulary that was promised."""
    check_tensor(name, argument, logits)
    check_rank(name, argument, logits, 3, "[B, S, V]")
    if not logits.is_floating_point():
        raise ValueError(f"{name}: {argument} must be a floating tensor, got {logits.dtype}")
    if logits.shape[:2] != targets.shape:
        raise ValueError(
            f"{name}: {argument} must have the B and S of targets {shape_text(targets)}, got "
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
    if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() != 2:
        raise ValueError(
            f"{name}: attention_mask must have 2 dimensions [B, S], the tokenizer's, got "
            f"{shape_text(attention_mask)} (a mask [B, 1, S, S] that attention adds to its scores "
            "says nothing about targets)"
        )
    check_mask(name, "attention_mask", attention_mask, argument, targets, 2)
