# SPDX-License-Identifier: BSD-3-Clause
"""Random attention masks: each case is intervals, and the same mask as a dense bool tensor that was
made from ids and positions alone."""

import torch
from torch.nn.attention.flex_attention import create_block_mask

import masked_loss_ext as mle
from masked_loss_ext.reference import attention

FIELDS = [
    f"{full}{side}_{what}"
    for side in ("kv", "q")
    for full in ("", "full_")
    for what in ("num_blocks", "indices")
]
BLOCKS = [(128, 128), (128, 128), (64, 64), (64, 128), (128, 64), (32, 32), (16, 48)]
I = mle.RowIntervals  # noqa: E741


def same_block_mask(block_mask, dense, block):
    """All eight index tensors are those of create_block_mask; dense is ``[B, Sq, Skv]``."""
    batch, q_len, kv_len = dense.shape
    expected = create_block_mask(
        lambda b, h, q, kv: dense[b, q, kv], batch, None, q_len, kv_len, "cpu", BLOCK_SIZE=block
    )
    assert block_mask.seq_lengths == expected.seq_lengths
    assert block_mask.BLOCK_SIZE == expected.BLOCK_SIZE
    assert block_mask.shape == expected.shape
    for field in FIELDS:
        ours, theirs = getattr(block_mask, field), getattr(expected, field)
        assert ours.dtype == theirs.dtype == torch.int32, field
        assert torch.equal(ours, theirs), field


def evaluated(block_mask, batch, q_len, kv_len):
    """What the mask_mod says of each pair, ``[B, Sq, Skv]``."""
    b, q, kv = torch.meshgrid(
        torch.arange(batch), torch.arange(q_len), torch.arange(kv_len), indexing="ij"
    )
    return block_mask.mask_mod(b, torch.zeros_like(b), q, kv)


def check(intervals, dense, block):
    """The intervals, their mask_mod and their block lists against the dense definition."""
    dense = dense if dense.dim() == 3 else dense.unsqueeze(0)
    assert torch.equal(intervals.dense().view(dense.shape), dense)
    block_mask = intervals.block_mask(block)
    same_block_mask(block_mask, dense, block)
    assert torch.equal(evaluated(block_mask, *dense.shape), dense)


# --- packed layouts ------------------------------------------------------------------------------


def random_layout(rng, size):
    """Arguments of PackedLayout, the kept lengths they mean, and arguments of intervals."""
    samples, segments = rng.randint(1, 5), rng.choice([1, 2, 2, 2, 3, 4])
    draw = lambda: rng.choice([0, 1, 32, rng.randint(0, 40), rng.randint(0, size)])  # noqa: E731
    rows = [[draw() for _ in range(segments)] for _ in range(samples)]
    droppable, keep_k = rng.choice([-1, -1, rng.randrange(segments)]), None
    kept = [list(row) for row in rows]
    kind = rng.choice(["none", "one", "one", "one", "each"])
    if kind == "one":
        keep_k = [rng.choice([0, 1, r[droppable], rng.randint(0, size)]) for r in rows]
        for row, k in zip(kept, keep_k, strict=True):
            row[droppable] = min(row[droppable], k)
    elif kind == "each":
        keep_k = [[rng.randint(0, n + 2) for n in row] for row in rows]
        kept = [[min(a, b) for a, b in zip(*pair, strict=True)] for pair in zip(kept, keep_k)]  # noqa: B905
    if keep_k is not None and rng.random() < 0.5:
        keep_k = torch.tensor(keep_k, dtype=rng.choice([torch.int32, torch.int64]))
    align = rng.choice([None, None, None, 1, 16, 128])
    length = {"pad_to_multiple": rng.choice([None, 1, 64, 100])}
    if rng.random() < 0.2:
        length = {"max_seq_len": sum(map(sum, rows)) + samples * (align or 1) + rng.randint(0, 99)}
    arguments = dict(droppable=droppable, align_samples=align, **length)
    return rows, keep_k, arguments, kept


def random_relation(rng, rows, size):
    mode = rng.choice(["full", "causal", "causal_last", "prefix"])
    window = None
    if rng.random() < 0.4:
        window = tuple(rng.choice([None, 0, rng.randint(0, size)]) for _ in range(2))
    return dict(
        mode=mode,
        window=window,
        prefix=[rng.randint(0, sum(r) + 3) for r in rows] if mode == "prefix" else None,
        sinks=rng.choice([0, 0, 1, rng.randint(1, size)]),
        dropped=rng.choice(["none", "none", "self", "attend"]),
    )


def packed_case(rng, size):
    rows, keep_k, arguments, kept = random_layout(rng, size)
    relation = random_relation(rng, rows, size)
    layout = mle.PackedLayout(rows, keep_k, **arguments)
    tokens = attention.packed_tokens(rows, kept, layout.padded_len, layout.align_samples)
    dense = attention.packed_attention_mask(tokens, **relation)
    return layout, relation, tokens, dense


# --- other sources -------------------------------------------------------------------------------


def _cuts(rng, length, most):
    cuts = sorted(rng.sample(range(1, length), rng.randint(0, min(most, length - 1))))
    return [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]


def _repeat(values, lengths):
    return torch.tensor([v for v, n in zip(values, lengths, strict=True) for _ in range(n)])


def _equal(a, b=None):
    return a.unsqueeze(-1) == (a if b is None else b).unsqueeze(-2)


def document_ids(rng, size):
    batch, length = rng.choice([None, 1, 3]), rng.randint(1, size)
    rows = []
    for _ in range(batch or 1):
        lengths = _cuts(rng, length, 6)
        rows.append(_repeat(rng.sample(range(20), len(lengths)), lengths))
    ids = torch.stack(rows) if batch else rows[0]
    pad = rng.choice([None, int(ids.flatten()[-1])])
    dense = _equal(ids) & (ids != (-1 if pad is None else pad)).unsqueeze(-1)
    return I.from_document_ids(ids, pad), dense


def position_ids(rng, size):
    batch, length = rng.randint(1, 3), rng.randint(1, size)
    cuts = [_cuts(rng, length, 6) for _ in range(batch)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in cuts])
    documents = torch.stack([_repeat(range(len(row)), row) for row in cuts])
    return I.from_position_ids(positions), _equal(documents)


def cu_seqlens(rng, size):
    lengths = [rng.randint(0, size // 3) for _ in range(rng.randint(1, 5))]
    total = max(1, sum(lengths) + rng.choice([0, rng.randint(0, 50)]))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(rng.choice([torch.int32, torch.int64]))
    ids = torch.full((total,), -1)
    ids[: sum(lengths)] = _repeat(range(len(lengths)), lengths)
    return I.from_cu_seqlens(cu, total), _equal(ids) & (ids >= 0).unsqueeze(-1)


def padding(rng, size):
    batch, length = rng.randint(1, 4), rng.randint(1, size)
    counts = torch.tensor([rng.randint(0, length) for _ in range(batch)])
    side = rng.choice(["left", "right"])
    t = torch.arange(length)
    valid = t < counts[:, None] if side == "right" else t >= length - counts[:, None]
    given = (counts, length) if rng.random() < 0.6 else (valid.to(torch.int64),)
    intervals = I.from_padding(*given, **({"side": side} if len(given) == 2 else {}))
    return intervals, valid.unsqueeze(-1) & valid.unsqueeze(-2)


def cross(rng, size):
    samples = rng.randint(1, 5)
    queries, keys = ([rng.randint(0, size // 3) for _ in range(samples)] for _ in range(2))
    q_len, kv_len = (max(1, sum(n) + rng.choice([0, 30])) for n in (queries, keys))
    keep = rng.choice([None, [rng.randint(0, size // 2) for _ in range(samples)]])
    q_ids, kv_ids = torch.full((q_len,), -1), torch.full((kv_len,), -2)
    q_ids[: sum(queries)] = _repeat(range(samples), queries)
    kv_ids[: sum(keys)] = _repeat(range(samples), keys)
    index = torch.zeros(kv_len, dtype=torch.int64)
    index[: sum(keys)] = torch.cat([torch.arange(n) for n in keys])
    limit = torch.tensor(keep or keys)[q_ids.clamp_min(0)]
    dense = _equal(q_ids, kv_ids) & (index < limit.unsqueeze(-1))
    if keep is not None and rng.random() < 0.5:
        keep = torch.tensor(keep)
    return I.cross(queries, keys, keep, q_len=q_len, kv_len=kv_len), dense


def positional(rng, size):
    """causal with an offset, window, prefix, sinks, full."""
    q_len, offset = rng.randint(1, size), rng.choice([0, rng.randint(0, 60)])
    kv_len = q_len + offset
    q, k = torch.arange(q_len).unsqueeze(-1) + offset, torch.arange(kv_len)
    left, right = (rng.choice([None, rng.randint(0, size)]) for _ in range(2))
    near = torch.ones(q_len, kv_len, dtype=torch.bool)
    near &= (q - k <= left) if left is not None else True
    near &= (k - q <= right) if right is not None else True
    count = rng.randint(0, size)
    causal = I.causal(q_len, kv_len, offset=offset)
    window = I.sliding_window(q_len, (left, right), kv_len, offset=offset)
    sinks, first = I.sinks(q_len, count, kv_len), (k < count).expand(q_len, -1)
    everything = torch.ones(q_len, kv_len, dtype=torch.bool)
    square = torch.arange(q_len)
    prefix = (square <= square.unsqueeze(-1)) | (square < count)
    return rng.choice(
        [
            (causal, k <= q),
            (window, near),
            (causal & (window | sinks), (k <= q) & (near | first)),
            (I.prefix_lm(q_len, count), prefix),
            (I.full(q_len, kv_len), everything),
        ]
    )


def shared_prefix(rng, size):
    prefix = rng.choice([0, rng.randint(1, size // 2)])
    branches = [rng.randint(0, size // 4) for _ in range(rng.randint(1, 4))]
    used = prefix + sum(branches)
    length = max(1, used + rng.choice([0, 25]))
    branch = torch.full((length,), -1)
    branch[:used] = _repeat(range(len(branches) + 1), [prefix, *branches])
    t = torch.arange(length)
    real = (branch >= 0).unsqueeze(-1) & (branch >= 0)
    dense = real & (t <= t.unsqueeze(-1)) & (_equal(branch) | (branch == 0))
    return I.shared_prefix(prefix, branches, seq_len=length), dense


def block_diffusion(rng, size):
    length, block = rng.randint(1, size // 2), rng.choice([1, 4, 16, 50, 128])
    t = torch.arange(2 * length)
    noisy, number = t < length, t % length // block
    q_noisy, q_number = noisy.unsqueeze(-1), number.unsqueeze(-1)
    dense = (q_noisy & noisy & (q_number == number)) | (q_noisy & ~noisy & (number < q_number))
    return I.block_diffusion(length, block), dense | (~q_noisy & ~noisy & (number <= q_number))


def combined(rng, size):
    """``&`` and ``|`` of any intervals, as many per row as there may be, and a slice of rows."""
    q_len, kv_len = rng.randint(1, size), rng.randint(1, size)
    parts = []
    for _ in range(2):
        shape = (rng.choice([1, 1, 2, 4]), q_len)
        if rng.random() < 0.3:
            shape = (2, *shape)
        seed = torch.Generator().manual_seed(rng.randrange(10**6))
        lo, hi = (torch.randint(-3, kv_len + 4, shape, generator=seed).int() for _ in range(2))
        parts.append(I(lo, hi, kv_len))
    dense = [attention.interval_mask(part.lo, part.hi, kv_len) for part in parts]
    both = (parts[0] & parts[1], dense[0] & dense[1])
    either = (parts[0] | parts[1], dense[0] | dense[1])
    intervals, mask = rng.choice([both, either])
    q0 = rng.randrange(q_len)
    q1 = rng.randint(q0 + 1, q_len)
    return rng.choice([(intervals, mask), (intervals.rows(q0, q1), mask[..., q0:q1, :])])


SOURCES = [
    document_ids,
    position_ids,
    cu_seqlens,
    padding,
    cross,
    positional,
    shared_prefix,
    block_diffusion,
    combined,
]
