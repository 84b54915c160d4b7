# SPDX-License-Identifier: BSD-3-Clause
"""The decoder's configuration as documented, by keyword, and what the pipeline refuses."""

import importlib

import pytest
import torch
import torch._dynamo.testing

import masked_loss_ext as mle

HOME = "masked_loss_ext.attention.pipeline"
CONFIG = {
    "dec_nested_dropout": {
        "_target_": f"{HOME}.AttentionMaskedNestedDropout",
        "read_key": "dec_quants",
        "keep_k_write_key": "nested_dropout_keep_k",
        "eval_keep_k_read_key": "eval_keep_k",
        "train_keep_k_write_key": "train_keep_k",
        "size_sampling_mode": "uniform",
        "block_mask_write_key": "nested_dropout_block_mask",
    },
    "dec_seq_packer": {
        "_target_": f"{HOME}.NestedDropoutSequencePacker",
        "input_list_read_keys": ["dec_patches", "dec_quants"],
        "packed_seq_write_key": "dec_packed_seq",
        "block_mask_write_key": "dec_sa_block_mask",
        "keep_k_read_key": "nested_dropout_keep_k",
        "inner_packed_shapes_write_key": "dec_ps_inner",
        "outer_packed_shapes_write_key": "dec_ps_outer",
        "mask_mode": "full",
        "pad_to_multiple": 128,
        "compile_block_mask": True,
    },
    "dec_unpacker": {
        "_target_": f"{HOME}.SequenceUnpacker",
        "packed_seq_read_key": "dec_packed_seq",
        "inner_seq_write_keys": ["dec_patches", "dec_quants"],
        "inner_packed_shapes_read_key": "dec_ps_inner",
        "outer_packed_shapes_read_key": "dec_ps_outer",
    },
}
OLD = {
    "_target_": f"{HOME}.MaskedNestedDropout",
    "read_write_key": "dec_quants",
    "dim": 16,
    "eval_keep_k_read_key": "eval_keep_k",
    "train_keep_k_write_key": "train_keep_k",
    "size_sampling_mode": "uniform",
}


def instantiate(config):
    """What hydra does with ``_target_``."""
    module, name = config["_target_"].rsplit(".", 1)
    arguments = {key: value for key, value in config.items() if key != "_target_"}
    return getattr(importlib.import_module(module), name)(**arguments)


def decoder():
    return torch.nn.Sequential(*(instantiate(config) for config in CONFIG.values()))


def inputs(**entries):
    return {
        "dec_patches": [torch.randn(1, 8, 8, 16), torch.randn(1, 4, 12, 16)],
        "dec_quants": [torch.randn(1, 32, 16), torch.randn(1, 32, 16)],
    } | entries


def visible(data_dict):
    rows = torch.arange(data_dict["dec_packed_seq"].shape[1])
    return data_dict["dec_sa_block_mask"].mask_mod(0, 0, rows, rows).tolist()


def test_configuration_by_keyword():
    data_dict = decoder()(inputs())
    first, second = data_dict["train_keep_k"]
    expected = [i < 64 + first for i in range(96)] + [i < 48 + second for i in range(80)]
    assert visible(data_dict) == expected + [False] * (256 - 176)
    assert data_dict["dec_patches"][1].shape == (1, 4, 12, 16)


@pytest.mark.parametrize("keep_k", [16, [16, 4], torch.tensor([16, 4])])
def test_configuration_in_evaluation(keep_k):
    model = decoder().eval()
    data_dict = model(inputs(eval_keep_k=keep_k))
    second = 16 if isinstance(keep_k, int) else 4
    assert visible(data_dict)[:176] == [i < 80 for i in range(96)] + [
        i < 48 + second for i in range(80)
    ]
    # a dict that training has used: nothing is dropped without eval_keep_k
    assert all(visible(model(decoder()(inputs())))[:176])


def test_old_configuration():
    data_dict = instantiate(OLD)(inputs())
    assert len(data_dict["train_keep_k"]) == 2


@pytest.mark.parametrize("mode", ["full", "causal_last"])
def test_packing_and_unpacking_in_one_compiled_graph(mode):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    pack, unpack = packer(mask_mode=mode), instantiate(CONFIG["dec_unpacker"])

    def step(data_dict):
        data_dict = pack(data_dict)
        return unpack(data_dict)["dec_quants"], data_dict["dec_sa_block_mask"].kv_num_blocks

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    given = inputs()
    for keep_k in ([3, 30], [0, 5], [32, 1]):
        data_dict = given | {"nested_dropout_keep_k": torch.tensor(keep_k)}
        found, expected = compiled(dict(data_dict)), step(dict(data_dict))
        assert all(torch.equal(x, y) for x, y in zip(found[0], expected[0], strict=True))
        assert torch.equal(found[1], expected[1])
    assert counter.frame_count == 1


# --- refused -------------------------------------------------------------------------------------


def packer(**options):
    config = {k: v for k, v in CONFIG["dec_seq_packer"].items() if k != "_target_"}
    return mle.NestedDropoutSequencePacker(**config | options)


@pytest.mark.parametrize(
    "options,match",
    [
        ({"mask_mode": "diagonal"}, "Invalid mask mode"),
        ({"mask_mode": "prefix"}, "Invalid mask mode"),
        ({"max_seq_len": 256}, "Only one of max_seq_len and pad_to_multiple"),
        ({"pad_to_multiple": 0}, "pad_to_multiple must be at least 1"),
        ({"input_list_read_keys": []}, "input_list_read_keys must hold at least one key"),
    ],
)
def test_wrong_configuration(options, match):
    with pytest.raises(ValueError, match=match):
        packer(**options)


@pytest.mark.parametrize(
    "options,entries,match",
    [
        ({}, {"nested_dropout_keep_k": [1, -1]}, "nested_dropout_keep_k must not be negative"),
        ({}, {"nested_dropout_keep_k": [1, 1, 1]}, "at most one entry per sample, 2, got 3"),
        ({}, {"dec_quants": [torch.randn(1, 32, 16)]}, "same length"),
        ({}, {"dec_quants": [], "dec_patches": []}, "at least one sample"),
        ({}, {"dec_quants": [torch.randn(1, 32, 8)] * 2}, "D = 16"),
    ],
)
def test_wrong_input(options, entries, match):
    with pytest.raises(ValueError, match=match):
        packer(**options)(inputs(**entries))


@pytest.mark.parametrize(
    "options,entries,match",
    [
        ({"pad_to_multiple": 100}, {}, "packed length must be a multiple of 128, got 200"),
        ({"pad_to_multiple": None}, {}, "packed length must be a multiple of 128, got 176"),
        (
            {"pad_to_multiple": None, "max_seq_len": 128},
            {},
            "max_seq_len must hold all 176 tokens, got 128",
        ),
        ({}, {"dec_quants": [torch.randn(2, 32, 16)] * 2}, r"dec_quants\[0\] .* dimension of 1"),
    ],
)
def test_wrong_input_that_was_an_assertion(options, entries, match):
    for error in (ValueError, AssertionError):
        with pytest.raises(error, match=match):
            packer(**options)(inputs(**entries))


@pytest.mark.parametrize(
    "entries,match",
    [
        ({"dec_packed_seq": torch.randn(1, 128, 16)}, "must hold all 176 tokens"),
        ({"dec_packed_seq": torch.randn(2, 256, 16)}, "batch dimension of 1"),
        ({"dec_packed_seq": torch.randn(256, 16)}, "3 dimensions"),
        ({"dec_ps_inner": [[torch.Size([64]), torch.Size([32])]]}, "same length, got 1 and 2"),
        ({"dec_ps_inner": [[torch.Size([96])]] * 2}, "one shape per key, 2, got 1"),
        ({"dec_ps_inner": [[torch.Size([8]), torch.Size([8])]] * 2}, "inner shapes of sample 0"),
    ],
)
def test_what_cannot_be_unpacked(entries, match):
    data_dict = packer()(inputs())
    with pytest.raises(ValueError, match=match):
        instantiate(CONFIG["dec_unpacker"])(data_dict | entries)
