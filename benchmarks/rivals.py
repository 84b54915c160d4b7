# SPDX-License-Identifier: BSD-3-Clause
"""Kernels of others, where they are installed; those of a cross entropy of logits: liger-kernel,
quack-kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

from .cross_entropy_problems import restore_from
from .harness import Contender

# Their loss or its gradient may be in bf16 throughout: asked is only that they compute the same.
SLACK = 2.0**-5


@dataclass(frozen=True)
class Library:
    """What has to be installed, what makes the function of it, and where that runs."""

    modules: Sequence[str]
    load: Callable[[], Callable] | None
    package: str = ""  # by which it is installed
    on_gpus_alone: bool = False


def liger() -> Callable[[Tensor, Tensor], Tensor]:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()


def quack() -> Callable[[Tensor, Tensor], Tensor]:
    from quack.cross_entropy import cross_entropy

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        counted = (target != -100).sum()
        return cross_entropy(logits, target, reduction="sum") / counted

    return mean


LIBRARIES = {
    "liger": Library(("liger_kernel",), liger, "liger-kernel", on_gpus_alone=True),
    "quack": Library(("quack",), quack, "quack-kernels", on_gpus_alone=True),
}
NAMES = tuple(LIBRARIES)


def loaded(library: Library, device: str | torch.device) -> tuple[Callable | None, str]:
    """Its function, or why it cannot be had: not all modules are installed, it runs on another
    device, or it fails."""
    for module in library.modules:
        if find_spec(module) is None:
            return None, f"{module} is not installed"
    if library.on_gpus_alone and torch.device(device).type != "cuda":
        return None, "its kernels run on a GPU alone"
    try:
        return library.load(), ""
    except Exception as error:  # of whatever its import does
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def version_of(library: Library) -> str:
    return f"{library.package} {version(library.package)}" if library.package else ""


def contenders(logits: Tensor, target: Tensor, libraries=None) -> list[Contender]:
    """One for each library; what is not installed, or cannot be imported, is not attempted.

    Each has logits of its own, put back before every call: Liger writes the gradient over them.
    """
    found = []
    for name, library in (LIBRARIES if libraries is None else libraries).items():
        call, skip = loaded(library, logits.device)
        more = {"skip": skip, "slack": SLACK, "version": "" if skip else version_of(library)}
        inputs = []
        if call is not None:
            scratch = logits.detach().clone().requires_grad_(logits.requires_grad)
            inputs = [(scratch, target)]
        restore = restore_from(logits.detach())
        found.append(Contender(name, call, inputs, prepare=restore, **more))
    return found
