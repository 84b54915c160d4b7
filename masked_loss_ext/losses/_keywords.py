# SPDX-License-Identifier: BSD-3-Clause
"""A function's keywords, kept by a module: what comes with each batch stays with the call."""

import inspect
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch

from .._checks import _FLOATING, check_flags, check_length, check_tensor, refusal, shape_text
from ..ops import masked_cross_entropy_checks as checks


class Kept:
    """Those of a function's arguments that a module keeps: all but ``of_a_call``."""

    def __init__(self, function: Callable[..., Any], of_a_call: Collection[str]) -> None:
        every = inspect.signature(function).parameters
        parameters = [p for name, p in every.items() if name not in of_a_call]
        self.signature = inspect.Signature(parameters)
        self.defaults = {p.name: p.default for p in parameters}
        self.flags = [p.name for p in parameters if p.annotation is bool]

    def signs(self, init: Any) -> Any:
        """Gives a constructor of any keywords their signature."""
        self_ = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = [self_, *self.signature.parameters.values()]
        init.__signature__ = inspect.Signature(parameters, return_annotation=None)
        return init


class KeywordsModule(torch.nn.Module):
    """The module of a cross entropy. Class weights become a buffer, a temperature that is a tensor
    one that is not saved; all else an attribute. What can be checked without a batch is."""

    _kept: ClassVar[Kept]

    def __init__(self, keywords: dict[str, Any]) -> None:
        super().__init__()
        name = type(self).__name__
        given = self._kept.defaults | self._kept.signature.bind(**keywords).arguments
        checks.check_every_option(name, given)
        check_flags(name, {flag: given[flag] for flag in self._kept.flags})
        for keyword, value in given.items():
            if keyword in _CHECKS:
                _CHECKS[keyword](name, keyword, value)
            if keyword in _CLASS_WEIGHTS:
                self.register_buffer(keyword, value)
            elif isinstance(value, torch.Tensor):  # the temperature
                self.register_buffer(keyword, value, persistent=False)
            else:
                setattr(self, keyword, value)

    def _with_kept(self, of_a_call: dict[str, Any]) -> dict[str, Any]:
        """The module's keywords, and those of a call, which go first where they are given."""
        kept = {keyword: getattr(self, keyword) for keyword in self._kept.defaults}
        return kept | {k: value for k, value in of_a_call.items() if value is not None}

    def extra_repr(self) -> str:
        """What differs from the defaults."""
        shown = []
        for keyword, default in self._kept.defaults.items():
            value = getattr(self, keyword)
            if isinstance(value, torch.Tensor):
                shown.append(f"{keyword}={shape_text(value)}")
            elif value != default:
                shown.append(f"{keyword}={value!r}")
        return ", ".join(shown)


# --- what check_every_option leaves to the functions ---------------------------------------------


def _check_class_weight(name, keyword, value):
    if value is not None:
        check_tensor(name, keyword, value)
        if value.dim() != 1:
            raise refusal(name, keyword, "have one entry per class [V]", shape_text(value))


def _check_temperature(name, keyword, value):
    if not isinstance(value, torch.Tensor):  # which is not looked at: it may be on a GPU
        checks.check_scale(name, keyword, value)


def _check_chunk_rows(name, keyword, value):
    if value is not None:
        check_length(name, keyword, value, 1)


def _check_logits_dtype(name, keyword, value):
    if value is not None and value not in _FLOATING:
        raise refusal(name, keyword, "be None, torch.float32 or the dtype of the logits", value)


_CLASS_WEIGHTS = ("weight", "class_weight")
_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    **dict.fromkeys(_CLASS_WEIGHTS, _check_class_weight),
    "softcap": lambda name, _, value: checks.softcap_number(name, value),
    "class_dim": checks.check_int64,
    "temperature": _check_temperature,
    "chunk_rows": _check_chunk_rows,
    "logits_dtype": _check_logits_dtype,
}
