# SPDX-License-Identifier: BSD-3-Clause
"""The arguments of constructors: a module declares them as the fields of a dataclass, each with the
rule that it is checked by in its annotation.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Union, get_args, get_origin

import torch
from torch import Tensor

from .._checks import check_choice, check_flags, check_int, check_number, refusal, shape_text

LARGEST_SIZE = 2**31 - 1  # of a vocabulary, a sequence, a window


def check_size(
    function: str, argument: str, value: Any, least: int = 1, most: int = LARGEST_SIZE
) -> None:
    """An int of this range: how many of something there are."""
    if isinstance(value, (bool, Tensor)):  # the latter may be on a device
        raise TypeError(f"{function}: {argument} must be an int, got {type(value).__name__}")
    check_int(function, argument, value)
    if value < least:
        raise ValueError(f"{function}: {argument} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{function}: {argument} must be at most {most}, got {value}")


def check_flag(function: str, argument: str, value: Any) -> None:
    check_flags(function, {argument: value})


class Rule:
    """A check with its arguments, which a signature shows as a few words."""

    def __init__(self, text: str, check: Callable[..., None], **options: Any) -> None:
        self.text, self.check = text, partial(check, **options)

    def __repr__(self) -> str:
        return self.text


def one_of(*choices: str, label: str = "") -> Rule:
    return Rule(" or ".join(choices), check_choice, choices=choices, label=label)


Size = Annotated[int, Rule("at least 1", check_size)]
Length = Annotated[int, Rule("at least 0", check_size, least=0)]
Token = Annotated[int, Rule("any", check_size, least=-(2**63), most=2**63 - 1)]
Number = Annotated[float, Rule("finite", check_number)]
Positive = Annotated[float, Rule("above 0", check_number, above=0)]
NotNegative = Annotated[float, Rule("at least 0", check_number, least=0)]
Share = Annotated[float, Rule("0 to 1", check_number, least=0, most=1)]
Flag = Annotated[bool, Rule("on or off", check_flag)]
PenaltyOn = Annotated[str, one_of("targets", "model")]


class LossModule(torch.nn.Module):
    """A module whose arguments are the fields of a dataclass, checked and kept by their names."""

    owner = ""  # the module in whose name the errors of a part speak: see ``part_of``

    def __post_init__(self) -> None:
        super().__init__()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = get_args(field.type) if get_origin(field.type) is Union else (field.type,)
            if value is None and type(None) in kinds:
                continue
            for rule in (r for kind in kinds for r in getattr(kind, "__metadata__", ())):
                rule.check(self.function, field.name, value)

    @property
    def function(self) -> str:
        """What errors begin with."""
        return self.owner or type(self).__name__

    def extra_repr(self) -> str:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return ", ".join(
            f"{name}={shape_text(value) if isinstance(value, Tensor) else repr(value)}"
            for name, value in values.items()
        )


def part_of(owner: str, cls: Any, *args: Any, **options: Any) -> Any:
    """A module ``cls`` that is part of ``owner``, which takes arguments by the same names."""
    part = cls.__new__(cls)
    object.__setattr__(part, "owner", owner)
    part.__init__(*args, **options)
    return part


def check_class(function: str, argument: str, token_id: int | None, vocab_size: int | None) -> None:
    """A token of which the model gives a probability; None passes."""
    if token_id is not None and vocab_size is not None and not 0 <= token_id < vocab_size:
        got = f"{token_id}: there is no such class"
        raise refusal(function, argument, f"be in [0, {vocab_size})", got)


def check_smoothing(function: str, argument: str, smoothing: float, classes: int) -> None:
    """Up to an even distribution."""
    most = 1 - 1 / classes if classes > 1 else 1
    check_number(function, argument, smoothing, least=0, most=most)
