# SPDX-License-Identifier: BSD-3-Clause
"""PackedLayout: what it says of tokens, packing, compaction, nested dropout's calls, refusals."""

import pytest
import torch
from mask_cases import FIELDS
from torch.autograd import gradcheck

import masked_loss_ext as mle

LENGTHS = [[4, 3], [0, 2], [2, 3]]


def tensors(lengths=LENGTHS, width=2, lead=(1,), **options):
    return [[torch.randn(*lead, n, width, **options) for n in row] for row in lengths]


def test_attributes_by_hand():
    layout = mle.PackedLayout(LENGTHS, [1, 5, 2], pad_to_multiple=8)
    assert layout.padded_len == 16 and layout.total_len == 14 and layout.max_seqlen == 7
    assert layout.sample_starts == (0, 7, 9, 14) and layout.kept_lengths == ((4, 1), (0, 2), (2, 2))
    assert layout.sample_ids.tolist() == [0] * 7 + [1] * 2 + [2] * 5 + [-1] * 2
    assert layout.positions.tolist() == [*range(7), *range(2), *range(5), 0, 0]
    assert layout.segment_ids.tolist() == [0] * 4 + [1] * 5 + [0] * 2 + [1] * 3 + [-1] * 2
    assert layout.visible.int().tolist() == [1] * 5 + [0] * 2 + [1] * 6 + [0] * 3
    assert layout.cu_seqlens.tolist() == [0, 7, 9, 14] and layout.cu_seqlens.dtype == torch.int32
    assert layout.kept.tolist() == [[4, 1], [0, 2], [2, 2]]


def test_aligned_samples_by_hand():
    layout = mle.PackedLayout(LENGTHS, [1, 5, 2], align_samples=8, pad_to_multiple=1)
    assert layout.sample_starts == (0, 8, 16, 21) and layout.padded_len == 21
    assert layout.sample_ids.tolist() == [0] * 7 + [-1, 1, 1] + [-1] * 6 + [2] * 5
    assert layout.visible.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9, 16, 17, 18, 19]
    for dropped, rows in (("none", 11), ("self", 14), ("attend", 14)):
        assert layout.intervals(dropped=dropped).dense().any(1).sum() == rows, "gaps see nothing"


@pytest.mark.parametrize("length,multiple", [(128, None), (14, 1), (16, 8), (18, 9)])
def test_padded_length(length, multiple):
    assert mle.PackedLayout(LENGTHS, pad_to_multiple=multiple).padded_len == length
    assert mle.PackedLayout(LENGTHS, max_seq_len=length).padded_len == length
    assert mle.PackedLayout([[0, 0]], pad_to_multiple=multiple).padded_len == (multiple or 128)


def test_any_kind_of_lengths_and_keep_k():
    expected = mle.PackedLayout(LENGTHS, [1, 5, 2]).intervals("causal_last").dense()
    each = [[9, 1], [9, 5], [9, 2]]
    for lengths in (torch.tensor(LENGTHS), tuple(map(tuple, LENGTHS))):
        for keep_k in ([1, 5, 2], (1, 5, 2), torch.tensor([1, 5, 2]).short(), each):
            layout = mle.PackedLayout(lengths, keep_k)
            assert torch.equal(layout.intervals("causal_last").dense(), expected)
            assert layout.kept.tolist() == [[4, 1], [0, 2], [2, 2]]
    numbers = pytest.importorskip("numpy").array(LENGTHS)
    layout = mle.PackedLayout([list(row) for row in numbers], list(numbers[:, 1]))
    assert layout.segment_lengths == ((4, 3), (0, 2), (2, 3))
    assert mle.PackedLayout([5, 2]).segment_lengths == ((5,), (2,))


def test_keep_k_that_must_not_be_read():
    """A tensor subclass stands for a device: its values are used, and never looked at."""

    class Unreadable(torch.Tensor):
        def tolist(self):
            raise AssertionError("keep_k was read")

        item = __bool__ = __int__ = __index__ = tolist

    for keep_k in ([1, 5, 2], [[1, 1], [5, 5], [9, 2]]):
        known = mle.PackedLayout(LENGTHS, keep_k)
        layout = mle.PackedLayout(LENGTHS, torch.tensor(keep_k).as_subclass(Unreadable))
        assert layout.kept_lengths is None and torch.equal(layout.kept, known.kept)
        for mode in ("full", "causal", "causal_last"):
            assert torch.equal(layout.intervals(mode).dense(), known.intervals(mode).dense())
    negative = torch.tensor([-1, -7, 0]).as_subclass(Unreadable)
    layout = mle.PackedLayout(LENGTHS, negative)
    assert torch.equal(layout.kept, torch.tensor([[4, 0], [0, 0], [2, 0]]))
    assert torch.equal(layout.intervals().dense().sum(), torch.tensor(16 + 4))


def test_one_droppable_segment_is_one_interval():
    for keep_k, droppable, intervals in (([1, 1], -1, 1), ([1, 1], 0, 2), (None, -1, 1)):
        layout = mle.PackedLayout([[4, 3, 2]] * 2, keep_k, droppable=droppable)
        assert layout.intervals("causal_last").lo.shape[0] == intervals


# --- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", [None, 8])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_pack_and_unpack(lead, align):
    layout = mle.PackedLayout(LENGTHS, [1, 5, 2], align_samples=align, pad_to_multiple=8)
    samples = tensors(lead=lead)
    packed = layout.pack(samples)
    assert packed.shape == (*lead, layout.padded_len, 2)
    assert (packed[..., layout.sample_ids < 0, :] == 0).all()
    for fill in (None, 0, -1.5):
        for row, kept, sample in zip(
            layout.unpack(packed, fill=fill), layout.kept_lengths, samples, strict=True
        ):
            for back, k, tensor in zip(row, kept, sample, strict=True):
                assert torch.equal(back[..., :k, :], tensor[..., :k, :])
                dropped = tensor if fill is None else torch.full_like(tensor, fill)
                assert torch.equal(back[..., k:, :], dropped[..., k:, :])
    heads_last = layout.pack([[t.transpose(-1, -2) for t in row] for row in samples], dim=-1)
    assert torch.equal(heads_last.transpose(-1, -2), packed)


def test_dropped_nan_stays_out():
    layout = mle.PackedLayout([[2, 2]], [1], pad_to_multiple=8)
    patches, registers = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3)
    registers[1] = float("nan")
    registers.requires_grad_()
    packed = layout.pack([[patches, registers]], fill=0)
    assert packed.isfinite().all() and packed.sum() == 9
    sum(t.sum() for t in layout.unpack(packed * 2)[0]).backward()
    assert registers.grad.tolist() == [[2] * 3, [0] * 3] and (patches.grad == 2).all()


def test_packing_is_differentiable():
    layout = mle.PackedLayout([[2, 2], [1, 2]], [1, 2], pad_to_multiple=4, align_samples=4)
    samples = tensors(layout.segment_lengths, 1, (), dtype=torch.float64)
    leaves = [tensor.requires_grad_() for sample in samples for tensor in sample]

    def there_and_back(a, b, c, d):
        packed = layout.pack([[a, b], [c, d]])
        return tuple(t for row in layout.unpack(packed.sin()) for t in row)

    assert gradcheck(there_and_back, leaves)


# --- compaction ----------------------------------------------------------------------------------


def test_compact_by_hand():
    plan = mle.PackedLayout(LENGTHS, [1, 5, 2], pad_to_multiple=16).compact()
    assert plan.index.tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert plan.cu_seqlens.tolist() == [0, 5, 7, 11] and plan.max_seqlen == 5
    assert plan.layout.segment_lengths == ((4, 1), (0, 2), (2, 2))
    aligned = mle.PackedLayout(LENGTHS, [1, 5, 2]).compact(align=8, bucket=32)
    assert aligned.layout.padded_len == 32 and aligned.layout.sample_starts == (0, 8, 16, 20)
    assert aligned.index.tolist() == [
        *([0, 1, 2, 3, 4] + [-1] * 3 + [7, 8] + [-1] * 6 + [9, 10, 11, 12] + [-1] * 12)
    ]


@pytest.mark.parametrize("options", [{}, {"bucket": 32}, {"align": 8}, {"align": 4, "bucket": 8}])
@pytest.mark.parametrize("keep_k", [[1, 5, 2], [0, 0, 0], [[1, 1], [0, 0], [0, 3]], None])
def test_compact_gathers_and_scatters(keep_k, options):
    layout = mle.PackedLayout(LENGTHS, keep_k, pad_to_multiple=16)
    plan = layout.compact(**options)
    x = torch.randn(2, layout.padded_len, 3, dtype=torch.float64, requires_grad=True)
    y = plan.gather(x)
    assert y.shape == (2, plan.layout.padded_len, 3)
    at = plan.index.clamp_min(0)
    real = plan.index >= 0
    assert torch.equal(y[:, real], x[:, at[real]]) and (y[:, ~real] == 0).all()
    assert real.sum() == layout.visible.sum()
    assert torch.equal(real, plan.layout.sample_ids >= 0)
    for fill in (0, 7.5):
        expected = torch.where(layout.visible.unsqueeze(-1), x, fill)
        assert torch.equal(plan.scatter(y, fill), expected)
    assert torch.equal(plan.gather(layout.sample_ids, dim=0)[real], plan.layout.sample_ids[real])
    assert gradcheck(lambda x: plan.scatter(plan.gather(x).sin()), [x])
    poisoned = torch.where(real.unsqueeze(-1), y.detach(), float("nan")).requires_grad_()
    plan.scatter(poisoned).sum().backward()
    assert torch.equal(poisoned.grad, real.unsqueeze(-1).expand_as(y).double())


@pytest.mark.parametrize("mode", ["full", "causal", "causal_last"])
def test_masking_and_compacting_are_the_same_attention(mode):
    layout = mle.PackedLayout([[9, 7], [3, 6]], [2, 5], pad_to_multiple=32)
    x = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)

    def attend(x, layout):
        mask = layout.intervals(mode).dense()
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, mask)

    masked = torch.where(layout.visible.unsqueeze(-1), attend(x, layout), 0)
    plan = layout.compact(align=8)
    compact = plan.scatter(attend(plan.gather(x), plan.layout))
    torch.testing.assert_close(compact, masked)
    one, other = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (masked, compact))
    torch.testing.assert_close(one, other)
    assert (other[:, ~layout.visible] == 0).all()


# --- one-call forms ------------------------------------------------------------------------------


def test_one_call_is_the_layout_s():
    lengths, keep_k = [[100, 60], [90, 33]], torch.tensor([7, 60])
    for mode in ("full", "causal", "causal_last"):
        ours = mle.nested_dropout_block_mask(lengths, keep_k, mode, 64)
        theirs = mle.PackedLayout(lengths, keep_k, pad_to_multiple=64).intervals(mode).block_mask()
        for field in FIELDS:
            assert torch.equal(getattr(ours, field), getattr(theirs, field))
    assert mle.nested_dropout_block_mask(lengths, keep_k).shape == (1, 1, 384, 384)
    small = mle.nested_dropout_block_mask(lengths, keep_k, max_seq_len=300, block_size=(32, 64))
    assert small.shape == (1, 1, 300, 300) and small.BLOCK_SIZE == (32, 64)


def test_the_known_picture():
    """One image of 1024 patches and 256 registers, 64 of them kept: (1024 + 64)^2 pairs."""
    stats = mle.PackedLayout([[1024, 256]], [64]).intervals().stats()
    assert (stats.pairs, stats.full_blocks, stats.partial_blocks) == (1088**2, 64, 17)
    assert stats.empty_blocks == 100 - 64 - 17 and stats.empty_rows == 256 - 64
    everything = mle.PackedLayout([[1024, 256]], [256]).intervals().stats()
    assert everything.full_blocks == 100 and everything.density == 1


# --- devices and tracing -------------------------------------------------------------------------


def test_devices_and_fake_tensors():
    fake = pytest.importorskip("torch._subclasses").FakeTensorMode
    with fake():
        for keep_k in (torch.tensor([1]), [1], None):
            block_mask = mle.nested_dropout_block_mask([[400, 3]], keep_k)
            assert block_mask.full_kv_indices.shape == (1, 1, 4, 4)
    with torch.device("meta"):
        assert mle.PackedLayout([[4, 3]], [1]).block_mask().kv_indices.is_meta
        on_cpu = mle.PackedLayout([[4, 3]], [1], device="cpu")
        assert on_cpu.block_mask().kv_indices.device.type == "cpu"
    keep_k = torch.ones(1, dtype=torch.int64, device="meta")  # cannot be read at all
    layout = mle.PackedLayout([[400, 3]], keep_k)
    assert layout.block_mask("causal_last").kv_indices.shape == (1, 1, 4, 4)
    assert layout.visible.is_meta and layout.kept.is_meta and "on the device" in repr(layout)
    assert mle.sample_keep_k(keep_k, 1, "uniform_pow2").is_meta


def test_layouts_can_be_copied_and_sent():
    import copy
    import pickle

    layout = mle.PackedLayout(LENGTHS, [1, 5, 2])
    expected = layout.intervals("causal_last")
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert repr(other) == repr(layout)
        assert torch.equal(other.intervals("causal_last").lo, expected.lo)
    sent = pickle.loads(pickle.dumps(expected))
    assert torch.equal(sent.dense(), expected.dense())


def test_too_many_segments_to_drop_from():
    assert mle.PackedLayout([[1] * 8], [[1] * 8]).intervals().dense().sum() == 64
    assert mle.PackedLayout([[1] * 12], [1]).intervals().lo.shape[0] == 1
    with pytest.raises(ValueError, match="kept must have at most 8 segments per sample"):
        mle.PackedLayout([[1] * 9], [[1] * 9]).intervals()
