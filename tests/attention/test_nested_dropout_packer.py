# SPDX-License-Identifier: BSD-3-Clause
"""Packer and unpacker: sequence, mask, shapes, and the way back."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import masked_loss_ext as mle

KEYS = (["p", "r"], "packed", "mask", "inner", "outer")
MODES = ["full", "causal", "causal_last"]


def packer(**options):
    if "max_seq_len" not in options and "allow_ragged" not in options:
        options.setdefault("pad_to_multiple", 128)
    return mle.NestedDropoutSequencePacker(*KEYS, **options)


def batch(patches=((4, 6), (3, 3), (5,)), registers=(7, 8, 9), width=4, **entries):
    return {
        "p": [torch.randn(1, *shape, width) for shape in patches],
        "r": [torch.randn(1, n, width) for n in registers],
    } | entries


def tokens(lengths, keep_k, size):
    """(sample, position, is register, visible) of each token, None in padding: one at a time."""
    rows = []
    for i, (n, m) in enumerate(lengths):
        k = keep_k[i] if keep_k is not None and i < len(keep_k) else m
        rows += [SimpleNamespace(s=i, p=t, last=t >= n, on=t < n + k) for t in range(n + m)]
    return rows + [SimpleNamespace(s=-1, p=0, last=False, on=False)] * (size - len(rows))


def expected_mask(lengths, keep_k, size, mode):
    def allowed(q, k):
        if q.s != k.s or not q.on or not k.on:
            return False
        if mode == "full" or k.p <= q.p:
            return True
        return mode == "causal_last" and not k.last

    rows = tokens(lengths, keep_k, size)
    return torch.tensor([[allowed(q, k) for k in rows] for q in rows])


# --- the mask ------------------------------------------------------------------------------------


def test_mask_by_hand():
    """Two patches, three registers of which two stay; one patch, one register."""
    data_dict = batch(((2,), (1,)), (3, 1), nested_dropout_keep_k=[2, 1])
    masks = {}
    for mode in MODES:
        pack = packer(mask_mode=mode, return_materialized_mask=True, max_seq_len=128)
        masks[mode] = pack(dict(data_dict))["mask"]
        assert masks[mode].shape == (1, 1, 128, 128) and masks[mode].dtype == torch.bool
        assert not masks[mode][..., 7:, :].any() and not masks[mode][..., 7:].any()
        masks[mode] = ["".join("x" if x else "." for x in row[:7]) for row in masks[mode][0, 0, :7]]
    none, last = ".......", [".....xx", ".....xx"]
    assert masks["full"] == ["xxxx..."] * 4 + [none] + last
    last = [".....x.", ".....xx"]
    assert masks["causal"] == ["x......", "xx.....", "xxx....", "xxxx...", none] + last
    assert masks["causal_last"] == ["xx.....", "xx.....", "xxx....", "xxxx...", none] + last


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "keep_k",
    [
        None,
        [0, 8, 3],
        [2, 99, 1],
        [4],
        torch.tensor([5, 0, 9]),
        torch.tensor([3], dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_mask(samples, keep_k, mode):
    if keep_k is not None:
        keep_k = keep_k[:samples]
    data_dict = batch(registers=(7, 8, 9)[:samples], patches=((4, 6), (3, 3), (5,))[:samples])
    data_dict["nested_dropout_keep_k"] = keep_k
    lengths = [(24, 7), (9, 8), (5, 9)][:samples]
    found = packer(mask_mode=mode, return_materialized_mask=True)(dict(data_dict))["mask"]
    assert torch.equal(found[0, 0], expected_mask(lengths, keep_k, 128, mode))


@pytest.mark.parametrize("mode", MODES)
def test_block_mask_is_that_of_create_block_mask(mode):
    lengths, keep_k = [(256, 64), (200, 64), (130, 64)], [64, 10, 0]
    data_dict = batch(((16, 16), (10, 20), (130,)), (64, 64, 64), nested_dropout_keep_k=keep_k)
    data_dict = packer(mask_mode=mode)(data_dict)
    found, size = data_dict["mask"], data_dict["packed"].shape[1]
    assert isinstance(found, BlockMask) and size == 896
    dense = expected_mask(lengths, keep_k, size, mode)
    expected = create_block_mask(
        lambda b, h, q, k: dense[q, k], None, None, size, size, device="cpu"
    )
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    rows, columns = torch.arange(size)[:, None], torch.arange(size)
    assert torch.equal(found.mask_mod(0, 0, rows, columns), dense)


def test_the_drawn_picture_1024_patches_and_256_registers():
    data_dict = batch(((32, 32),), (256,), nested_dropout_keep_k=[64])
    mask = packer()(data_dict)["mask"]
    assert mask.full_kv_num_blocks.sum() == 64 and mask.kv_num_blocks.sum() == 17
    rows, columns = torch.arange(1280)[:, None], torch.arange(1280)
    assert mask.mask_mod(0, 0, rows, columns).sum() == 1_183_744


@pytest.mark.parametrize("mode", MODES)
def test_attention_gives_exact_zeros_and_keeps_nan_out(mode):
    data_dict = batch(nested_dropout_keep_k=[2, 8, 0])
    clean = packer(mask_mode=mode)(dict(data_dict))
    poisoned = [x.clone() for x in data_dict["r"]]
    for x, k in zip(poisoned, (2, 8, 0), strict=True):
        x[:, k:] = float("nan")
    found = packer(mask_mode=mode)(data_dict | {"r": poisoned})
    assert torch.equal(found["packed"], clean["packed"])
    x = found["packed"].unsqueeze(1)
    out = flex_attention(x, x, x, block_mask=found["mask"])[0, 0]
    dense = expected_mask([(24, 7), (9, 8), (5, 9)], [2, 8, 0], 128, mode)
    torch.testing.assert_close(
        out, torch.nn.functional.scaled_dot_product_attention(x, x, x, dense)[0, 0]
    )
    assert (out[~dense.any(1)] == 0).all() and out[dense.any(1)].abs().sum(-1).min() > 0


@pytest.mark.parametrize("mode", MODES)
def test_keep_k_on_a_device_is_never_read(mode):
    """Fake tensors have no values: reading one raises."""
    evaluation = mle.AttentionMaskedNestedDropout("r").eval()
    pipeline = torch.nn.Sequential(evaluation, packer(mask_mode=mode), unpacker())
    with FakeTensorMode(allow_non_fake_inputs=True):
        keep_k = torch.tensor([1, 2]) + 0  # the third sample keeps all
        data_dict = pipeline(batch(eval_keep_k=keep_k))
        with pytest.raises(Exception, match="local_scalar|item"):
            int(keep_k[0])
    assert data_dict["mask"].kv_indices.shape == (1, 1, 1, 1)
    assert data_dict["r2"][2].shape == (1, 9, 4)


# --- sequence, shapes, embeddings ----------------------------------------------------------------


@pytest.mark.parametrize("zero_masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sequence_and_shapes(dtype, zero_masked):
    given = batch(nested_dropout_keep_k=[2, 99, 0], other="kept")
    given |= {key: [x.to(dtype) for x in given[key]] for key in ("p", "r")}
    data_dict = packer(zero_masked=zero_masked)(given)
    assert data_dict is given and data_dict["other"] == "kept"
    expected = []
    for x, y, k in zip(given["p"], given["r"], (2, 99, 0), strict=True):
        y = y.clone()
        if zero_masked:
            y[:, k:] = 0
        expected += [x.reshape(-1, 4), y[0]]
    packed = data_dict["packed"]
    assert packed.dtype == dtype and packed.shape == (1, 128, 4)
    assert torch.equal(packed[0, :62], torch.cat(expected)) and (packed[0, 62:] == 0).all()
    assert data_dict["inner"] == [
        [torch.Size([4, 6]), torch.Size([7])],
        [torch.Size([3, 3]), torch.Size([8])],
        [torch.Size([5]), torch.Size([9])],
    ]
    assert data_dict["outer"] == [torch.Size([31]), torch.Size([17]), torch.Size([14])]


def test_gradient_is_0_where_dropped():
    data_dict = batch(nested_dropout_keep_k=[2, 8, 0])
    leaves = [x.requires_grad_() for x in data_dict["p"] + data_dict["r"]]
    (packer()(data_dict)["packed"] + 1).square().sum().backward()
    assert all(x.grad.abs().min() > 0 for x in leaves[:3])
    for x, k in zip(leaves[3:], (2, 8, 0), strict=True):
        assert (x.grad[:, k:] == 0).all() and (x.grad[:, :k] != 0).all()


def test_lengths():
    assert packer(pad_to_multiple=256)(batch())["packed"].shape[1] == 256
    assert packer(max_seq_len=384)(batch())["packed"].shape[1] == 384
    ragged = packer(allow_ragged=True)(batch())
    assert ragged["packed"].shape[1] == 62 and ragged["mask"].seq_lengths == (62, 62)
    assert packer(allow_ragged=True, max_seq_len=70)(batch())["packed"].shape[1] == 70


@pytest.mark.parametrize("per_subseq", [False, True])
def test_embeddings(per_subseq):
    pack = packer(emb_packing_fn_write_key="emb", per_subseq_embs=per_subseq)
    function = pickle.loads(pickle.dumps(pack(batch())["emb"]))
    emb = torch.arange(12.0).reshape(3, 4).requires_grad_()
    rows, counts = emb, [31, 17, 14]
    if per_subseq:
        rows = torch.stack([emb[s, 2 * j : 2 * j + 2] for s in range(3) for j in range(2)])
        counts = [24, 7, 9, 8, 5, 9]
    packed = function(emb)
    assert torch.equal(packed[0], rows.repeat_interleave(torch.tensor(counts), 0))
    packed.sum().backward()
    assert (emb.grad > 0).all()
    with pytest.raises(ValueError, match="one row per sample, 3, got"):
        function(emb[:2])
    if per_subseq:
        with pytest.raises(ValueError, match="2 chunks of equal width"):
            function(emb[:, :3])


# --- and back ------------------------------------------------------------------------------------


def unpacker(**options):
    return mle.SequenceUnpacker("packed", ["p2", "r2"], "inner", "outer", **options)


@pytest.mark.parametrize("keep_k", [None, [2, 99, 0], [2], torch.tensor([2, 8, 0])])
@pytest.mark.parametrize("drop", [False, True])
def test_round_trip(drop, keep_k):
    data_dict = batch(nested_dropout_keep_k=keep_k)
    data_dict = unpacker()(packer(drop_masked=drop)(data_dict))
    kept = [7, 8, 9] if keep_k is None else [*torch.as_tensor(keep_k).tolist(), 8, 9][:3]
    for x, y in zip(data_dict["p"], data_dict["p2"], strict=True):
        assert torch.equal(x, y)
    for x, y, k in zip(data_dict["r"], data_dict["r2"], kept, strict=True):
        assert torch.equal(x[:, :k], y[:, :k]) and (y[:, k:] == 0).all() and x.shape == y.shape
    if drop:
        kept = [min(k, n) for k, n in zip(kept, (7, 8, 9), strict=True)]
        sizes = [torch.Size([n + k]) for n, k in zip((24, 9, 5), kept, strict=True)]
        assert data_dict["outer"] == sizes


@pytest.mark.parametrize("mode", MODES)
def test_dropped_or_masked_gives_the_same(mode):
    data_dict = batch(nested_dropout_keep_k=[2, 0, 5])
    results = []
    for drop in (False, True):
        found = packer(mask_mode=mode, drop_masked=drop)(dict(data_dict))
        x = found["packed"].unsqueeze(1)
        found["packed"] = flex_attention(x, x, x, block_mask=found["mask"])[0]
        results.append(unpacker()(found))
    for key in ("p2", "r2"):
        for x, y in zip(results[0][key], results[1][key], strict=True):
            torch.testing.assert_close(x, y)


def test_unpacker_drops_what_is_left_of_dropped_tokens():
    data_dict = packer()(batch(nested_dropout_keep_k=[2, 8, 0]))
    data_dict["packed"] = (data_dict["packed"] + float("nan")).requires_grad_()
    found = unpacker(keep_k_read_key="nested_dropout_keep_k")(data_dict)
    for x, k in zip(found["r2"], (2, 8, 0), strict=True):
        assert x[:, :k].isnan().all() and (x[:, k:] == 0).all()
    sum(x.sum() for x in found["r2"]).backward()
    assert data_dict["packed"].grad.sum() == 4 * (2 + 8 + 0)
