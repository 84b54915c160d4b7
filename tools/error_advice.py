# SPDX-License-Identifier: BSD-3-Clause
"""What to do about a rule that an argument broke."""

import re

# Patterns, each of a whole rule, and indented what to do; the first that fits decides.
TEXT = r"""
be a torch.Tensor
    Pass a tensor; of a list or NumPy array, `torch.as_tensor`.
be a plain tensor
    Pad a nested tensor and give a mask, dequantize a quantized one; of a DTensor, the message
    says which call takes it.
be a dense tensor
    `.to_dense()`; sparse layouts are not read.
be on the device of .*
be on one device
    Move it with `.to(device)`. Nothing is moved for you: that would wait for the GPU in
    silence.
be of a dtype that PyTorch .*
be bool, integer or floating.*
    Make it bool, an integer or float16 to float64; complex, quantized and sub-byte dtypes are
    not taken.
be a floating tensor
be float16, .*
be floating or integer
    Convert it to float16, bfloat16, float32 or float64.
be uint8, int8, .*
    Labels are one class per row, as integers. Soft labels or one-hot rows: `.argmax(-1)`, or
    another loss.
be integers
be ints of at most 64 bits
fit in 64 bits
fit int64
hold ints.*
    Convert it to integers, int64 say.
be in \[0, n\).*|fit the dtype of labels.*
    A label or index is not one of the classes: look at the row that the message names.
    Padding gets `ignore_index` or a mask; a vocabulary that was extended needs the larger
    head.
be on where it is not 0
    The mask has NaN or negative entries, as masks have that attention adds to its scores.
    Give the tokenizer's mask, 1 and 0.
not require a gradient
    This argument has no derivative here, and 0 in silence would be wrong: `.detach()` it.
have the shape of .*
be \[\.\.\.\], the first dimensions of .*
be broadcastable to .*
have the B and S of .*
    Compare the two shapes in the message. A size of 1 stands for any; `None` leaves the
    argument out. Often a mask `[B, S]` beside logits that were cut to `S - 1`: cut nothing,
    use `shift=1`.
have 2 dimensions \[B, S\], the tokenizer's
    Give the tokenizer's mask `[B, S]`, not the 4-D one made for attention.
have \d dimensions.*
be \[\.\.\., [DSV]\].*
be \[V, D\].*
be a number \[\.\.\.\]
be one number .*
    Reshape it to what the brackets say (B rows, S positions, V classes, D or H features; `[]`
    is a 0-d tensor).
have (vocab_size|num_classes|hidden_size|num_experts).*
    The tensor does not belong to this module: its last dimension is not what the constructor
    was told.
have one entry per .*
be a number or (have one entry per head|\[vocab_size\]|floating).*
be \[N, .*
be a number, a 0-d .*
    One number for all, or exactly as many as the message says.
be a bool
    Pass True or False; a 0-d tensor would have to be read, which waits for a GPU.
be an int
be a number
be a real number
    A plain number, no string, bool or list: `int(x)`, `float(x)`.
be a number or a 0-d tensor
    A plain number, or a tensor of no dimension that may stay on the GPU.
be a finite number.*
be finite.*
be positive and finite
not be negative
be at (least|most).*
be in \[.*
    Outside of its bounds, or NaN, or infinite: the message has the value. Where a number is
    computed (a normalizer, a schedule), look there.
hold at most .* tokens
    More tokens than kernels index with 32 bits: split the batch.
be None where torch.distributed is not initialized
    Leave `group` out, or call `init_process_group` before.
be None, torch.float32.*
    `logits_dtype` widens logits of half precision to float32; leave it out otherwise.
be a torch.Generator or None
    Pass a `torch.Generator`, or NumPy's where the docstring says so.
be an? (list|tensor|int|mapping).*
    Pass one of the forms that the message lists.
be one of \d segments
    An index of a segment of each sample, negative ones counted from the end.
be negative, as ids .*
    Ids from 0 on are taken: choose a negative one.
rise from 0
    `cu_seqlens` are cumulative: 0, n_0, n_0 + n_1, ...
be [a-z_0-9]+(, [a-z_0-9]+)* or [a-z_0-9]+
    A word of that list.
"""


def _read() -> list[tuple[str, str]]:
    found, patterns, words = [], [], []
    for line in [*TEXT.strip().splitlines(), ""]:
        if line.startswith(" "):
            words.append(line.strip())
            continue
        if words:
            found += [(pattern, " ".join(words)) for pattern in patterns]
            patterns, words = [], []
        patterns.append(line)
    return found


ADVICE = _read()


def advice(rule: str) -> str:
    for pattern, text in ADVICE:
        if re.fullmatch(pattern, rule):
            return text
    raise ValueError(f"tools/error_advice.py says nothing about 'must {rule}'")
