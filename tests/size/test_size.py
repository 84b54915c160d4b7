# SPDX-License-Identifier: BSD-3-Clause
"""A million rows, classes, documents, tokens: right, and memory in proportion to them. How long it
takes is printed by ``python -m tools.size``, which measures the same calls."""

import pytest
import torch
from allocations import allocated_bytes

from masked_loss_ext import reference
from tools.size.__main__ import main, measured, measured_apart, power, row
from tools.size.cases import BY_NAME, CASES, MILLION, TILE, S, labels, random

pytestmark = pytest.mark.slow
NAMES = list(BY_NAME)


def close(found, expected):
    """Within float32's digits of the largest."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6 * largest)


def as_one_tile(case, n, result):
    """The mean of what repeats is that of TILE rows, its gradient that over as many."""
    expected, gradient = case.make(TILE)()
    loss, found = result
    close(loss, expected)
    rows = found.reshape(n // TILE, TILE, -1)
    close(rows * (n // TILE), gradient.reshape(1, TILE, -1).expand_as(rows))


def of_the_reference(case, n, result):
    loss, gradient = result
    logits = random(4, n).double().requires_grad_()
    target = torch.tensor([0, n - 1, n // 2, -100])
    expected = reference.masked_cross_entropy(logits, target)
    close(loss, expected.detach())
    close(gradient, torch.autograd.grad(expected, logits)[0])


def of_the_reference_s_head(case, n, result):
    leaves = [random(4, 4).double().requires_grad_(), random(n, 4).double().requires_grad_()]
    target = torch.tensor([0, n - 1, n // 2, -100])
    expected = reference.masked_cross_entropy(leaves[0] @ leaves[1].T, target)
    close(result[0], expected.detach())
    for found, one in zip(result[1:], torch.autograd.grad(expected, leaves), strict=True):
        close(found, one)


def nothing_at_all(case, n, result):
    assert not any(x.any() for x in result)


def the_last_row(case, n, result):
    loss, of_hidden, of_weight = result
    leaves = [random(n, 8)[-1:].double().requires_grad_(), random(16, 8).double().requires_grad_()]
    expected = reference.masked_cross_entropy(leaves[0] @ leaves[1].T, labels(16, n)[-1:])
    close(loss, expected.detach())
    row, weight = torch.autograd.grad(expected, leaves)
    close(of_hidden[-1:], row)
    close(of_weight, weight)
    assert not of_hidden[:-1].any()


def three_squared(case, n, result):
    """3 where it should be 0, and nothing else counts."""
    loss, gradient = result
    assert loss == 9 and gradient.flatten()[-1] == 6 and not gradient.flatten()[:-1].any()


def the_last_token(case, n, result):
    loss, gradient = result
    logits = random(1, n, 2)[:, -1].double().requires_grad_()
    expected = reference.masked_cross_entropy(logits, labels(2, 1, n)[:, -1])
    close(loss, expected.detach())
    close(gradient[:, -1], torch.autograd.grad(expected, logits)[0])
    assert not gradient[:, :-1].any()


def as_a_shorter_one(case, n, result):
    """Of a document that repeats the last rows are as in another of its kind."""
    _, gradient = case.make(n // 4)()
    close(result[1][0, -TILE:] * n, gradient[0, -TILE:] * (n // 4))


def no_repetition(case, n, result):
    """Of rows of one token, or of n different ones."""
    counts, (before, after) = result
    assert not counts.pairs.any() and torch.equal(counts.distinct, counts.windows)
    assert (before == -1).all() and (after == before.shape[1]).all()


def one_ngram(case, n, result):
    """n - 3 windows of four equal tokens, all the same; each ends once more at the next token. No
    other token ever followed."""
    counts, (before, after) = result
    assert counts == ((n - 3) * (n - 4) // 2, n - 3, 1, n)
    assert (before == -1).all() and (after[0, :3] == n).all()
    assert torch.equal(after[0, 3:], torch.arange(4, n + 1, dtype=after.dtype))


def all_true(case, n, result):
    assert result.shape == (n, 1) and result.all()


def all_ignored(case, n, result):
    """Of labels shifted across a border none is left."""
    assert result.shape == (1, n) and (result == -100).all()


def one_each(case, n, result):
    """Each token sees itself."""
    assert torch.equal(result.lo.flatten(), torch.arange(n, dtype=result.lo.dtype))
    assert torch.equal(result.hi.flatten(), torch.arange(n, dtype=result.hi.dtype) + 1)


def compacted(case, n, result):
    layout, plan = result
    assert layout.padded_len >= n and torch.equal(plan.index, torch.arange(n))


def the_diagonal(case, n, mask):
    """Of blocks of 128 x 128, each of which is seen in part."""
    blocks = S // 128
    assert (mask.kv_num_blocks == 1).all() and not mask.full_kv_num_blocks.any()
    first = mask.kv_indices[..., 0]
    assert torch.equal(first, torch.arange(blocks, dtype=first.dtype).expand_as(first))
    assert mask.seq_lengths == (S, S)


def the_last_block(case, n, mask):
    assert mask.kv_num_blocks.sum() == 1 and mask.kv_num_blocks[..., -1] == 1
    assert mask.kv_indices[..., -1, 0] == S // 128 - 1 and not mask.full_kv_num_blocks.any()


def as_one_sample(case, n, result):
    """The mean over equal samples and their gradients."""
    expected, gradient = case.make(1)()
    close(result[0], expected)
    found = result[1][0, 0, : 4 * n].reshape(n, 4, -1)
    close(found * n, gradient[0, 0, :4].expand_as(found))


def unpacked(case, n, result):
    assert torch.equal(torch.cat(result)[:, 0, 0], torch.arange(float(n)))


RIGHT = {
    "rows_of_two_classes": as_one_tile,
    "one_class": nothing_at_all,
    "classes": of_the_reference,
    "classes_of_a_head": of_the_reference_s_head,
    "one_row_of_a_head": the_last_row,
    "last_element": three_squared,
    "last_token": the_last_token,
    "segments_of_cross_entropy": as_one_tile,
    "unified_rows": as_one_tile,
    "unified_segments": as_one_tile,
    "unified_tokens": as_a_shorter_one,
    "repetition_of_rows": no_repetition,
    "repetition_of_equal": one_ngram,
    "repetition_of_different": no_repetition,
    "lengths": all_true,
    "labels_of_documents": all_ignored,
    "layout_of_samples": compacted,
    "intervals_of_ids": one_each,
    "intervals_of_cu_seqlens": one_each,
    "block_mask_of_rows": the_diagonal,
    "block_mask_of_empty_documents": the_diagonal,
    "block_mask_of_samples": the_diagonal,
    "attention_of_samples": as_one_sample,
    "pipeline_of_samples": unpacked,
    "block_mask_of_the_last": the_last_block,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_million_is_right(name):
    case = BY_NAME[name]
    RIGHT[name](case, case.largest, case.make(case.largest)())


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_in_proportion(name):
    """Bytes are counted. Nine tables of S^2 / 128^2 blocks are what a BlockMask needs to be made
    and what it keeps, however few blocks are seen."""
    case = BY_NAME[name]
    if case.largest == S:
        assert allocated_bytes(case.make(S)) < 10 * 4 * (S // 128) ** 2
        return
    small, large = (allocated_bytes(case.make(n)) for n in case.sizes[:2])
    assert large < 4.4 * small + 2**20


def test_a_case_that_grows_with_the_square_is_seen():
    def square(n):
        return lambda: torch.zeros(n, n)

    small, large = (allocated_bytes(square(n)) for n in (1 << 10, 1 << 12))
    assert not large < 4.4 * small + 2**20
    assert power([1, 4, 16], [3, 48, 768]) == pytest.approx(2)


def test_the_program_measures_a_case_in_a_process_of_its_own(capsys):
    case = BY_NAME["labels_of_documents"]
    found = row(case, [measured_apart(case, MILLION), measured(case, 4 * MILLION)])
    assert found["largest"] == 4 * MILLION and float(found["seconds"]) > 0
    assert 0.5 < float(found["memory_power"]) < 1.5
    with pytest.raises(SystemExit):
        main(["length"])
    assert "no case is called length; there are rows_of_two" in capsys.readouterr().err


def test_every_case_has_a_test():
    assert set(RIGHT) == {case.name for case in CASES}
