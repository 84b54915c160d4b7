# SPDX-License-Identifier: BSD-3-Clause
"""Cases for the block-mask operators, and what they should give, worked out pair by pair."""

import itertools

import torch

FIELDS = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)
BLOCKS = [(128, 128), (128, 128), (64, 64), (32, 32), (64, 128), (128, 32), (32, 128), (48, 80)]


def assert_lists(actual, expected):
    """Same dtype, shape and bits, entries beyond the counts included."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, i
        assert torch.equal(a, e), f"tensor {i}: {a} instead of {e}"


# Row intervals


def random_intervals(rng, batch=None, intervals=None):
    """lo, hi [B, R, S], kv_len, block: runs of equal rows, wide and narrow, touching, unsorted."""
    batch = batch or rng.choice([1, 1, 2, 3])
    intervals = intervals or rng.choice([1, 1, 2, 3, 5, 8])
    size, kv_len = rng.randint(1, 600), rng.randint(1, 600)
    if rng.random() < 0.4:
        kv_len = size
    lo = torch.empty(batch, intervals, size, dtype=torch.int32)
    hi = torch.empty_like(lo)
    for b in range(batch):
        q = 0
        while q < size:
            run = rng.choice([1, rng.randint(1, 40), rng.randint(1, 300)])
            for r, (low, high) in enumerate(_row(rng, intervals, kv_len)):
                lo[b, r, q : q + run], hi[b, r, q : q + run] = low, high
            q += run
    if rng.random() < 0.3:  # causal: no two rows are equal
        hi = torch.minimum(hi, torch.arange(1, size + 1, dtype=torch.int32))
    return lo, hi, kv_len, rng.choice(BLOCKS)


def _row(rng, intervals, kv_len):
    kind = rng.choice(["all", "none", "cuts", "random", "random", "far"])
    if kind == "all":
        row = [(0, kv_len)] * intervals
    elif kind == "none":
        row = [(0, 0), (7, 3)] * intervals
    elif kind == "cuts":  # each begins where another ends
        cuts = sorted(rng.randint(0, kv_len) for _ in range(intervals + 1))
        row = list(itertools.pairwise(cuts))
    elif kind == "far":
        row = [(rng.randint(-(2**31), kv_len), rng.randint(0, 2**31 - 1))] * intervals
    else:
        row = [(rng.randint(0, kv_len), rng.randint(0, kv_len)) for _ in range(intervals)]
    rng.shuffle(row)
    return row[:intervals]


# Packed rows


def offsets_of(segments):
    lengths = torch.tensor([0, *itertools.chain(*segments)], dtype=torch.int64)
    return lengths.cumsum(0)


def kept_of(case):
    kept = torch.tensor(case["kept"], dtype=torch.int64)
    return kept if case["kept"] else kept.reshape(0, 2)


def packed_arguments(case):
    prefix = case["prefix"]
    return (
        offsets_of(case["segments"]),
        kept_of(case),
        sum(map(sum, case["segments"])) + case["padding"],
        case["mode"],
        *case["window"],
        None if prefix is None else torch.tensor(prefix),
        case["sinks"],
        case["dropped"],
    )


def visible_pairs(case):
    """Row by row, whether q may attend to kv: by sample, position and visibility of each token."""
    tokens = []  # (sample, position, visible, of the last segment)
    for sample, (lengths, kept) in enumerate(zip(case["segments"], case["kept"], strict=True)):
        position = 0
        for g, length in enumerate(lengths):
            for index in range(length):
                tokens.append((sample, position, index < kept[g], g == len(lengths) - 1))
                position += 1
    tokens += [(None, 0, False, False)] * case["padding"]
    return [[_attends(case, q, kv) for kv in tokens] for q in tokens]


def _attends(case, query, key):
    (sample, q, q_visible, _), (key_sample, kv, kv_visible, kv_last) = query, key
    if sample is None or sample != key_sample:
        return False
    if not q_visible and case["dropped"] == "none":
        return False
    if not q_visible and case["dropped"] == "self":
        return q == kv
    if not kv_visible:
        return False
    if case["mode"] == "causal_last" and not kv_last:
        return True
    if case["mode"] == "prefix" and kv < case["prefix"][sample]:
        return True
    if case["mode"] != "full" and kv > q:
        return False
    left, right = case["window"]
    in_window = (left is None or kv >= q - left) and (right is None or kv <= q + right)
    return in_window or kv < case["sinks"]


def intervals_of(pairs, slots):
    """Per row ([lo of each slot], [hi of each slot]): maximal runs, then (0, 0)."""
    rows = []
    for row in pairs:
        edges = [i for i, (a, b) in enumerate(itertools.pairwise([0, *row, 0])) if a != b]
        runs = list(itertools.pairwise(edges))[::2]
        assert len(runs) <= slots
        runs += [(0, 0)] * (slots - len(runs))
        rows.append(([low for low, _ in runs], [high for _, high in runs]))
    return rows


def _packed(name, **changes):
    case = {
        "name": name,
        "segments": [[5, 6], [0, 4], [7, 3]],
        "kept": [[5, 2], [0, 4], [4, 3]],
        "padding": 2,
        "mode": "full",
        "window": (None, None),
        "prefix": None,
        "sinks": 0,
        "dropped": "none",
    }
    return {**case, **changes}


PACKED_CASES = [
    _packed(
        f"{mode} {window} {sinks} {dropped}",
        mode=mode,
        window=window,
        sinks=sinks,
        dropped=dropped,
        prefix=[3, 9, 0] if mode == "prefix" else None,
    )
    for mode in ("full", "causal", "causal_last", "prefix")
    for window in ((None, None), (2, None), (None, 1), (1, 2), (0, 0))
    for sinks in (0, 3)
    for dropped in ("none", "self", "attend")
] + [
    _packed("no samples", segments=[], kept=[], padding=3),
    _packed("nothing kept", kept=[[0, 0]] * 3),
    _packed("more kept than there is", kept=[[9, 9], [1, 9], [-1, 9]], mode="causal"),
    _packed("one segment", segments=[[4], [0], [5]], kept=[[4], [0], [2]]),
    _packed("empty segments", segments=[[0, 0], [0, 5], [5, 0]], kept=[[0, 0], [0, 3], [5, 0]]),
    _packed("eight segments", segments=[[3] * 8], kept=[[1, 2, 3, 0, 3, 3, 1, 2]], mode="causal"),
    _packed(
        "four segments, window, sinks",
        segments=[[3, 4, 3, 4]] * 2,
        kept=[[2, 3, 1, 4], [3, 4, 0, 2]],
        mode="causal",
        window=(4, None),
        sinks=2,
    ),
]


def random_packed(rng, scale=1):
    windowed = rng.random() < 0.4
    groups = rng.choice([1, 2, 2, 3, 4] if windowed else [1, 2, 3, 5, 8])
    samples = rng.randint(1, 4)
    length = lambda: scale * rng.choice([0, 1, rng.randint(0, 9)])  # noqa: E731
    segments = [[length() for _ in range(groups)] for _ in range(samples)]
    mode = rng.choice(["full", "causal", "causal_last", "prefix"])
    side = lambda: rng.choice([None, 0, scale * rng.randint(0, 6)])  # noqa: E731
    return _packed(
        "random",
        segments=segments,
        kept=[[rng.choice([n, rng.randint(-1, n + 2)]) for n in row] for row in segments],
        padding=rng.choice([0, 1, scale * 3]),
        mode=mode,
        window=(side(), side()) if windowed else (None, None),
        prefix=[rng.randint(-1, sum(row) + 2) for row in segments] if mode == "prefix" else None,
        sinks=rng.choice([0, 0, rng.randint(1, 5 * scale)]),
        dropped=rng.choice(["none", "none", "self", "attend"]),
    )
