# SPDX-License-Identifier: BSD-3-Clause
"""Call number n of an operator, always the same for one seed, and what becomes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.common.operator_calls import ops

from .fence import between_closed_pages
from .good import Draw, Given, good_call
from .wrong import OBJECTS, wrong

MOST_WRONG = 4
SHARE_BETWEEN_CLOSED_PAGES = 0.5
SHARE_WITH_GRADIENT = 0.2
REFUSED, ACCEPTED, UNEXPLAINED = "refused", "accepted", "unexplained"
# PyTorch's, with ours among them; what else comes is a mistake, as is a text of the C++ library's.
REFUSALS = (ValueError, TypeError, IndexError, RuntimeError, OverflowError)
LEAKED = ("std::", "vector::", "basic_string", "bad_alloc", "torch/csrc/stable")


class Call(NamedTuple):
    operator: str
    positional: tuple[Any, ...]
    keywords: Given
    wrong: tuple[str, ...]


def malformed(operator: str, seed: int, number: int) -> Call:
    draw = Draw(f"{seed}:{operator}:{number}")
    given = good_call(operator, draw)
    schema = getattr(ops, operator).default._schema.arguments
    chosen = draw.sample(list(schema), min(len(schema), draw.randint(1, MOST_WRONG)))
    for argument in chosen:
        if draw.random() < 0.02:
            given.pop(argument.name, None)
        else:
            given[argument.name] = wrong(draw, str(argument.type), given.get(argument.name))
    names = [argument.name for argument in chosen]
    positional: tuple[Any, ...] = ()
    if not names or draw.random() < 0.01:  # of what takes nothing, too
        positional = (draw.choice(OBJECTS),)
        names.append("one by position")
    if draw.random() < SHARE_BETWEEN_CLOSED_PAGES:
        at_end = draw.random() < 0.7
        given = {name: fenced(x, at_end) for name, x in given.items()}
    if draw.random() < SHARE_WITH_GRADIENT:
        given = {name: with_gradient(x) for name, x in given.items()}
    return Call(operator, positional, given, tuple(names))


def is_plain(x: Any) -> bool:
    """Memory of its own that can be looked at as bytes."""
    if type(x) is not torch.Tensor or x.layout != torch.strided or x.device.type != "cpu":
        return False
    return x.numel() > 0 and not (x.is_quantized or x.is_neg() or x.is_conj() or x._is_zerotensor())


def fenced(x: Any, at_end: bool) -> Any:
    if not is_plain(x) or x.is_nested or x.requires_grad:
        return x
    try:
        return between_closed_pages(x, at_end)
    except (RuntimeError, NotImplementedError):  # of a dtype that no bytes can be looked at as
        return x


def with_gradient(x: Any) -> Any:
    return x.requires_grad_() if is_plain(x) and x.is_floating_point() else x


def outcome(call: Call) -> tuple[str, str]:
    """What it came to, and the text of the error."""
    try:
        results = getattr(ops, call.operator)(*call.positional, **call.keywords)
        results = results if isinstance(results, (tuple, list)) else (results,)
        losses = [x.sum() for x in results if isinstance(x, torch.Tensor) and x.requires_grad]
        if losses:
            torch.stack(losses).sum().backward()
    except REFUSALS as error:
        text = str(error)
        explained = bool(text.strip()) and not any(part in text for part in LEAKED)
        return (REFUSED if explained else UNEXPLAINED), f"{type(error).__name__}: {text}"
    except BaseException as error:
        return UNEXPLAINED, f"{type(error).__name__}: {error}"
    return ACCEPTED, ""


def described(call: Call) -> str:
    lines = [f"torch.ops.masked_loss_ext.{call.operator}, wrong: {', '.join(call.wrong)}"]
    lines += [f"    {x!r:.200}" for x in call.positional]
    lines += [f"    {name} = {shown(x)}" for name, x in call.keywords.items()]
    return "\n".join(lines)


def shown(x: Any) -> str:
    if not isinstance(x, torch.Tensor):
        return f"{x!r:.200}"
    text = f"{type(x).__name__} {x.dtype} {x.layout} {x.device}"
    if x.is_nested or x.layout != torch.strided:
        return text
    text += f" {list(x.shape)} strides {list(x.stride())}"
    try:
        return text + f" = {x.tolist()}" if is_plain(x) and x.numel() < 20 else text
    except RuntimeError:  # of a dtype that nobody reads
        return text
