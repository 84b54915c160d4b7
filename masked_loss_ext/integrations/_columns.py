# SPDX-License-Identifier: BSD-3-Clause
"""Columns of the batch for the loss, which a Trainer shows nothing but labels."""

import functools
import inspect
from typing import Any

from .._checks import refusal

_NAME = "pass_columns"
_OWN = ("outputs", "labels", "num_items_in_batch")  # what the Trainer passes itself


def pass_columns(trainer: Any, *columns: str, **renamed: str) -> Any:
    """Have ``trainer`` give columns of the batch to its compute_loss_func, as keywords.

    A compute_loss_func gets the model's outputs, the labels and their count. What else the loss
    takes per token stands in the batch beside them and is named here:

    - ``pass_columns(trainer, "token_weight")``: a weight per label, ``[B, S]`` floating, padded by
      the collator (with anything, where the label is -100). It is no part of the denominator: the
      loss is the sum of weight times loss over the number of tokens of the whole window.
    - ``pass_columns(trainer, "shift_labels")``: labels shifted already. "labels" must stay in the
      batch, or the Trainer does not count; it counts shift_labels where they are.
    - ``pass_columns(trainer, segment_ids="seq_idx")``: by another name, keyword=column.

    A column that the model's forward has a parameter for is given to both, any other to the loss
    alone. In training, evaluation and ``TokenLossCallback``, before or after its ``attach``.

    Columns of a dataset must get as far as the collator: ``remove_unused_columns=False``.

    Args:
        trainer: a Trainer that has a compute_loss_func which takes such keywords.
        columns: names that are both column and keyword.
        renamed: keyword=column.

    Returns:
        the trainer.

    Raises:
        ValueError: a forward of ``(*args, **kwargs)`` alone; at the first batch that lacks a
            column, naming those that it has.
    """
    check_trainer(_NAME, trainer)
    names = _names(trainer, columns, renamed)
    parameters = _parameters(trainer)
    compute_loss = trainer.compute_loss

    @functools.wraps(compute_loss)
    def compute_loss_with_columns(model, inputs, *args, **kwargs):
        values = {keyword: _take(inputs, name, parameters) for keyword, name in names.items()}
        loss_func = trainer.compute_loss_func
        trainer.compute_loss_func = functools.partial(loss_func, **values)
        try:
            return compute_loss(model, inputs, *args, **kwargs)
        finally:
            trainer.compute_loss_func = loss_func

    trainer.passed_columns = {*_passed(trainer), *names}
    trainer.compute_loss = compute_loss_with_columns
    return trainer


def check_trainer(function, trainer):
    """A Trainer, or what looks like one, that has a compute_loss_func."""
    needs = ("compute_loss", "compute_loss_func", "callback_handler")
    if not all(hasattr(trainer, name) for name in needs):
        got = type(trainer).__name__
        raise refusal(function, "trainer", "be a transformers Trainer", got, TypeError)
    if trainer.compute_loss_func is None:
        raise ValueError(
            f"{function}: the trainer must have a compute_loss_func, for one "
            "Trainer(..., compute_loss_func=causal_lm_loss)"
        )


def _passed(trainer):
    return getattr(trainer, "passed_columns", ())


def _names(trainer, columns, renamed):
    """keyword -> column."""
    names = {}
    for keyword, column in [*((name, name) for name in columns), *renamed.items()]:
        if not isinstance(column, str):
            raise refusal(_NAME, "columns", "be strings", type(column).__name__, TypeError)
        if keyword in _OWN:
            raise refusal(_NAME, "columns", f"be others than {', '.join(_OWN)}", keyword)
        if keyword in names or keyword in _passed(trainer):
            raise refusal(_NAME, "columns", "be passed once", f"{keyword} twice")
        names[keyword] = column
    if not names:
        raise refusal(_NAME, "columns", "name at least one", "none")
    return names


def _parameters(trainer):
    """Names that the forward of the trainer's own model has, below all that is around it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    model = getattr(model, "get_base_model", lambda: model)()  # of PEFT
    found = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if not names:
        got = "(*args, **kwargs): nothing says whether it needs a column itself"
        forward = f"the forward of {type(model).__name__}"
        raise refusal(_NAME, forward, "name its parameters", got)
    return names


def _take(inputs, name, parameters):
    if name not in inputs:
        got = (
            f"{list(inputs)}; a column of the dataset reaches the collator with "
            "TrainingArguments(remove_unused_columns=False)"
        )
        raise refusal(_NAME, "the batch", f"have {name}", got)
    return inputs[name] if name in parameters else inputs.pop(name)
