# SPDX-License-Identifier: BSD-3-Clause
"""Block masks of nested dropout, from lengths and keep_k to a BlockMask that attention can take.

full_*         samples of 1024 patches and 256 registers, cut to keep_k; S = 4k, 16k and 64k tokens,
               padded at the end. Beside it create_block_mask with the mask_mod that a user would
               write, eager and under torch.compile.
causal_*, causal_last_*  the same in the other modes; compiled only where eager cannot.

A contender is timed if all eight index tensors equal the reference's, undefined tails included:
eager create_block_mask's, at 64k the compiled one's, because the eager one sums S x S int64 there,
a single allocation of 34 GB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import masked_loss_ext as mle

from .contenders import compiled
from .harness import Case, Contender, Problem, View

PATCHES, REGISTERS = 1024, 256
SAMPLE = PATCHES + REGISTERS
MODES = ("full", "causal", "causal_last")
SEED = 4
LISTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
EAGER_LIMIT = 32768  # tokens; beyond it eager needs more memory than most machines have
MIB = 1 << 20


def index_tensors(block_mask: BlockMask) -> tuple[Tensor, ...]:
    """All eight: equal block masks are equal in each. They are small integers, so the relative
    tolerance that agreement.py allows a loss is equality here."""
    return tuple(getattr(block_mask, name) for name in LISTS)


def user_mask_mod(
    keep_k: Tensor, length: int, mode: str, patches: int = PATCHES, registers: int = REGISTERS
) -> Callable:
    """The rule by sample id and position. Dropped tokens and padding have id -1 and the tables are
    int32: the compiler makes vector code of these, of tables of bool code 5 times as slow."""
    token = torch.arange(length, dtype=torch.int32, device=keep_k.device)
    sample, position = token // (patches + registers), token % (patches + registers)
    last = len(keep_k) - 1
    kept = position < patches + keep_k[sample.clamp(max=last)]
    ids = torch.where((sample <= last) & kept, sample, -1)

    def full(b, h, q, kv):
        return (ids[q] == ids[kv]) & (ids[q] >= 0)

    def causal(b, h, q, kv):
        return full(b, h, q, kv) & (q >= kv)

    def causal_last(b, h, q, kv):
        return full(b, h, q, kv) & ((position[kv] < patches) | (q >= kv))

    return {"full": full, "causal": causal, "causal_last": causal_last}[mode]


def problem_of(
    length: int,
    mode: str,
    with_compiled: bool,
    device: str,
    patches: int = PATCHES,
    registers: int = REGISTERS,
) -> Problem:
    samples = length // (patches + registers)
    lengths = [[patches, registers]] * samples
    keep_k = mle.sample_keep_k(registers, samples, generator=torch.Generator().manual_seed(SEED))
    keep_k = keep_k.to(device)

    def ours(keep_k: Tensor) -> tuple[Tensor, ...]:
        return index_tensors(
            mle.nested_dropout_block_mask(lengths, keep_k, mode, max_seq_len=length)
        )

    def from_mask_mod(create: Callable) -> Callable:
        def call(keep_k: Tensor) -> tuple[Tensor, ...]:
            mask_mod = user_mask_mod(keep_k, length, mode, patches, registers)
            return index_tensors(create(mask_mod, None, None, length, length, device=device))

        return call

    eager = from_mask_mod(create_block_mask)
    too_long = length > EAGER_LIMIT
    sums = f"one allocation of {8 * length**2 / 1e9:.1f} GB" if too_long else ""
    contenders = [
        Contender("ours", ours, [(keep_k,)]),
        Contender("eager", eager, [(keep_k,)], skip=sums),
    ]
    reference = eager
    if with_compiled:
        other = from_mask_mod(compiled(create_block_mask))
        contenders.append(Contender("compile", other, [(keep_k,)]))
        reference = other if too_long else eager
    # Next to nothing is read, and no gradient made: the figures are times and memory.
    return Problem(contenders, reference, bytes_moved=0, gradient_bytes=0)


# S, its name, tokens under --quick, rounds (eager takes 1.3 s at 16k), and in mode "full" the aims
# for a CPU with 2 threads: microseconds, ratios, peak memory
SIZES = (
    ("4k", 4096, 1280, 21, 100, {"eager": 300}, None),
    ("16k", 16384, 2560, 5, 400, {"eager": 3000, "compile": 100}, None),
    ("64k", 65536, 3072, 7, 5000, {}, 16 * MIB),
)


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    on_cpu = torch.device(device).type == "cpu"
    found = []
    for mode in MODES:
        for size, full_length, quick_length, rounds, time_us, ratios, peak in SIZES:
            length = quick_length if quick else full_length
            with_compiled = mode == "full" or full_length > EAGER_LIMIT
            promised = on_cpu and not quick and mode == "full"

            def make(length=length, mode=mode, with_compiled=with_compiled):
                return problem_of(length, mode, with_compiled, device)

            view = View(
                f"{mode}_{size}",
                f"{length // SAMPLE} x ({PATCHES} + {REGISTERS})",
                targets=ratios if promised else {},
                time_limit_us=time_us if promised else None,
                peak_limit_bytes=peak if promised else None,
            )
            found.append(
                Case(
                    view.name,
                    view.summary,
                    (length, length),
                    torch.bool,
                    make,
                    views=(view,),
                    rounds=rounds if mode == "full" else min(rounds, 3),
                    weigh=mode == "full" and size != "4k",
                )
            )
    return found
