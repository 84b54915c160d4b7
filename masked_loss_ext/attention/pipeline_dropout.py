# SPDX-License-Identifier: BSD-3-Clause
"""Nested dropout in a pipeline of modules that hand a dict on: how many registers a sample keeps.

keep_k is a list with one int per sample, or a 1-D integer tensor that may stay on its device.
"""

import torch

from .._checks import ArgumentError, check_choice, check_tensor, shape_text
from . import _host
from ._entries import check_dict, read_entry
from ._host import is_readable

MODES = ("uniform", "pow2", "uniform_pow2")


def check_keep_k(function, keep_k, samples, name="keep_k"):
    """keep_k of any accepted kind as a list of ints or a 1-D tensor; None stays None."""
    if keep_k is None:
        return None
    if isinstance(keep_k, (list, tuple)) and any(isinstance(k, torch.Tensor) for k in keep_k):
        keep_k = torch.stack([torch.as_tensor(k).reshape(()) for k in keep_k])
    if isinstance(keep_k, torch.Tensor):
        return _check_keep_k_tensor(function, keep_k, samples, name)
    if hasattr(keep_k, "tolist") and not _host.is_number(keep_k):
        keep_k = keep_k.tolist()
    elif not hasattr(keep_k, "__iter__") or isinstance(keep_k, str):
        keep_k = [keep_k] * samples
    keep_k = list(keep_k)
    if not all(_host.is_number(k) and not isinstance(k, bool) for k in keep_k):
        raise TypeError(
            f"{function}: {name} must be an int, a list of ints or an integer tensor, got "
            f"{keep_k!r}"
        )
    _check_count(function, len(keep_k), samples, name)
    if any(k < 0 for k in keep_k):
        raise ValueError(f"{function}: {name} must not be negative, got {keep_k}")
    return [_host.reach(function, name, k) for k in keep_k]


def _check_keep_k_tensor(function, keep_k, samples, name):
    if keep_k.is_floating_point() or keep_k.is_complex() or keep_k.dtype == torch.bool:
        raise ValueError(f"{function}: {name} must be integers, got {keep_k.dtype}")
    if keep_k.dim() > 1:
        raise ValueError(
            f"{function}: {name} must have one entry per sample, got {shape_text(keep_k)}"
        )
    if keep_k.dim() == 0:
        keep_k = keep_k.expand(samples)
    _check_count(function, keep_k.numel(), samples, name)
    # Looking at the data of a GPU would wait for it; negative counts are clamped to 0 there.
    if is_readable(keep_k) and keep_k.numel() and keep_k.min() < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {keep_k.tolist()}")
    return keep_k


def _check_count(function, count, samples, name):
    if count > samples:
        raise ValueError(
            f"{function}: {name} must have at most one entry per sample, {samples}, got {count}"
        )


def check_samples(function, name, tensors):
    """A list of [1, ..., D] tensors, one per sample."""
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(
            f"{function}: {name} must be a list of tensors, one per sample, got "
            f"{type(tensors).__name__}"
        )
    for i, tensor in enumerate(tensors):
        check_tensor(function, f"{name}[{i}]", tensor)
        if tensor.dim() < 3 or tensor.shape[0] != 1:
            raise ArgumentError(
                f"{function}: {name}[{i}] must be [1, ..., D] with a batch dimension of 1, got "
                f"{shape_text(tensor)}"
            )


def _draw_below(n, generator):
    """One int, uniform on 0 ... n - 1."""
    if generator is None:
        return int(torch.randint(n, (), device="cpu"))  # whatever the default device
    if isinstance(generator, torch.Generator):
        return int(torch.randint(n, (), generator=generator, device=generator.device))
    if isinstance(generator, str):  # "numpy": its global state, which older training runs seed
        from numpy import random as generator
    draw = getattr(generator, "integers", None) or generator.randint
    return int(draw(n))


def _draw_keep_k(n, mode, generator):
    """One draw for a sample with n registers; a Python int."""
    if n == 0:
        return 0
    if mode == "pow2":
        if n & (n - 1):
            raise ArgumentError(
                f"size_sampling_mode 'pow2': the number of tokens must be a power of two, got {n}"
            )
        return 1 << _draw_below(n.bit_length(), generator)
    k = 1 + _draw_below(n, generator)
    if mode == "uniform_pow2":
        k = min(1 << (k - 1).bit_length(), n)
    return k


class _NestedDropout(torch.nn.Module):
    """What both modules share: keys, draws, and keep_k given for evaluation."""

    def _configure(self, read_key, eval_key, train_key, mode, generator):
        name = type(self).__name__
        check_choice(name, "size_sampling_mode", mode, MODES)
        kinds = generator is None or isinstance(generator, torch.Generator) or generator == "numpy"
        if not kinds and not hasattr(generator, "integers") and not hasattr(generator, "randint"):
            raise TypeError(
                f"{name}: generator must be a torch.Generator, a numpy generator or 'numpy', got "
                f"{generator!r}"
            )
        self.read_key = self.read_write_key = read_key
        self.eval_keep_k_read_key = eval_key
        self.train_keep_k_write_key = train_key
        self.size_sampling_mode = mode
        self.generator = generator

    def sample_keep_k(self, n):
        """How many of ``n`` registers one sample keeps: an int in 1 ... n (0 of 0)."""
        n = _host.length(f"{type(self).__name__}.sample_keep_k", "n", n)
        return _draw_keep_k(n, self.size_sampling_mode, self.generator)

    def _keep_k(self, data_dict):
        """Drawn in training, read in evaluation; None where evaluation drops nothing."""
        name = type(self).__name__
        check_dict(name, data_dict)
        if self.training:
            registers = read_entry(name, "read_key", data_dict, self.read_key)
            check_samples(name, self.read_key, registers)
            keep_k = [self.sample_keep_k(tokens.shape[1]) for tokens in registers]
            if self.train_keep_k_write_key is not None:
                data_dict[self.train_keep_k_write_key] = keep_k
            return keep_k
        key = self.eval_keep_k_read_key
        if key is None or data_dict.get(key) is None:
            return None
        registers = read_entry(name, "read_key", data_dict, self.read_key)
        check_samples(name, self.read_key, registers)
        return check_keep_k(name, data_dict[key], len(registers), key)

    def extra_repr(self):
        return f"{self.read_key!r}, size_sampling_mode={self.size_sampling_mode!r}"


class AttentionMaskedNestedDropout(_NestedDropout):
    r"""Draws how many registers each sample keeps, and leaves the tokens alone.

    ``NestedDropoutSequencePacker`` makes the attention mask of it: registers from keep_k on
    neither attend nor are attended to. No parameters.

    >>> dropout = AttentionMaskedNestedDropout("registers", size_sampling_mode="uniform_pow2")
    >>> data_dict = dropout({"registers": [torch.randn(1, 256, 8), torch.randn(1, 100, 8)]})
    >>> first, second = data_dict["nested_dropout_keep_k"]
    >>> assert first in (1, 2, 4, 8, 16, 32, 64, 128, 256) and 1 <= second <= 100
    >>> _ = dropout.eval()(data_dict | {"eval_keep_k": [16, 4]})

    With N registers keep_k is drawn once per sample: "uniform" on 1 ... N, so that register j
    survives with probability (N - j) / N; "pow2" uniform on 1, 2, 4 ... N, for N a power of two;
    "uniform_pow2" uniform on 1 ... N and rounded up to a power of two, at most N. 0 is never drawn.

    In evaluation keep_k is what stands under ``eval_keep_k_read_key``: an int for all samples, a
    list or a 1-D tensor with one entry per sample. Where that key is None or missing, nothing is
    dropped, and a keep_k that training left in a dict used again is removed.

    Args:
        read_key: a list of register tokens ``[1, n_i, D]``, one tensor per sample.
        keep_k_write_key: where keep_k is written.
        eval_keep_k_read_key: where evaluation reads it; None drops nothing in evaluation.
        train_keep_k_write_key: where training writes the same list once more; None does not.
        size_sampling_mode: "uniform", "pow2" or "uniform_pow2".
        block_mask_write_key: accepted and stored for configurations that name it; the mask needs
            the whole sequence, so the packer writes it.
        generator: what draws. None is PyTorch's CPU generator; or a torch.Generator, a numpy
            Generator or RandomState, or "numpy" for numpy's global state.
        read_write_key: another name for ``read_key``.
    """

    def __init__(
        self,
        read_key=None,
        keep_k_write_key="nested_dropout_keep_k",
        eval_keep_k_read_key="eval_keep_k",
        train_keep_k_write_key="train_keep_k",
        size_sampling_mode="uniform",
        block_mask_write_key="nested_dropout_block_mask",
        *,
        generator=None,
        read_write_key=None,
    ):
        super().__init__()
        if (read_key is None) == (read_write_key is None):
            raise TypeError(
                "AttentionMaskedNestedDropout: read_key must be given, or read_write_key in its "
                f"place, got read_key={read_key!r}, read_write_key={read_write_key!r}"
            )
        key = read_write_key if read_key is None else read_key
        self._configure(
            key, eval_keep_k_read_key, train_keep_k_write_key, size_sampling_mode, generator
        )
        self.keep_k_write_key = keep_k_write_key
        self.block_mask_write_key = block_mask_write_key

    def forward(self, data_dict):
        """``data_dict`` itself, with keep_k in it: ``[samples]`` ints."""
        keep_k = self._keep_k(data_dict)
        if keep_k is None:
            data_dict.pop(self.keep_k_write_key, None)
        else:
            data_dict[self.keep_k_write_key] = keep_k
        return data_dict


class MaskedNestedDropout(_NestedDropout):
    r"""Overwrites the registers from keep_k on with one learned token; for comparison.

    Every token still takes part in attention, at its full cost. In place: the tensors in the dict
    must not be leaves that require a gradient.

    >>> dropout = MaskedNestedDropout("registers", 8).eval()
    >>> data_dict = dropout({"registers": [torch.zeros(1, 4, 8)], "eval_keep_k": [3]})
    >>> assert torch.equal(data_dict["registers"][0][0, 3], dropout.dropout_mask_token)

    Draws, and keep_k in evaluation, as in ``AttentionMaskedNestedDropout``.

    Args:
        read_write_key: a list of register tokens ``[1, n_i, D]``, one tensor per sample.
        dim: D.
        eval_keep_k_read_key: where evaluation reads keep_k; None drops nothing in evaluation.
        train_keep_k_write_key: where training writes what it drew; None does not.
        size_sampling_mode: "uniform", "pow2" or "uniform_pow2".
        generator: what draws, None is PyTorch's CPU generator.
    """

    def __init__(
        self,
        read_write_key,
        dim,
        eval_keep_k_read_key="eval_keep_k",
        train_keep_k_write_key="train_keep_k",
        size_sampling_mode="uniform",
        *,
        generator=None,
    ):
        super().__init__()
        self._configure(
            read_write_key,
            eval_keep_k_read_key,
            train_keep_k_write_key,
            size_sampling_mode,
            generator,
        )
        self.dim = dim = _host.length("MaskedNestedDropout", "dim", dim, 1)
        self.dropout_mask_token = torch.nn.Parameter(torch.empty(dim))
        torch.nn.init.trunc_normal_(self.dropout_mask_token, std=0.02)

    def forward(self, data_dict):
        """``data_dict`` itself; its tokens ``[1, n_i, D]`` are overwritten from keep_k on."""
        keep_k = self._keep_k(data_dict)
        if keep_k is None:
            return data_dict
        # Fewer entries than samples: the rest keeps all.
        for i, (tokens, k) in enumerate(zip(data_dict[self.read_key], keep_k, strict=False)):
            if tokens.shape[-1] != self.dim or not tokens.is_floating_point():
                raise ValueError(
                    f"MaskedNestedDropout: {self.read_key}[{i}] must be a floating tensor "
                    f"[1, n, {self.dim}], got {tokens.dtype} {shape_text(tokens)}"
                )
            tokens[:, int(k) :] = self.dropout_mask_token.to(tokens.dtype)
        return data_dict
