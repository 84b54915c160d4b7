# SPDX-License-Identifier: BSD-3-Clause
"""The cross entropy of a language model's outputs, for ``Trainer(compute_loss_func=...)``."""

import functools
import inspect
import re
from typing import Any

import torch
import torch.nn.functional as F

from .._checks import (
    as_integers,
    check_device,
    check_integers,
    check_length,
    check_number,
    check_tensor,
    refusal,
    refuse_unknown,
    shape_text,
)
from ..ops.masked_cross_entropy import masked_cross_entropy
from ..reference.cross_entropy import counted_rows

_NAME = "causal_lm_loss"
_INSTEAD = {"logits": "outputs", "target": "labels", "normalizer": "num_items_in_batch"}
_OPTIONS = dict.fromkeys(inspect.signature(masked_cross_entropy).parameters)
for _name in _INSTEAD:
    del _OPTIONS[_name]
_PER_TOKEN = ("mask", "token_weight", "segment_ids")
_IGNORED = -100  # what the Trainer counts by


def causal_lm_loss(
    outputs: Any,
    labels: torch.Tensor | None = None,
    num_items_in_batch: float | torch.Tensor | None = None,
    *,
    shift: int | None = None,
    shift_labels: torch.Tensor | None = None,
    virtual_tokens: int = 0,
    **options: Any,
) -> Any:
    r"""Cross entropy of each token given those before it, for ``Trainer(compute_loss_func=...)``.

    .. math:: L = \frac1N \sum_{b,\,t:\ y_{b,t+1} \ne -100}
        \Big(\log\sum_c e^{x_{btc}} - x_{bt,\,y_{b,t+1}}\Big)

    with N = ``num_items_in_batch``, the count of the whole accumulation window over all ranks, as
    the loss of the models themselves, but the logits are read once, in place and in their own
    dtype, and those of labels -100 not at all. The gradients of the micro-batches then add up to
    that of the mean over the window. Equivalent::

        masked_cross_entropy(logits, labels, shift=1, normalizer=num_items_in_batch)

    Where no label counts the loss is 0 (the models' own: NaN). Under ``bf16=True`` accelerate makes
    a float32 copy of the logits before any loss sees them; a model loaded in bfloat16 has none.

    Models whose labels stand where they are predicted, masked language models (BERT) and
    encoder-decoders (T5), take ``functools.partial(causal_lm_loss, shift=0)``. The Trainer keeps
    the labels from the model where it has a compute_loss_func, so an encoder-decoder needs its
    ``decoder_input_ids`` from the collator: ``DataCollatorForSeq2Seq(tokenizer, model=model)``, or
    ``model.prepare_decoder_input_ids_from_labels(labels)``.

    Args:
        outputs: the model's: a mapping with "logits", or a tuple that begins with them;
            ``[B, S, V]``.
        labels: ``[B, S]``, as the model takes them: not shifted, -100 at what does not count.
        num_items_in_batch: the denominator, a number or a tensor; None: the labels counted here.
        shift: by how much labels stand after the position that predicts them. None: 1.
        shift_labels: ``[B, S]`` labels that have been shifted already, by the name that the models'
            own losses have for them: made by ``masked_loss_ext.shift_labels`` before a sequence is
            cut over ranks. ``labels`` is then not looked at and may be None; nothing is shifted.
            The Trainer hands them over where ``pass_columns`` tells it to.
        virtual_tokens: the positions that the model puts before the tokens of every row and gives
            logits for (prompt tuning, p-tuning: ``num_virtual_tokens``; prefix tuning has none).
            Labels and what else belongs to the tokens then have that many fewer positions. The last
            virtual token predicts the first label.
        options: keywords of masked_cross_entropy (label_smoothing, z_loss, softcap, temperature,
            focal_gamma, weight, token_weight, inplace_backward, ...), given with
            ``functools.partial(causal_lm_loss, z_loss=1e-4)``, and what changes with the batch, as
            token_weight does, by ``pass_columns``. mask, token_weight and segment_ids are those
            of the labels (shift_labels). The Trainer counts labels that are not -100, whatever
            these say. The ``label_smoothing_factor`` of TrainingArguments does nothing beside a
            compute_loss_func.

    Returns:
        ``[]`` float32 (float64 for float64 logits), or what reduction and return_stats ask for.

    Raises:
        ValueError, TypeError, IndexError: as masked_cross_entropy, in the words used here.
    """
    if not options.keys() <= _OPTIONS.keys():
        _refuse(options)
    logits, source = _logits(outputs)
    target, shift, name = target_of(_NAME, labels, shift_labels, shift)
    target = beside(_NAME, name, target, source, logits)
    for key in _PER_TOKEN:
        options[key] = beside(_NAME, key, options.get(key), source, logits)
    if virtual_tokens != 0:
        check_length(_NAME, "virtual_tokens", virtual_tokens)
        check_integers(_NAME, name, target)
        if _positions_more(logits, target) != virtual_tokens:
            rule = f"be how many positions {source} {shape_text(logits)} has more than {name} "
            rule += shape_text(target)
            raise refusal(_NAME, "virtual_tokens", rule, virtual_tokens)
        target, options = _behind(virtual_tokens, name, target, options)
    count = count_of(_NAME, num_items_in_batch, source, logits)
    try:
        return masked_cross_entropy(logits, target, shift=shift, normalizer=count, **options)
    except (ValueError, TypeError, IndexError) as error:
        words = {"logits": source, "target": name, "normalizer": "num_items_in_batch"}
        text = in_words(error, words | {"masked_cross_entropy": _NAME})
        raise type(error)(text + _advice(logits, target)) from None


def counted_tokens(labels, *, shift=None, shift_labels=None, virtual_tokens=0, **options):
    """How many labels causal_lm_loss counts, ``[]`` on their device."""
    labels, shift, _ = target_of(_NAME, labels, shift_labels, shift)
    check_tensor(_NAME, "labels", labels)
    check_length(_NAME, "shift", shift)
    if virtual_tokens:
        labels, options = _behind(virtual_tokens, "labels", labels, options)
    ignored = options.get("ignore_index", _IGNORED)
    mask, segment_ids = options.get("mask"), options.get("segment_ids")
    rows, labels = labels.unsqueeze(-1), as_integers(labels)
    return counted_rows(rows, labels, mask, ignored, shift, segment_ids)[1].sum()


def keywords_of(loss_func):
    """What causal_lm_loss is told by functools.partial; None: it is another function."""
    keywords = {}
    while loss_func is not causal_lm_loss:
        if isinstance(loss_func, functools.partial):
            keywords = {**loss_func.keywords, **keywords}
            loss_func = loss_func.func
        elif hasattr(loss_func, "__wrapped__"):  # by torch.compile, for one
            loss_func = loss_func.__wrapped__
        else:
            return None
    return keywords


def _logits(outputs):
    """(logits, how the caller knows them)."""
    if isinstance(outputs, (tuple, list)) and outputs:
        logits, source = outputs[0], "outputs[0]"
    else:
        logits = outputs.get("logits") if hasattr(outputs, "get") else None
        source = "outputs.logits"
    if logits is None:
        held = list(outputs) if hasattr(outputs, "keys") else type(outputs).__name__
        raise refusal(_NAME, "outputs", "hold logits", held)
    if not isinstance(logits, torch.Tensor):
        raise refusal(_NAME, source, "be a torch.Tensor", type(logits).__name__, TypeError)
    return logits, source


def in_words(error, words):
    """What an operator's function says, in words of the function that called it."""
    return re.sub(rf"\b({'|'.join(words)})\b", lambda found: words[found[0]], str(error))


def target_of(function, labels, shift_labels, shift):
    """The labels to take, by how much they are still to be shifted, and their name."""
    name, target = "labels", labels
    if shift_labels is not None:
        name, target = "shift_labels", shift_labels
    if not isinstance(target, torch.Tensor):
        got = f"{type(target).__name__}: the collator has to make them"
        raise refusal(function, name, "be a tensor", got)
    if shift_labels is None:
        return target, 1 if shift is None else shift, name
    if shift is not None and shift != 0:
        rule = "be 0 or None beside shift_labels, which are shifted"
        raise refusal(function, "shift", rule, shift)
    return target, 0, name


def count_of(function, num_items_in_batch, source, logits):
    """The denominator, on the device of the logits."""
    name = "num_items_in_batch"
    if not isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch is not None:
            check_number(function, name, num_items_in_batch, least=0)
        return num_items_in_batch
    count = beside(function, name, num_items_in_batch, source, logits)
    if count.numel() == 0:
        raise refusal(function, name, "hold a number", "an empty tensor")
    # Under DataParallel there is one copy of the count per replica, for a model whose replicas'
    # losses are averaged; this loss is of all of them, so all copies divide it.
    return count.sum()


def beside(function, name, value, source, logits):
    """A tensor on the device of the logits (the last of several); anything else as it is."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_meta and not logits.is_meta:
        check_device(function, name, value, source, logits)
    return value.to(logits.device)


def _behind(n, name, target, options):
    """Labels and options of n more positions in front, whose own labels do not count."""
    # In front of labels, not cut from the logits: a slice of those has a gradient of their size.
    ignored = options.get("ignore_index", _IGNORED)
    target, options = F.pad(target.to(torch.int64), (n, 0), value=ignored), dict(options)
    for key in _PER_TOKEN:
        tensor = options.get(key)
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.dim() == 0 or tensor.shape[-1] + n != target.shape[-1]:
            rule = f"be of the positions of {name}, without virtual tokens"
            raise refusal(_NAME, key, rule, shape_text(tensor))
        # The virtual tokens are in the first document.
        like = tensor[..., :1] if key == "segment_ids" else torch.zeros_like(tensor[..., :1])
        options[key] = torch.cat([like.expand(*tensor.shape[:-1], n), tensor], -1)
    return target, options


def _refuse(options):
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown[0] in _INSTEAD:
        raise TypeError(
            f"{_NAME}: unexpected keyword argument {unknown[0]}; here it is {_INSTEAD[unknown[0]]}"
        )
    refuse_unknown(_NAME, unknown, ["shift_labels", "virtual_tokens", *_OPTIONS])


def _positions_more(logits, target):
    """By how much a row of logits is longer than one of labels."""
    return logits.shape[-2] - target.shape[-1] if logits.dim() > 1 and target.dim() else None


def _advice(logits, target):
    """What a user of prompt tuning would have to say."""
    if logits.is_nested or target.is_nested or logits.shape[:-2] != target.shape[:-1]:
        return ""
    more = _positions_more(logits, target) or 0
    return f"; are there {more} virtual tokens in front? Then virtual_tokens={more}" * (more > 0)
