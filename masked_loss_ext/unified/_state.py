# SPDX-License-Identifier: BSD-3-Clause
"""When a module's own state moves on, where it lives, and how ranks come to the same."""

import warnings
from typing import Any

import torch

from .._checks import check_flags, refusal
from ..ops._autograd import _functorch_is_active
from ._options import LossModule

# private, but what torch.utils.checkpoint itself asks: -1 unless a backward pass is running
_running_backward = torch._C._current_graph_task_id


def is_recomputing():
    """Inside the second forward that activation checkpointing runs during backward."""
    return not torch.compiler.is_compiling() and _running_backward() != -1


def is_transformed():
    """By torch.func, under which nothing may be stored: tensors of a level outlive it."""
    return _functorch_is_active()


def advances(module, update_state):
    """Whether this forward may change buffers: training, wanted, not a recomputation, and not of
    a function that torch.func transforms, which may change nothing."""
    check_flags(module.function, {"update_state": update_state})
    moves = bool(update_state) and module.training
    return moves and not is_recomputing() and not is_transformed()


class SyncsState(LossModule):
    """A module that has state, or contains modules that have."""

    def sync_state(self, group: Any = None) -> None:
        """Make the state equal on all ranks, by one all-reduce of one vector of float64.

        What each number becomes is said where the buffers are described; parameters and the number
        of a pending backward pass are left alone. Every rank of ``group`` (a process group or a 1-D
        DeviceMesh, None: all) has to call it, between two steps. Nothing else exchanges state:
        without it each rank has that of its own batches. Without an initialised process group, and
        of one rank, nothing happens. ``distributed.sync_state(model)`` does it for all losses that
        a model contains; ``distributed.keep_state_local`` says what DDP needs to be told.
        """
        sync(f"{self.function}.sync_state", self, group)


class KeepsState(SyncsState):
    """A module whose own buffers keep their dtype under ``.half()``, ``.to(dtype)`` and the like,
    under any default dtype and that of a checkpoint.

    They are counts and sums over many steps: in half precision 4097 tokens are 4096, and a step of
    the temperature is lost.
    """

    def add_state(self, name, shape=(), value=0.0, *, dtype=torch.float32, persistent=True):
        with torch.inference_mode(False):  # else no later step could change it
            buffer = torch.full(shape, value, dtype=dtype)
        self.register_buffer(name, buffer, persistent=persistent)

    def _shares(self):
        """Tensors whose sums over ranks ``_take`` makes the new state of."""
        raise NotImplementedError

    def _take(self, sums, ranks):
        raise NotImplementedError

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, *args):
        """With ``assign=True`` buffers are those of the checkpoint: of its dtype, and what is in
        no checkpoint stays where a module that was made on meta has it, without data."""
        before = dict(self.named_buffers(recurse=False))
        super()._load_from_state_dict(*args)
        for name, buffer in before.items():
            loaded = getattr(self, name)
            if loaded.dtype != buffer.dtype:
                setattr(self, name, loaded.to(buffer.dtype))
        placed = [b.device for b in self.buffers(recurse=False) if b.device.type != "meta"]
        for name in self._non_persistent_buffers_set if placed else ():
            buffer = getattr(self, name)
            if buffer.device.type == "meta":
                setattr(self, name, torch.zeros_like(buffer, device=placed[0]))


@torch.no_grad()
def sync(function, module, group):
    from ..distributed._group import group_size, process_group  # which imports this

    group = process_group(function, group)
    ranks = group_size(group)
    parts = [part for part in module.modules() if isinstance(part, KeepsState)]
    if ranks < 2 or not parts:
        return
    shares = [[share.double() for share in part._shares()] for part in parts]
    device = shares[0][0].device
    flat = torch.cat([share.reshape(-1).to(device) for found in shares for share in found])
    torch.distributed.all_reduce(flat, group=group)
    for part, found in zip(parts, shares, strict=True):
        sums = []
        for share in found:
            total, flat = flat[: share.numel()], flat[share.numel() :]
            sums.append(total.reshape(share.shape).to(share.device))
        part._take(sums, ranks)


def borrow(module, names, like):
    """The module's own buffers of these names, by name, to compute with beside ``like``.

    They stay where they are. Where that is not the device of ``like`` these are copies, without
    data where ``like`` has none (a dry run on meta or fake tensors). What they become is not
    written into them: ``give_back`` takes it.
    """
    return {name: _beside(module, name, getattr(module, name), like) for name in names}


def give_back(module, state):
    """What borrowed buffers have become, by name; of a dry run nothing is known."""
    if torch.compiler.is_compiling():
        own = _all_is_own()
    else:
        own = not _sent_by_ddp(module)
    if not own:
        rule = "be each rank's own: let DDP wrap "
        rule += "masked_loss_ext.distributed.keep_state_local(model)"
        got = "DistributedDataParallel that replaces it by that of rank 0 in each forward"
        raise refusal(module.function, "state", rule, got, RuntimeError)
    store(module, {name: tensor for name, tensor in state.items() if has_data(tensor)})


def store(module, state):
    """Buffers by name, all in one operation: a KeyboardInterrupt comes between operations, and
    would leave a step that is counted by halves."""
    if state:
        torch._foreach_copy_([getattr(module, name) for name in state], list(state.values()))


def clear(module, names):
    """Zeros, in one operation as well."""
    torch._foreach_zero_([getattr(module, name) for name in names])


def _sent_by_ddp(*parts):
    """Whether DDP, of which this is the forward, sends state of ``parts`` from rank 0 to all."""
    ddp = getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None or not ddp.broadcast_buffers or ddp.process_group.size() < 2:
        return False
    parts = parts or [part for part in ddp.module.modules() if isinstance(part, KeepsState)]
    own = [next(part.buffers(recurse=False)) for part in parts]
    return any(buffer is one for buffer in ddp.modules_buffers for one in own)


def _all_is_own():
    """Asked while tracing, once; a graph that refuses breaks, and is refused without one."""
    return not _sent_by_ddp()


# what torch.compiler.assume_constant_result sets; it would import the compiler, which takes seconds
_all_is_own.__dict__["_dynamo_marked_constant"] = True


def has_data(tensor):
    return tensor.device.type != "meta" and _fake_mode(tensor) is None


def _fake_mode(tensor):
    if torch.compiler.is_compiling():  # all tensors are, and nobody may ask
        return None
    return getattr(tensor, "fake_mode", None)


def _beside(module, name, buffer, like):
    mode = _fake_mode(like)
    if mode is not None and _fake_mode(buffer) is None:
        return mode.from_tensor(buffer)
    if buffer.device == like.device:
        return buffer
    where = f"{module.function}: {name} must be on the device of the inputs ({like.device}), got"
    if buffer.device.type == "meta":
        raise ValueError(f"{where} meta: to_empty() and a checkpoint give it data")
    if torch.compiler.is_compiling():
        raise ValueError(f"{where} {buffer.device}: move the loss with .to() before compiling")
    if like.device.type != "meta":
        warnings.warn(
            f"{module.function}: its state is on {buffer.device} and its inputs on {like.device}, "
            "so that every call waits for both: move the loss with .to()",
            stacklevel=5,
        )
    return buffer.to(like.device)


@torch.library.register_fake("masked_loss_ext::_snapshot")
def _snapshot_fake(tensor):
    return torch.empty_like(tensor)


def snapshot(tensor):
    """A detached copy of what is computed from buffers, for the backward pass to use.

    Not ``clone()``: a compiled graph saves the buffer in its place and copies again in the backward
    pass, when the forward has changed it already, so gradients come from the next step's state.
    """
    return torch.ops.masked_loss_ext._snapshot(tensor.detach())
