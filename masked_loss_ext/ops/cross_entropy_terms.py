# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms: the public function."""

from .. import reference
from ..reference import CrossEntropyTerms


def cross_entropy_terms(
    logits,
    target,
    mask=None,
    *,
    temperature=None,
    classes=None,
    links=None,
    ignore_index=-100,
    unscaled=True,
):
    r"""What the losses of a language model need of a row of logits, from one read of it."""
    return CrossEntropyTerms(
        *reference.cross_entropy_terms(
            logits,
            target,
            mask,
            temperature=temperature,
            classes=classes,
            links=links,
            ignore_index=ignore_index,
            unscaled=unscaled,
        )
    )
