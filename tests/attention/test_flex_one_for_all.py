# SPDX-License-Identifier: BSD-3-Clause
"""Masks with a batch dimension of 1 serve any batch, in every form that a mask has and every
backend; and masks of all sources can be made and used inside one compiled function."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import masked_loss_ext as mle
from masked_loss_ext.reference import attention

pytestmark = pytest.mark.slow

I = mle.RowIntervals  # noqa: E741
S, B = 200, 3
CAUSAL = torch.arange(S) <= torch.arange(S).unsqueeze(1)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(batch, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, S, 16, generator=g).to(dtype) for _ in range(3)]


def truth(query, key, value, dense):
    """Softmax by definition, in float64; a row that sees nothing is 0."""
    query, key, value = (x.double() for x in (query, key, value))
    scores = (query @ key.mT / 4).masked_fill(~dense, -torch.inf)
    return scores.softmax(-1).nan_to_num(0) @ value


DOCUMENTS = torch.arange(S) // 70  # 70, 70, 60
VALID = torch.arange(S) >= 33


def of_batch_1():
    """Name -> intervals with a batch dimension of 1, and their dense mask by definition."""
    same = DOCUMENTS.unsqueeze(1) == DOCUMENTS
    positions = torch.arange(S) - DOCUMENTS * 70
    padded = VALID.unsqueeze(1) & VALID
    near = torch.arange(S).unsqueeze(1) - torch.arange(S) <= 20
    return {
        "document_ids": (I.from_document_ids(DOCUMENTS[None]), same),
        "position_ids": (I.from_position_ids(positions[None]), same),
        "padding": (I.from_padding(VALID[None]), padded),
        "lengths": (I.from_padding([S - 33], S, side="left"), padded),
        "causal": (I.causal(S, offset=torch.tensor([0])), CAUSAL),
        "prefix": (I.prefix_lm(S, torch.tensor([40])), CAUSAL | (torch.arange(S) < 40)),
        "and": (I.from_document_ids(DOCUMENTS[None]) & I.causal(S), same & CAUSAL),
        "or": (
            I.from_document_ids(DOCUMENTS[None]) | I.sliding_window(S, (20, 0)),
            same | (near & CAUSAL),
        ),
    }


@pytest.mark.parametrize("name", of_batch_1())
def test_every_form_of_a_mask_of_batch_1(name):
    mask, dense = of_batch_1()[name]
    assert mask.lo.shape[0] == 1 and mask.lo.dim() == 3
    inputs = qkv(B)
    expected = truth(*inputs, dense)
    block_mask = mask.block_mask()
    close = dict(rtol=0, atol=3e-6)
    found = flex_attention(*inputs, block_mask=block_mask)
    torch.testing.assert_close(found.double(), expected, **close)
    b, q, kv = torch.meshgrid(torch.arange(B), torch.arange(S), torch.arange(S), indexing="ij")
    assert torch.equal(mask.mask_mod()(b, 0, q, kv), dense.expand(B, -1, -1))
    assert torch.equal(mask.dense().expand(B, 1, S, S)[:, 0], dense.expand(B, -1, -1))
    lists = attention.block_lists(dense[None], 128, 128)
    assert torch.equal(block_mask.kv_indices, lists[1])
    assert torch.equal(block_mask.full_kv_num_blocks, lists[2])
    for backend in ("flex", "sdpa", "auto"):
        found = mle.packed_attention(*inputs, mask, backend=backend)
        torch.testing.assert_close(found.double(), expected, **close)


def test_gradients_through_a_mask_of_batch_1():
    mask, dense = of_batch_1()["and"]
    inputs = [x.requires_grad_() for x in qkv(B, torch.float64)]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    mle.packed_attention(*inputs, mask).sin().sum().backward()
    truth(*twins, dense).sin().sum().backward()
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_batches_of_1_and_of_several_combine():
    one, dense = of_batch_1()["and"]
    several = I.from_padding([200, 20, 150], S)
    t = torch.arange(S)
    real = torch.stack([(t < n).unsqueeze(1) & (t < n) for n in (200, 20, 150)])
    for ours in (one & several, several & one):
        assert torch.equal(ours.dense()[:, 0], real & dense)
    for ours in (one | several, several | one):
        assert torch.equal(ours.dense()[:, 0], real | dense)


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_a_mask_of_batch_1_compiled(backend, fresh_dynamo):
    def step(query, key, value, ids):
        mask = I.from_document_ids(ids) & I.causal(S)
        return mle.packed_attention(query, key, value, mask, backend=backend)

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    inputs = qkv(B)
    for cut in (50, 131):
        ids = (torch.arange(S) >= cut).long()
        dense = (ids == ids.unsqueeze(1)) & CAUSAL
        found = compiled(*inputs, ids[None])
        torch.testing.assert_close(found.double(), truth(*inputs, dense), rtol=0, atol=3e-6)
    assert counter.frame_count == 1


# --- made and used in one compiled function ------------------------------------------------------

# Each by itself, as a user would compile it; what inductor cannot take is a buffer that it has
# computed, captured by the mask_mod.
SOURCES = {
    "document_ids & causal": lambda ids: I.from_document_ids(ids) & I.causal(S),
    "position_ids": lambda ids: I.from_position_ids(torch.arange(S) - ids * 70),
    "window | sinks": lambda ids: (
        I.causal(S) & (I.sliding_window(S, (20, 0)) | I.sinks(S, 4)) & I.from_document_ids(ids)
    ),
    "shared_prefix": lambda ids: I.shared_prefix(50, [100, 50]),
    "cross": lambda ids: I.cross([100, 100], [90, 110], ids[-2:] * 30),
    "block_diffusion | documents": lambda ids: (
        I.block_diffusion(S // 2, 20) | I.from_document_ids(ids)
    ),
    "batch": lambda ids: I.from_document_ids(torch.stack([ids, ids.flip(0), ids * 0])),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_mask_made_inside(name, fresh_dynamo):
    make = SOURCES[name]

    def step(query, key, value, ids):
        return flex_attention(query, key, value, block_mask=make(ids).block_mask())

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    inputs = qkv(B)
    for ids in (DOCUMENTS, DOCUMENTS.flip(0).contiguous()):
        mask = make(ids)
        dense = attention.interval_mask(mask.lo, mask.hi, S)
        dense = dense.unsqueeze(1) if dense.dim() == 3 else dense
        found = compiled(*inputs, ids)
        torch.testing.assert_close(found.double(), truth(*inputs, dense), rtol=0, atol=3e-6)
    assert counter.frame_count == 1


def test_the_rule_of_nested_dropout_ids_inside(fresh_dynamo):
    """Its mask_mod beside lists from elsewhere: create_block_mask itself fails in such a graph."""
    block_mask = mle.nested_dropout_block_mask([[150, 50]], [20], max_seq_len=S)

    def step(query, key, value, keep_k):
        mask_mod, _ = mle.generate_nested_dropout_attention_mask([150, 50], keep_k)
        block_mask.mask_mod = mask_mod
        return flex_attention(query, key, value, block_mask=block_mask)

    keep_k = torch.tensor([20])
    seen = torch.arange(S) < 170
    inputs = qkv(1)
    found = torch.compile(step, fullgraph=True)(*inputs, keep_k)
    expected = truth(*inputs, seen.unsqueeze(1) & seen)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=3e-6)
