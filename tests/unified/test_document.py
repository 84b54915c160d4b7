# SPDX-License-Identifier: BSD-3-Clause
"""The usage guide of the unified loss, example by example, as users have it in their code.

Only the module that the names come from differs. Where the guide calls a model there is a small
one; its vocabulary is the guide's.
"""

import pytest
import torch
from usage_models import VOCABULARY, check_trains, example_names


@pytest.fixture
def names():
    return example_names()


def test_basic_usage(names):
    from masked_loss_ext.unified import UnifiedLoss

    model, targets, attention_mask = names.model, names.targets, names.attention_mask
    loss_fn = UnifiedLoss(vocab_size=50257, primary_loss_type="standard")
    logits = model(names.input_ids, attention_mask=attention_mask)
    loss = loss_fn(logits, targets, attention_mask=attention_mask)
    loss.backward()
    check_trains(loss, model)


def test_deepseek_style_loss(names):
    from masked_loss_ext.unified import UnifiedLoss

    model, targets, attention_mask = names.model, names.targets, names.attention_mask
    loss_fn = UnifiedLoss(
        vocab_size=50257,
        hidden_size=768,
        primary_loss_type="deepseek",
        # Temperature scaling
        initial_temperature=1.0,
        adaptive_temperature=True,
        label_smoothing=0.1,
        # Multi-token prediction
        use_mtp=True,
        num_future_tokens=3,
        mtp_weight=0.1,
        # Repetition penalties
        use_ngram_penalty=True,
        ngram_size=4,
        ngram_penalty_weight=0.1,
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=0.5,
        # EOS penalties
        eos_token_id=50256,
        pad_token_id=50256,
        min_sequence_length=20,
        eos_penalty_weight=0.05,
    )
    outputs = model(names.input_ids, attention_mask=attention_mask, output_hidden_states=True)
    logits = outputs.logits
    hidden_states = outputs.hidden_states[-1]
    loss = loss_fn(
        logits=logits, targets=targets, attention_mask=attention_mask, hidden_states=hidden_states
    )
    loss.backward()
    check_trains(loss, model)
    assert (loss_fn.mtp_loss.projections[2].weight.grad != 0).any()


def test_adaptive_mtp_loss(names):
    from masked_loss_ext.unified import UnifiedLoss

    model, targets, attention_mask = names.model, names.targets, names.attention_mask
    loss_fn = UnifiedLoss(
        vocab_size=50257,
        hidden_size=768,
        primary_loss_type="adaptive_mtp",
        # Adaptive MTP specific
        use_confidence_weighting=True,
        confidence_reg_strength=0.01,
        label_smoothing=0.1,
        # Repetition penalties
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
    )
    outputs = model(names.input_ids, attention_mask=attention_mask, return_mtp_outputs=True)
    loss = loss_fn(
        logits=outputs.primary_logits,
        targets=targets,
        attention_mask=attention_mask,
        primary_logits=outputs.primary_logits,
        additional_logits=outputs.additional_logits,
        confidence_scores=outputs.confidence_scores,
        mtp_active=outputs.mtp_active,
    )
    loss.backward()
    assert loss.isfinite() and (model.weight.grad != 0).any()
    stats = loss_fn.get_loss_statistics()
    assert stats["adaptive_mtp"]["total_computations"] == 1
    assert stats["adaptive_mtp"]["avg_additional_loss"] > 0


def moe_loss():
    from masked_loss_ext.unified import UnifiedLoss

    return UnifiedLoss(
        vocab_size=50257,
        hidden_size=768,
        primary_loss_type="deepseek",
        # MoE balancing
        num_experts=8,
        use_moe_balancing=True,
        gradient_balance_weight=0.1,
        # Advanced losses
        use_diversity_loss=True,
        diversity_weight=0.01,
        use_auxiliary_loss=True,
        load_balancing_weight=0.0001,
        router_z_weight=0.001,
    )


def moe_step(loss_fn, names, **keywords):
    outputs = names.model(
        names.input_ids, attention_mask=names.attention_mask, return_expert_outputs=True
    )
    return loss_fn(
        logits=outputs.logits,
        targets=names.targets,
        attention_mask=names.attention_mask,
        gate_logits=outputs.gate_logits,
        expert_indices=outputs.expert_indices,
        expert_outputs=outputs.expert_outputs,
        **keywords,
    )


def test_moe_model_with_load_balancing(names):
    loss_fn = moe_loss()
    loss = moe_step(loss_fn, names)
    loss.backward()
    check_trains(loss, names.model)


OPTIONS = {
    "temperature scaling": dict(
        initial_temperature=1.0, adaptive_temperature=True, label_smoothing=0.1
    ),
    "multi-token prediction": dict(
        hidden_size=768, use_mtp=True, num_future_tokens=3, mtp_weight=0.1, mtp_type="deepseek"
    ),
    "repetition penalties": dict(
        use_ngram_penalty=True,
        ngram_size=4,
        ngram_penalty_weight=0.1,
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=0.5,
        eos_token_id=50256,
        min_sequence_length=20,
        eos_penalty_weight=0.05,
    ),
    "moe balancing": dict(num_experts=8, use_moe_balancing=True, gradient_balance_weight=0.1),
    "advanced losses": dict(
        use_focal_loss=True,
        focal_alpha=1.0,
        focal_gamma=2.0,
        use_diversity_loss=True,
        diversity_weight=0.01,
        use_auxiliary_loss=True,
        load_balancing_weight=0.0001,
        router_z_weight=0.001,
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_configuration_options(name, names):
    from masked_loss_ext.unified import UnifiedLoss

    loss_fn = UnifiedLoss(vocab_size=50257, **OPTIONS[name])
    outputs = names.model(names.input_ids, everything=True)
    loss = loss_fn(
        outputs.logits,
        names.targets,
        names.attention_mask,
        outputs.hidden_states[-1],
        gate_logits=outputs.gate_logits,
        expert_indices=outputs.expert_indices,
        expert_outputs=outputs.expert_outputs,
    )
    loss.backward()
    check_trains(loss, names.model)


def test_detailed_breakdown(names, capsys):
    from masked_loss_ext.unified import UnifiedLoss

    targets, attention_mask = names.targets, names.attention_mask
    loss_fn = UnifiedLoss(vocab_size=50257)
    logits = names.model(names.input_ids, attention_mask=attention_mask)
    loss_dict = loss_fn(
        logits=logits, targets=targets, attention_mask=attention_mask, return_detailed=True
    )
    print(f"Total Loss: {loss_dict['total_loss']}")
    print(f"Main Loss: {loss_dict['main_loss']}")
    print(f"MTP Loss: {loss_dict.get('mtp_loss', 'N/A')}")
    print(f"N-gram Penalty: {loss_dict.get('ngram_penalty', 'N/A')}")
    print(f"Immediate Repetition: {loss_dict.get('immediate_repetition_penalty', 'N/A')}")
    loss_dict["total_loss"].backward()
    check_trains(loss_dict["total_loss"], names.model)
    printed = capsys.readouterr().out
    assert "MTP Loss: N/A" in printed and printed.count("N/A") == 1
    assert f"Total Loss: {loss_dict['total_loss'].item()}"[:16] in printed


def test_configuration_files():
    from masked_loss_ext.unified import create_unified_loss

    loss_config = {
        "vocab_size": 50257,
        "hidden_size": 768,
        "primary_loss_type": "deepseek",
        "use_mtp": True,
        "num_future_tokens": 3,
        "use_ngram_penalty": True,
        "eos_token_id": 50256,
        "pad_token_id": 50256,
    }
    before = dict(loss_config)
    loss_fn = create_unified_loss(loss_config)
    assert loss_fn.vocab_size == 50257 and loss_fn.use_mtp and loss_fn.use_ngram_penalty
    assert loss_config == before and loss_fn.eos_token_id == loss_fn.pad_token_id == 50256


def test_best_practices(names):
    from masked_loss_ext.unified import UnifiedLoss

    vocab_size, tokenizer, model_config = VOCABULARY, names.tokenizer, names.model_config
    standard = UnifiedLoss(
        vocab_size=vocab_size,
        primary_loss_type="deepseek",
        initial_temperature=1.0,
        adaptive_temperature=True,
        label_smoothing=0.1,
        use_ngram_penalty=True,
        use_immediate_repetition_penalty=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    moe = UnifiedLoss(
        vocab_size=vocab_size,
        hidden_size=model_config.hidden_size,
        primary_loss_type="deepseek",
        num_experts=8,
        use_moe_balancing=True,
        gradient_balance_weight=0.1,
        use_diversity_loss=True,
        use_ngram_penalty=True,
    )
    repetitive = UnifiedLoss(
        vocab_size=vocab_size,
        primary_loss_type="deepseek",
        # Stronger repetition penalties
        use_ngram_penalty=True,
        ngram_penalty_weight=0.2,  # Increased
        use_immediate_repetition_penalty=True,
        immediate_repetition_weight=1.0,  # Increased
        # EOS penalties
        eos_token_id=tokenizer.eos_token_id,
        min_sequence_length=30,
        eos_penalty_weight=0.1,  # Increased
    )
    targets = names.targets.clone()
    targets[:, 1:3] = targets[:, :1]  # a run of three: (3 - 1)^2
    names.targets = targets
    logits = names.model(names.input_ids).detach()
    weak = standard(logits, targets, names.attention_mask, return_detailed=True)
    strong = repetitive(logits, targets, names.attention_mask, return_detailed=True)
    assert weak["immediate_repetition_penalty"] == 2 and moe_step(moe, names).isfinite()
    assert strong["immediate_repetition_penalty"] == 4
    ratio = strong["ngram_penalty"] / weak["ngram_penalty"]
    torch.testing.assert_close(ratio, torch.tensor(2.0))


def test_monitoring_statistics(names, capsys):
    loss_fn = moe_loss()
    moe_step(loss_fn, names)
    stats = loss_fn.get_loss_statistics()
    print("Adaptive MTP Stats:", stats.get("adaptive_mtp"))
    print("MoE Balancing Stats:", stats.get("moe_balancing"))
    assert "Adaptive MTP Stats: None" in capsys.readouterr().out
    tokens = int(names.attention_mask.sum())
    assert stats["moe_balancing"]["total_tokens"] == pytest.approx(0.1 * tokens)
    assert sum(stats["moe_balancing"]["expert_counts"]) == pytest.approx(0.1 * 2 * tokens)
    assert isinstance(stats["moe_balancing"]["expert_scores"], list)
    loss_fn.reset_statistics()
    assert loss_fn.get_loss_statistics()["moe_balancing"]["total_tokens"] == 0


def test_before_and_after(names):
    """The old class returns a dict, whatever the guide calls it; the losses in it are equal."""
    from masked_loss_ext.unified import DeepSeekLoss, UnifiedLoss

    outputs = names.model(names.input_ids, output_hidden_states=True)
    logits, hidden_states = outputs.logits, outputs.hidden_states[-1]
    targets, attention_mask = names.targets, names.attention_mask
    loss_fn = DeepSeekLoss(vocab_size=50257, hidden_size=768)
    loss = loss_fn(logits, targets, hidden_states, attention_mask)
    old = loss
    loss_fn = UnifiedLoss(vocab_size=50257, hidden_size=768, primary_loss_type="deepseek")
    loss = loss_fn(logits, targets, attention_mask=attention_mask, hidden_states=hidden_states)
    assert loss.isfinite() and loss_fn.mtp_loss is None  # use_mtp is off by default here
    new = loss_fn(logits, targets, attention_mask=attention_mask, return_detailed=True)
    torch.testing.assert_close(old["main_loss"], new["main_loss"])
    assert list(old) == [
        "main_loss", "main_temperature", "main_label_smoothing",
        "mtp_mtp_loss", "mtp_per_token_losses", "mtp_mtp_weight", "total_loss",
    ]  # fmt: skip
