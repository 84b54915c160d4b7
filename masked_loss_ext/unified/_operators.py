# SPDX-License-Identifier: BSD-3-Clause
"""The operators, whose errors speak of the arguments of the module that calls them."""

from ..ops.cross_entropy_terms import cross_entropy_terms
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._arguments import check_tokens


def cross_entropy(name, arguments, logits, targets, attention_mask=None, **options):
    """``masked_cross_entropy`` for the module ``name``, which calls logits and targets by the names
    in ``arguments``."""
    try:
        return masked_cross_entropy(logits, targets, attention_mask, **options)
    except Exception as error:
        check_tokens(name, arguments, logits, targets, attention_mask)
        if not isinstance(error, (ValueError, TypeError, IndexError)):
            raise
        raise _renamed(error, "masked_cross_entropy", name, arguments[1]) from None


def terms(name, argument, logits, targets, valid, **options):
    """``cross_entropy_terms`` for the module ``name``, whose targets are called ``argument``."""
    try:
        return cross_entropy_terms(logits, targets, valid, **options)
    except (ValueError, TypeError, IndexError) as error:
        raise _renamed(error, "cross_entropy_terms", name, argument) from None


def _renamed(error, operator, name, argument):
    text = str(error).replace(f"{operator}: target ", f"{name}: {argument} ")
    text = text.replace(f"{operator}: mask ", f"{name}: attention_mask ")
    return type(error)(text.replace(f"{operator}: ", f"{name}: "))
