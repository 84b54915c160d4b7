# SPDX-License-Identifier: BSD-3-Clause
"""The usage guide of the unified loss: troubleshooting, migration, performance tips."""

import pytest
import torch
from usage_models import HIDDEN, VOCABULARY, check_trains, example_names


@pytest.fixture
def names():
    return example_names()


# --- troubleshooting -----------------------------------------------------------------------------


def test_hidden_size_required():
    from masked_loss_ext.unified import UnifiedLoss

    with pytest.raises(ValueError, match="hidden_size required for multi-token prediction"):
        UnifiedLoss(vocab_size=50257, use_mtp=True)
    loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, use_mtp=True)
    assert loss_fn.mtp_loss.projections[0].weight.shape == (50257, 768)


def test_mtp_loss_is_not_computed(names):
    from masked_loss_ext.unified import UnifiedLoss

    targets, outputs = names.targets, names.model(names.input_ids, output_hidden_states=True)
    logits = outputs.logits
    loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, use_mtp=True, num_future_tokens=1)
    with pytest.warns(UserWarning, match="pass hidden_states"):
        without = loss_fn(logits, targets, return_detailed=True)
    assert "hidden_states" in without["mtp_warning"] and "mtp_loss" not in without
    loss = loss_fn(logits, targets, hidden_states=outputs.hidden_states[-1])
    assert loss > without["total_loss"]


def test_moe_balancing_is_not_working(names):
    from masked_loss_ext.unified import UnifiedLoss

    targets, outputs = names.targets, names.model(names.input_ids, return_expert_outputs=True)
    logits = outputs.logits
    loss_fn = UnifiedLoss(vocab_size=50257, num_experts=8, use_moe_balancing=True)
    with pytest.raises(ValueError, match="gate_logits must be passed"):
        loss_fn(logits, targets)
    with pytest.raises(ValueError, match="expert_indices must be passed"):
        loss_fn(logits, targets, gate_logits=outputs.gate_logits)
    loss = loss_fn(
        logits, targets, gate_logits=outputs.gate_logits, expert_indices=outputs.expert_indices
    )
    loss.backward()
    assert loss.isfinite() and loss_fn.get_loss_statistics()["moe_balancing"]["total_tokens"] > 0


# --- migration -----------------------------------------------------------------------------------


def test_migration_from_deepseek_loss(names):
    vocab_size, hidden_size = VOCABULARY, HIDDEN
    from masked_loss_ext.unified import DeepSeekLoss

    loss_fn = DeepSeekLoss(vocab_size, hidden_size)
    outputs = names.model(names.input_ids, output_hidden_states=True)
    old = loss_fn(outputs.logits, names.targets, outputs.hidden_states[-1], names.attention_mask)

    from masked_loss_ext.unified import UnifiedLoss

    loss_fn = UnifiedLoss(vocab_size, hidden_size, primary_loss_type="deepseek")
    new = loss_fn(outputs.logits, names.targets, names.attention_mask, return_detailed=True)
    torch.testing.assert_close(new["main_loss"], old["main_loss"])


def test_migration_from_adaptive_mtp_loss(names):
    vocab_size, hidden_size = VOCABULARY, HIDDEN
    from masked_loss_ext.unified import AdaptiveMTPLoss

    loss_fn = AdaptiveMTPLoss(vocab_size)
    logits = names.model(names.input_ids)
    old = loss_fn(logits, names.targets, attention_mask=names.attention_mask)

    from masked_loss_ext.unified import UnifiedLoss

    loss_fn = UnifiedLoss(vocab_size, hidden_size, primary_loss_type="adaptive_mtp")
    new = loss_fn(logits, names.targets, names.attention_mask, return_detailed=True)
    rows = names.attention_mask.bool()
    plain = torch.nn.functional.cross_entropy(logits[rows], names.targets[rows])
    torch.testing.assert_close(old["loss"], plain)
    assert new["main_loss"] > old["loss"]  # smoothed by 0.1, the default here and not there


def test_migration_from_anti_repetition_loss(names):
    vocab_size = VOCABULARY
    eos_token_id, pad_token_id = names.tokenizer.eos_token_id, names.tokenizer.pad_token_id
    from masked_loss_ext.unified import AntiRepetitionLoss

    loss_fn = AntiRepetitionLoss(vocab_size, eos_token_id, pad_token_id)
    logits = names.model(names.input_ids)
    old, components = loss_fn(logits, names.targets, names.attention_mask, True)
    assert old.isfinite() and "base_loss" in components

    from masked_loss_ext.unified import UnifiedLoss

    loss_fn = UnifiedLoss(
        vocab_size,
        primary_loss_type="standard",
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    early = names.targets.clone()
    early[0, 1] = eos_token_id  # punished with "standard", too
    without = UnifiedLoss(vocab_size, primary_loss_type="standard")
    penalty = loss_fn(logits, early, names.attention_mask, return_detailed=True)["main_loss"]
    penalty = (
        penalty - without(logits, early, names.attention_mask, return_detailed=True)["main_loss"]
    )
    torch.testing.assert_close(penalty, torch.tensor(0.05 / 10), atol=1e-5, rtol=0)


# --- performance tips ----------------------------------------------------------------------------


def test_mixed_precision_and_gradient_accumulation(names):
    from masked_loss_ext.unified import UnifiedLoss

    loss_fn = UnifiedLoss(vocab_size=50257, primary_loss_type="deepseek")
    with torch.autocast("cpu", torch.bfloat16):
        logits = names.model(names.input_ids)
        assert logits.dtype == torch.bfloat16
        for last in (False, False, True):
            loss = loss_fn(logits, names.targets, names.attention_mask, update_state=last)
            (loss / 3).backward(retain_graph=not last)
    assert loss.dtype == torch.float32 and loss_fn.main_loss.history_size == 1
    check_trains(loss, names.model)
