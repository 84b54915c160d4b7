# SPDX-License-Identifier: BSD-3-Clause
"""State of the losses that a model contains: each rank's own, or one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch.nn.parallel import DistributedDataParallel

from .._checks import refusal
from ..unified._state import KeepsState, sync

Model = TypeVar("Model", bound=torch.nn.Module)
_IGNORED = "_ddp_params_and_buffers_to_ignore"  # the only place where DDP looks for names


def sync_state(module: torch.nn.Module, group: Any = None) -> None:
    """Make the state of all losses in ``module`` equal on all ranks: one all-reduce for all.

    ``UnifiedLoss.sync_state`` of whatever contains losses that have state: a model, or DDP or FSDP
    around it. Temperatures and remembered losses become the mean over ranks, averages those over
    all, experts' counts those of an average rank, as is said at ``TemperatureScaledCrossEntropy``,
    ``AdaptiveMTPLoss`` and ``AuxiliaryFreeMoEBalancer``. Every rank calls it, between two steps,
    with the same module: before a checkpoint, or after each step if ranks shall go on from one
    state. Equivalent, for a module that is such a loss::

        module.sync_state(group)

    >>> model = torch.nn.ModuleList([UnifiedLoss(vocab_size=7)])
    >>> sync_state(model)  # of one rank nothing happens

    Args:
        module: any module; one without such state sends nothing.
        group: a process group or a 1-D DeviceMesh; None: all ranks.

    Raises:
        ValueError: a group that the caller is not in.
    """
    _check_module("sync_state", module)
    sync("sync_state", module, group)


def keep_state_local(module: Model) -> Model:
    """Tell DDP to leave the state of the losses in ``module`` alone; call it before DDP does.

    With broadcast_buffers (the default) DDP sends rank 0's buffers to all ranks before each
    forward. State that counts what a rank has seen would be replaced by rank 0's, time and again:
    after k steps each rank would have the first k - 1 of rank 0 and its own last one, so that
    ``sync_state`` averaged little but rank 0's batches. Losses refuse to train that way. Other
    buffers, those of a BatchNorm say, are sent as before. FSDP sends none. A loss that is called
    beside the wrapped model, not in its forward, needs nothing of this::

        ddp = DistributedDataParallel(keep_state_local(model))

    >>> model = torch.nn.ModuleList([UnifiedLoss(vocab_size=7)])
    >>> assert keep_state_local(model) is model

    A compiled model is refused where it is traced, which has to be in DDP's forward.

    Args:
        module: what will be given to DistributedDataParallel, and not another that contains it:
            DDP goes by names.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: what is no module, or is wrapped already.
    """
    name = "keep_state_local"
    _check_module(name, module)
    if isinstance(module, DistributedDataParallel):
        got = "DistributedDataParallel, which has taken its list of buffers"
        raise refusal(name, "module", "be what DDP is going to wrap", got, TypeError)
    ignored = set(getattr(module, _IGNORED, ()))
    for path, part in module.named_modules():
        if isinstance(part, KeepsState):
            ignored.update(f"{path}.{buffer}".lstrip(".") for buffer in part._buffers)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))
    return module


def _check_module(name, module):
    if not isinstance(module, torch.nn.Module):
        got = type(module).__name__
        raise refusal(name, "module", "be a torch.nn.Module", got, TypeError)
