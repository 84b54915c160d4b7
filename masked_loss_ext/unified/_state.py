# SPDX-License-Identifier: BSD-3-Clause
"""When a module's own state moves on, and where it lives."""

import torch

from ..ops.masked_squared_error import _functorch_is_active

# private, but what torch.utils.checkpoint itself asks: -1 unless a backward pass is running
_running_backward = torch._C._current_graph_task_id


def is_recomputing():
    """Inside the second forward that activation checkpointing runs during backward."""
    return not torch.compiler.is_compiling() and _running_backward() != -1


def advances(module, update_state):
    """Whether this forward may change buffers: training, wanted, not a recomputation, and not of
    a function that torch.func transforms, which may change nothing."""
    moves = bool(update_state) and module.training
    return moves and not is_recomputing() and not _functorch_is_active()


class KeepsState(torch.nn.Module):
    """A module whose own buffers keep their dtype under ``.half()``, ``.to(dtype)`` and the like.

    They are counts and sums over many steps: in half precision 4097 tokens are 4096, and a step of
    the temperature is lost.
    """

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self


def follow_device(module, like):
    """Move the module's own buffers to the device of ``like``, once: a loss is easily forgotten
    when the model is moved."""
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.device == like.device:
            continue
        if torch.compiler.is_compiling():
            raise ValueError(
                f"{type(module).__name__}: {name} must be on the device of the logits "
                f"({like.device}), got {buffer.device}: move the loss with .to() before compiling"
            )
        setattr(module, name, buffer.to(like.device))


@torch.library.register_fake("masked_loss_ext::_snapshot")
def _snapshot_fake(tensor):
    return torch.empty_like(tensor)


def snapshot(tensor):
    """A detached copy of what is computed from buffers, for the backward pass to use.

    Not ``clone()``: a compiled graph saves the buffer in its place and copies again in the backward
    pass, when the forward has changed it already, so gradients come from the next step's state.
    """
    return torch.ops.masked_loss_ext._snapshot(tensor.detach())
