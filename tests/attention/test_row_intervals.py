# SPDX-License-Identifier: BSD-3-Clause
"""RowIntervals: hand-worked masks, their algebra, slices, pictures. Random ones: the fuzz."""

import subprocess
import sys

import pytest
import torch

import masked_loss_ext as mle

I = mle.RowIntervals  # noqa: E741


def rows(intervals):
    return ["".join(".#"[x] for x in row) for row in intervals.dense().int().tolist()]


def test_sources_by_hand():
    assert rows(I.causal(2, 4, offset=1)) == ["##..", "###."]
    assert rows(I.sliding_window(4, (1, 0))) == ["#...", "##..", ".##.", "..##"]
    assert rows(I.sliding_window(3, 1)) == ["##.", "###", ".##"]
    assert rows(I.sliding_window(2, (None, 0), 3)) == ["#..", "##."]
    assert rows(I.prefix_lm(3, 2)) == ["##.", "##.", "###"]
    assert rows(I.sinks(2, 1, 3)) == ["#..", "#.."] and rows(I.full(1, 2)) == ["##"]
    assert rows(I.from_document_ids(torch.tensor([5, 5, 3]))) == ["##.", "##.", "..#"]
    assert rows(I.from_document_ids(torch.tensor([0, 5, 0]), 0)) == ["...", ".#.", "..."]
    assert rows(I.from_position_ids(torch.tensor([0, 1, 0]))) == ["##.", "##.", "..#"]
    assert rows(I.from_cu_seqlens([0, 1, 3], 4)) == ["#...", ".##.", ".##.", "...."]
    assert rows(I.cross([1, 2], [2, 2], [1, 5])) == ["#...", "..##", "..##"]
    assert rows(I.shared_prefix(1, [2, 1])) == ["#...", "##..", "###.", "#..#"]
    padded = rows(I.shared_prefix(1, [1, 1], seq_len=4))
    assert padded == ["#...", "##..", "#.#.", "...."]
    assert rows(I.block_diffusion(2, 1)) == ["#...", ".##.", "..#.", "..##"]


def test_batched_sources_by_hand():
    left = I.from_padding([1, 3], 3, side="left").dense()
    assert left.shape == (2, 1, 3, 3)
    assert left.int().tolist() == [[[[0] * 3, [0] * 3, [0, 0, 1]]], [[[1] * 3] * 3]]
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
    assert torch.equal(I.from_padding(mask).dense(), left)
    decoding = I.causal(1, 5, offset=torch.tensor([1, 4])).dense()
    assert decoding.int().tolist() == [[[[1, 1, 0, 0, 0]]], [[[1] * 5]]]
    assert I.prefix_lm(3, torch.tensor([0, 3])).dense().sum((1, 2, 3)).tolist() == [6, 9]


def test_algebra_by_hand():
    a = I(torch.tensor([[0], [4]]).int(), torch.tensor([[2], [6]]).int(), 8)
    b = I(torch.tensor([[2], [5]]).int(), torch.tensor([[4], [8]]).int(), 8)
    assert rows(a | b) == ["########"] and rows(a & b) == [".....#.."]
    assert (a | b).hi.flatten().tolist() == [8, 0, 0, 0], "one interval, then empty ones"
    assert (a | b).merged(0).lo.shape == (1, 1) and a.merged().lo.tolist() == [[0], [4]]
    batched = I(a.lo.expand(3, 2, 1), a.hi.expand(3, 2, 1), 8)
    for union in (batched | b, b | batched):
        assert union.dense().shape == (3, 1, 1, 8) and union.dense().all()
    # nine pieces in slots for at most eight: merged only if they are not needed
    many = I.full(1, 8)
    for _ in range(9):
        many = many | b
    assert rows(many) == ["########"] and many.lo.shape[0] <= 8
    bounds = [torch.tensor([[i]]).int() for i in range(0, 18, 2)]
    every_other = [I(at, at + 1, 40) for at in bounds]
    with pytest.raises(ValueError, match="must have 1 to 8 intervals per row, got 9"):
        for part in every_other[1:]:
            every_other[0] = every_other[0] | part


def test_slices_are_rows():
    whole = I.shared_prefix(5, [3, 4]) & I.sliding_window(12, (4, 0))
    dense = whole.dense()
    for q0, q1 in ((0, 12), (3, 4), (11, 12), (5, 5)):
        part = whole.rows(q0, q1)
        assert torch.equal(part.dense(), dense[q0:q1]) and part.kv_len == 12
    block_mask = whole.rows(11, 12).block_mask(4)
    assert block_mask.seq_lengths == (1, 12) and block_mask.kv_num_blocks.tolist() == [[[1]]]


def test_block_mask_without_the_lists_of_backward():
    mask = I.causal(300)
    short, whole = mask.block_mask(with_q=False), mask.block_mask()
    assert short.q_num_blocks is None and short.full_q_indices is None
    assert torch.equal(short.kv_indices, whole.kv_indices)
    assert whole.q_num_blocks.tolist() == [[[2, 2, 1]]]  # the diagonal, and the ragged block
    assert torch.equal(short.full_kv_indices, whole.full_kv_indices)


def test_intervals_beyond_the_keys_are_cut():
    wild = I(torch.tensor([-5, 3, 9]).int(), torch.tensor([2, 99, 12]).int(), 5)
    assert rows(wild) == ["##...", "...##", "....."]
    assert wild.stats(1).pairs == 4 and wild.stats(1).empty_rows == 1
    assert wild.block_mask(1).full_kv_num_blocks.tolist() == [[[2, 2, 0]]]


# --- pictures ------------------------------------------------------------------------------------


def test_stats():
    stats = (I.from_document_ids(torch.arange(4).repeat_interleave(64)) & I.causal(256)).stats(64)
    assert stats.pairs == 4 * 64 * 65 // 2 and stats.density == stats.pairs / 256**2
    assert stats[2:] == (16, 0, 4, 12, 0)
    batched = I.from_padding([0, 64], 64).stats(32)
    assert batched.pairs == 64**2 and batched[2:] == (8, 4, 0, 4, 64)


def test_ascii():
    layout = mle.PackedLayout([[8, 4], [4, 4]], [2, 4], pad_to_multiple=4)
    picture = layout.intervals("causal_last").ascii(width=5)
    assert picture.splitlines() == ["##...", "##...", "+++..", "...#.", "...#+"]
    assert I.from_padding([1, 2], 2).ascii(batch=1) == "##\n##"


def test_png(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    mask = mle.PackedLayout([[96, 32]] * 2, [16, 32], pad_to_multiple=1).intervals()
    mask.png(tmp_path / "mask.png", size=512, block_size=64)
    picture = image.open(tmp_path / "mask.png").convert("RGB")
    assert picture.size == (512, 512)
    dark, light = picture.getpixel((3, 3)), picture.getpixel((300, 3))
    assert sum(dark) < sum(light) and light == (255, 255, 255)
    assert picture.getpixel((2 * 120, 3)) == light, "a dropped column"
    assert picture.getpixel((128, 300)) not in (dark, light), "a line between blocks"
    mask.png(tmp_path / "small.png", size=64, block_size=None)
    small = image.open(tmp_path / "small.png").convert("RGB")
    assert small.size == (64, 64) and small.getpixel((0, 0)) == dark


WITHOUT_PILLOW = """
import sys
sys.modules["PIL"] = None
{also}
import masked_loss_ext as mle
try:
    mle.RowIntervals.causal(8).png({path!r}, size=64)
except ImportError as error:
    print("refused:", error)
"""


def test_pictures_are_no_dependency(tmp_path):
    code = WITHOUT_PILLOW.format(also="sys.modules['matplotlib'] = None", path=str(tmp_path / "x"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused: RowIntervals.png: Pillow or matplotlib is needed" in done.stdout, done.stderr


# --- refusals ------------------------------------------------------------------------------------


def ids(*values):
    return torch.tensor(values)


LO = torch.zeros(1, 4, dtype=torch.int32)
REFUSED = [
    (
        lambda: I.from_document_ids(ids(3, 3, 1, 3)),
        "id 3 comes again at index 3; for such masks use",
    ),
    (lambda: I.from_document_ids(ids(3, 1, 3)), "create_block_mask"),
    (lambda: I.from_document_ids(torch.tensor([[1, 1, 2], [2, 1, 2]])), "at index 2 of row 1"),
    (lambda: I.from_document_ids(ids(0, 1, 0, 1), 0), "id 1 comes again at index 3"),
    (lambda: I.from_document_ids(torch.ones(3)), "ids must be integers"),
    (lambda: I.from_document_ids(ids(1)[0]), "ids must be [S] or [B, S]"),
    (lambda: I.from_position_ids(torch.ones(3)), "position_ids must be integers"),
    (lambda: I.from_cu_seqlens([0, 3, 2]), "cu_seqlens must rise from 0"),
    (lambda: I.from_cu_seqlens([1, 3]), "cu_seqlens must rise from 0"),
    (lambda: I.from_cu_seqlens([0, 3], 2), "total_len must be at least 3, got 2"),
    (lambda: I.from_cu_seqlens([0]), "cu_seqlens must have N + 1 entries"),
    (lambda: I.from_padding([1, 2]), "seq_len must be given with lengths"),
    (lambda: I.from_padding([1, 2], 3, side="top"), "side must be right or left"),
    (
        lambda: I.from_padding(torch.tensor([[1, 1], [1, 1]]).repeat(1, 2) * ids(1, 0, 1, 1)),
        "row 0",
    ),
    (lambda: I.cross([1], [1, 2]), "kv_lengths must have one entry per sample (1), got 2"),
    (lambda: I.cross([1], [2], [-1]), "keep_k must not be negative"),
    (lambda: I.cross([3], [2], q_len=2), "q_len must be at least 3, got 2"),
    (lambda: I.shared_prefix(2, [3], seq_len=4), "seq_len must be at least 5, got 4"),
    (lambda: I.block_diffusion(4, 0), "block must be at least 1"),
    (lambda: I.sliding_window(4, -1), "window must not be negative"),
    (lambda: I.causal(-1), "q_len must not be negative"),
    (lambda: I(LO, LO.long(), 4), "hi must be torch.int32, got torch.int64"),
    (lambda: I(LO, LO[:, :2], 4), "lo and hi must be [R, Sq] or [B, R, Sq] of one shape"),
    (lambda: I(LO.expand(9, 4), LO.expand(9, 4), 4), "must have 1 to 8 intervals per row, got 9"),
    (lambda: I(LO, LO, -1), "kv_len must not be negative"),
    (lambda: I.causal(4) & I.causal(5), "both sides of & must have as many queries and keys"),
    (lambda: I.causal(4) | I.causal(4, 5), "both sides of | must have as many queries and keys"),
    (lambda: I.from_padding([1] * 3, 4) | I.from_padding([1, 2], 4), "must have one batch size"),
    (lambda: I.causal(4).rows(2, 5), "q0 and q1 must be within the 4 queries"),
    (lambda: I.causal(4).block_mask(0), "block_size must be at least 1, got 0"),
    (lambda: I.causal(4).block_mask((1, 2, 3)), "block_size must be an int or a pair"),
]


@pytest.mark.parametrize("call,text", REFUSED)
def test_refusals(call, text):
    with pytest.raises(ValueError) as caught:
        call()
    assert "RowIntervals" in str(caught.value) and text in str(caught.value)


def test_wrong_kinds():
    with pytest.raises(TypeError):
        I.causal(4) & torch.ones(4, 4)
    with pytest.raises(TypeError, match="lo must be a torch.Tensor, got list"):
        I([0], [1], 2)
    # ids that were checked by the caller, or whose runs are documents apart
    assert rows(I.from_document_ids(ids(3, 1, 3), check=False)) == ["#..", ".#.", "..#"]
