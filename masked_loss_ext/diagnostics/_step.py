# SPDX-License-Identifier: BSD-3-Clause
"""Runs a step on a copy of the batch and puts back everything that it may have left behind."""

import functools
import inspect
import numbers
import random
import sys
from typing import NamedTuple

import torch

from .._checks import refusal
from ._batch import map_tensors

NAME = "check_padding"
MOST_ITEMS = 100  # of a container that is looked through for modules: longer ones are data


class Outcome(NamedTuple):
    loss: torch.Tensor  # 0-d, detached
    gradients: dict  # name -> tensor or None
    differentiated: bool  # False: the step gave no way to its gradients
    drew_random_numbers: bool


class Runner:
    """``step`` as a function of the batch's content alone.

    Each run begins with the same random state, the same parameters and buffers and no gradients,
    and gets tensors of its own; ``restore`` puts back what was there before the first.
    """

    def __init__(self, step, batch, parameters):
        self.step, self.batch = step, batch
        modules = _modules_of(step)
        if isinstance(parameters, torch.nn.Module):
            modules.append(parameters)
        self.parameters = name_parameters(parameters, modules)
        self.updates_parameters = False
        self.leaves = set()  # names of the batch's entries to differentiate by
        known = list(self.parameters.values())
        for module in modules:
            known += [*module.parameters(), *module.buffers()]
        known = {id(tensor): tensor for tensor in known}.values()
        self._values = [(tensor, tensor.detach().clone()) for tensor in known]
        self._gradients = [(tensor, tensor.grad) for tensor in known if tensor.is_leaf]
        self._random = [(get, put, get()) for get, put in _random_states()]

    def __call__(self, tensors):
        """``tensors``: name -> what replaces the batch's entry of that name."""
        self.restore(gradients=False)
        fed = {}

        def feed(name, tensor):
            fed[name] = tensors.get(name, tensor).detach().clone()
            return fed[name].requires_grad_(name in self.leaves)

        batch = map_tensors(feed, self.batch)
        wanted = {name: fed[name] for name in fed if name in self.leaves}
        wanted |= {f"parameter {name}": tensor for name, tensor in self.parameters.items()}
        with torch.enable_grad():
            loss = _as_loss(self.step(batch))
            gradients = _gradients(loss, wanted)
        return Outcome(
            loss=loss.detach().clone(),
            gradients={name: _dense(g) for name, g in (gradients or {}).items()},
            differentiated=gradients is not None,
            drew_random_numbers=not all(_equal(get(), state) for get, _, state in self._random),
        )

    def restore(self, gradients=True):
        """All that was there before the first run; ``gradients`` False: none instead."""
        for tensor, value in self._values:
            # Not without need: it would spoil a graph of the caller's that has saved the tensor.
            if not torch.equal(tensor, value):
                self.updates_parameters |= tensor.requires_grad
                with torch.no_grad():
                    tensor.copy_(value)
        for tensor, gradient in self._gradients:
            tensor.grad = gradient if gradients else None
        for _, put, state in self._random:
            put(state)


def _random_states():
    """(function that gets it, function that sets it) of each random state there is."""
    yield torch.get_rng_state, torch.set_rng_state
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all
    yield random.getstate, random.setstate
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"].random
        yield numpy.get_state, numpy.set_state


def _equal(a, b):
    if isinstance(a, (list, tuple)):
        return all(map(_equal, a, b))
    equal = a == b  # of tensors and arrays, one answer per entry
    return bool(equal.all() if hasattr(equal, "all") else equal)


def _as_loss(loss):
    if isinstance(loss, numbers.Real):
        loss = torch.tensor(float(loss), dtype=torch.float64)
    if not isinstance(loss, torch.Tensor):
        got = f"{type(loss).__name__}; lambda batch: step(batch)[0] takes the first of several"
        raise refusal(NAME, "step", "return a scalar loss", got, TypeError)
    if loss.numel() != 1 or loss.is_complex():
        raise refusal(NAME, "step", "return a scalar loss", f"{list(loss.shape)} {loss.dtype}")
    return (loss if loss.is_floating_point() else loss.double()).reshape(())


def _gradients(loss, wanted):
    """name -> gradient, from the step's own backward where it has made one; None without a way."""
    found = {name: t.grad for name, t in wanted.items() if t.is_leaf and t.grad is not None}
    if found:
        return {name: found.get(name) for name in wanted}
    if not loss.requires_grad or not wanted:
        return None
    try:
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    except RuntimeError as error:
        if "second time" in str(error):  # the step's backward came first and its results are gone
            return None
        raise
    return dict(zip(wanted, gradients, strict=True))


def _dense(gradient):
    if gradient is None:
        return None
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()


def name_parameters(parameters, modules):
    """name -> tensor that requires grad, of a module, tensors, or pairs of name and tensor."""
    if isinstance(parameters, torch.nn.Module):
        parameters = parameters.named_parameters()
    if isinstance(parameters, (torch.Tensor, str)) or not hasattr(parameters, "__iter__"):
        rule = "be a module or an iterable of tensors or of (name, tensor) pairs"
        raise refusal(NAME, "parameters", rule, type(parameters).__name__, TypeError)
    if hasattr(parameters, "items"):
        parameters = parameters.items()
    names = {id(p): name for module in modules for name, p in module.named_parameters()}
    result = {}
    for i, item in enumerate(parameters):
        pair = isinstance(item, tuple) and len(item) == 2
        name, tensor = item if pair else (names.get(id(item), str(i)), item)
        if not isinstance(tensor, torch.Tensor):
            rule = "be a tensor or a (name, tensor) pair"
            raise refusal(NAME, f"parameters[{i}]", rule, type(tensor).__name__, TypeError)
        if tensor.requires_grad:
            result[str(name) if name not in result else f"{name} ({i})"] = tensor
    return result


def _modules_of(step):
    """Modules that the step can be seen to use: itself, its closure, globals, object, arguments.

    Only to put their buffers (running statistics) and gradients back; missing one is no error.
    """
    seen, found, todo = set(), [], [(step, 0)]
    while todo:
        value, depth = todo.pop()
        if id(value) in seen or depth > 3:
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            found.append(value)
        else:
            todo += [(v, depth + 1) for v in _reachable(value)]
    return found


def _reachable(value):
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if inspect.ismethod(value):
        return [value.__self__]
    if inspect.isfunction(value):
        original = getattr(value, "_torchdynamo_orig_callable", None)
        try:
            names = inspect.getclosurevars(inspect.unwrap(value))
        except ValueError:  # a cell that is still empty
            return [original]
        return [original, *names.nonlocals.values(), *names.globals.values()]
    if inspect.ismodule(value) or inspect.isclass(value) or isinstance(value, torch.Tensor):
        return []
    if isinstance(value, dict):
        return list(value.values()) if len(value) <= MOST_ITEMS else []
    if isinstance(value, (list, tuple)):
        return value if len(value) <= MOST_ITEMS else []
    return list(getattr(value, "__dict__", {}).values())
