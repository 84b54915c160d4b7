# SPDX-License-Identifier: BSD-3-Clause
"""Cross entropy kernels of others, where they are installed: liger-kernel, quack-kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from torch import Tensor

from .cross_entropy_problems import restore_from
from .harness import Contender

# Their loss or its gradient may be in bf16 throughout: asked is only that they compute the same.
SLACK = 2.0**-5


def liger() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def quack() -> Callable[[Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        counted = (target != -100).sum()
        return cross_entropy(logits, target, reduction="sum") / counted

    return mean


LIBRARIES = {"liger": (("liger_kernel",), liger), "quack": (("quack",), quack)}
NAMES = tuple(LIBRARIES)


def loaded(modules: Sequence[str], load: Callable[[], Callable]) -> tuple[Callable | None, str]:
    """What ``load`` makes, or why it cannot be had: not all ``modules`` are installed, or it
    fails."""
    for module in modules:
        if find_spec(module) is None:
            return None, f"{module} is not installed"
    try:
        return load(), ""
    except Exception as error:  # of whatever its import does
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def contenders(logits: Tensor, target: Tensor, libraries=None) -> list[Contender]:
    """One for each library; what is not installed, or cannot be imported, is not attempted.

    Each has logits of its own, put back before every call: Liger writes the gradient over them.
    """
    found = []
    for name, needs in (LIBRARIES if libraries is None else libraries).items():
        call, skip = loaded(*needs)
        inputs = []
        if call is not None:
            scratch = logits.detach().clone().requires_grad_(logits.requires_grad)
            inputs = [(scratch, target)]
        restore = restore_from(logits.detach())
        found.append(Contender(name, call, inputs, prepare=restore, skip=skip, slack=SLACK))
    return found
