# SPDX-License-Identifier: BSD-3-Clause
"""The one read of the logits: what counts, what is asked of each row, and the terms."""

from typing import NamedTuple

import torch

from ..ops.repetition import RepetitionCounts
from ..reference import CrossEntropyTerms
from ._documents import document_counts, document_starts, of_one_document
from ._operators import terms as terms_of
from ._penalties import eos_classes
from ._rows import valid_rows


class Batch(NamedTuple):
    """Tensors ``[B, S]``; None what no component asked for."""

    targets: torch.Tensor  # int64, aligned with the logits
    valid: torch.Tensor  # count in losses
    said: torch.Tensor  # count in repetition statistics: not padding either
    starts: torch.Tensor | None  # where the document of each begins
    eos: torch.Tensor | None  # class whose probability is penalised, -1 for none
    previous: torch.Tensor | None
    terms: CrossEntropyTerms | None
    eos_log_prob: torch.Tensor | None
    previous_log_prob: torch.Tensor | None
    counts: RepetitionCounts | None


def aligned(loss, targets, attention_mask, starts):
    """Targets as int64 and which count, both moved one position back if labels are unshifted: the
    first of a document is then nobody's target."""
    targets = targets.long()
    valid = valid_rows(targets, attention_mask, loss.ignore_index)
    if loss.shift_labels:
        end = torch.full_like(targets[:, :1], loss.ignore_index)
        targets = torch.cat([targets[:, 1:], end], 1)
        following = valid[:, 1:] if starts is None else valid[:, 1:] & of_one_document(starts, 1)
        valid = torch.cat([following, torch.zeros_like(valid[:, :1])], 1)
    return targets, valid


def _counted_in_repetition(loss, targets, valid):
    if loss.pad_token_id is None or loss.pad_token_id == loss.eos_token_id:
        return valid
    return valid & (targets != loss.pad_token_id)


def read(name, loss, logits, targets, attention_mask, segment_ids, primary_logits):
    """A Batch of UnifiedLoss ``loss``; the main loss may be that of other, primary_logits."""
    starts = document_starts(segment_ids, targets)
    targets, valid = aligned(loss, targets, attention_mask, starts)
    said = _counted_in_repetition(loss, targets, valid)
    ngram, detector = loss.ngram_penalty, loss.immediate_repetition_detector
    eos = eos_classes(loss, targets, valid, starts)
    previous = None if detector is None else detector.classes(targets, said, starts)
    asked = [classes for classes in (eos, previous) if classes is not None]
    unscaled = bool(asked) or ngram is not None or loss.focal_loss is not None
    terms = None
    if unscaled or primary_logits is None:
        terms = terms_of(
            name,
            "targets",
            logits,
            targets,
            valid,
            temperature=_temperature(loss, logits),
            classes=torch.stack(asked, -1) if asked else None,
            links=None if ngram is None else ngram.links(targets, said, starts),
            ignore_index=loss.ignore_index,
            unscaled=unscaled,
        )
    eos_log_prob = None if eos is None else terms.class_log_prob[..., 0]
    previous_log_prob = None if previous is None else terms.class_log_prob[..., -1]
    counts = _counts(loss, targets, said, starts)
    asked = eos_log_prob, previous_log_prob
    return Batch(targets, valid, said, starts, eos, previous, terms, *asked, counts)


def _temperature(loss, logits):
    if loss.primary_loss_type != "deepseek":
        return None
    return loss.main_loss.temperature_for(logits)


def _counts(loss, targets, said, starts):
    """Of the data, once for both penalties."""
    nobody = loss.ngram_penalty is None and loss.immediate_repetition_detector is None
    if nobody or loss.penalty_on == "model":
        return None
    return document_counts(targets, said, loss.ngram_size, starts)
