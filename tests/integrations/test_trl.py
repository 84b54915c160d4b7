# SPDX-License-Identifier: BSD-3-Clause
"""SFTTrainer and GRPOTrainer of TRL with another head: weights against sums in float64 by hand."""

import copy

import pytest
import torch
from places import place

pytestmark = pytest.mark.slow
place("transformers", "trl", "datasets")

from datasets import Dataset  # noqa: E402
from tiny_models import LEARNING_RATE, make_model, make_rows, weights  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from masked_loss_ext.integrations import trl as ours  # noqa: E402

PROMPT = 3  # tokens at the beginning of each row that are not learnt
COMMON = dict(
    learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0,
    max_steps=1, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    bf16=False, gradient_checkpointing=False,
)  # fmt: skip
ROUNDING = dict(rtol=1e-12, atol=1e-13)


# --- fine-tuning ---------------------------------------------------------------------------------


def rows():
    """Of unequal length, with a prompt that no loss counts."""
    found = []
    for row in make_rows((12, 5, 7, 4, 9, 4, 11, 5)):
        ids = row["input_ids"].tolist()
        found.append({"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]})
    return found


def tuned_by_hand(model):
    """(loss, weights) of one step on the mean over all completion tokens, row by row."""
    parts = []
    for row in rows():
        ids = torch.tensor(row["input_ids"])
        log_probs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        parts.append(-log_probs.gather(1, ids[1:, None])[PROMPT - 1 :, 0])
    loss = torch.cat(parts).mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LEARNING_RATE * p.grad
    return loss.item(), weights(model)


def sft_trainer(model, directory, batch=8, accumulate=1):
    arguments = SFTConfig(
        output_dir=str(directory), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, max_length=None, **COMMON,
    )  # fmt: skip
    data = Dataset.from_list(rows())
    return SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer()
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "cohere", "granite", "phi"])
def test_fine_tuning(name, tmp_path):
    loss, expected = tuned_by_hand(make_model(name))
    close = dict(rtol=0, atol=1e-8) if name in ("gemma2", "cohere") else ROUNDING  # float32 norms
    for batch, accumulate in ((8, 1), (4, 2), (1, 8)):
        model = make_model(name)
        trainer = ours.use_masked_head(sft_trainer(model, tmp_path, batch, accumulate))
        trainer.train()
        torch.testing.assert_close(weights(model), expected, **close)
        (logged,) = [x["loss"] for x in trainer.state.log_history if "loss" in x]
        assert logged == pytest.approx(loss, rel=1e-6)


def test_metrics_are_those_of_trls_own_head(tmp_path):
    logs = []
    for way in (lambda trainer: trainer, ours.use_masked_head):
        trainer = way(sft_trainer(make_model("llama", dtype=torch.float32), tmp_path, 4, 2))
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-4), name


def test_padding_and_prompt_take_part_in_no_product(tmp_path):
    """NaN hidden states there reach TRL's own gradients on the CPU, and not these."""
    trained = []
    for way in (lambda trainer: trainer, ours.use_masked_head):
        model = make_model("llama", dtype=torch.float32)
        trainer = way(sft_trainer(model, tmp_path))

        def poison(module, args, kwargs, outputs):
            on = kwargs["attention_mask"][..., None] != 0
            outputs["last_hidden_state"] = outputs["last_hidden_state"].where(on, torch.nan)
            return outputs

        model.model.register_forward_hook(poison, with_kwargs=True)
        trainer.train()
        trained.append(weights(model).isfinite().all().item())
    assert trained == [False, True]


def test_a_broken_head_is_noticed(tmp_path, monkeypatch):
    right = ours.linear_row_statistics
    monkeypatch.setattr(
        ours, "linear_row_statistics",
        lambda hidden, *args, **options: right(hidden.roll(1, 1), *args, **options),
    )  # fmt: skip
    _, expected = tuned_by_hand(make_model("llama"))
    model = make_model("llama")
    ours.use_masked_head(sft_trainer(model, tmp_path)).train()
    assert (weights(model) - expected).abs().max() > 1e-3


# --- policy gradients ----------------------------------------------------------------------------


class Watched(GRPOTrainer):
    """Keeps what each loss was made of."""

    seen = None

    def _compute_loss(self, model, inputs):
        self.seen = {**(self.seen or {}), len(self.seen or {}): inputs}
        return super()._compute_loss(model, inputs)


def reward(completions, **kwargs):
    """Of the tokens' number and names: unequal within a group."""
    return [float(len(c) % 7 + sum(map(ord, c)) % 5) for c in completions]


def grpo_trainer(directory, kind=Watched, accumulate=1, **options):
    model = make_model("llama")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2, 5, 9, 17], 0
    model.save_pretrained(directory)  # where TRL finds the reference model
    arguments = GRPOConfig(
        output_dir=str(directory), per_device_train_batch_size=8 // accumulate, num_generations=4,
        gradient_accumulation_steps=accumulate, max_completion_length=6, temperature=0.7,
        **COMMON | options,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "7 8 9"}, {"prompt": "11"}])
    model.config._name_or_path = str(directory)
    return kind(
        model=model, args=arguments, reward_funcs=reward, train_dataset=data,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def policy_loss_by_hand(model, reference, inputs, beta):
    """GRPO's loss of one batch, each sequence by itself and without padding."""
    losses = []
    for i, mask in enumerate(inputs["completion_mask"].bool()):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        completion = inputs["completion_ids"][i][mask]
        ids = torch.cat([prompt, completion])
        log_p, log_q = (
            (m(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            .gather(1, completion[:, None])[:, 0]
            for m in (model, reference)
        )  # fmt: skip
        gap = log_q.detach() - log_p
        ratio = (log_p - log_p.detach()).exp()
        # TRL weighs the divergence, too, by how much likelier the token has become.
        per_token = ratio * (beta * (gap.exp() - gap - 1) - inputs["advantages"][i])
        losses.append(per_token.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_policy_gradient(accumulate, tmp_path):
    trainer = ours.use_masked_head(
        grpo_trainer(tmp_path, accumulate=accumulate, beta=0.5, loss_type="grpo")
    )
    model = make_model("llama")
    reference = copy.deepcopy(model)
    with torch.no_grad():  # another model than the policy, or its divergence would be 0
        for p in reference.parameters():
            p.mul_(1.5)
    trainer.ref_model.double().load_state_dict(reference.state_dict())  # TRL loads it in bfloat16
    trainer.train()
    assert len(trainer.seen) == accumulate
    assert any((x["completion_mask"] == 0).any() for x in trainer.seen.values())
    assert all(x["advantages"].any() for x in trainer.seen.values())
    loss = torch.stack(
        [policy_loss_by_hand(model, reference, x, 0.5) for x in trainer.seen.values()]
    ).mean()
    loss.backward()
    expected = weights(model) - LEARNING_RATE * torch.cat(
        [p.grad.flatten() for p in model.parameters()]
    )
    assert (expected - weights(model)).abs().max() > 1e-3
    # TRL masks and averages by float32 numbers.
    torch.testing.assert_close(weights(trainer.model), expected, rtol=0, atol=1e-9)


# --- what is refused -----------------------------------------------------------------------------


def test_refusals(tmp_path):
    trainer = sft_trainer(make_model("llama"), tmp_path)
    with pytest.raises(TypeError, match="trainer must be one of SFTTrainer, .*, got object"):
        ours.use_masked_head(object())
    with pytest.raises(TypeError, match="trainer must be one of SFTTrainer, .*, got DPOTrainer"):
        ours.use_masked_head(DPOTrainer.__new__(DPOTrainer))
    with pytest.raises(ValueError, match="chunk_rows must be .*, got 0"):
        ours.use_masked_head(trainer, chunk_rows=0)
    del trainer.model.forward
    with pytest.raises(TypeError, match="model must have TRL's fused head, got LlamaForCausalLM"):
        ours.use_masked_head(trainer)
    trainer = sft_trainer(make_model("mixtral", dtype=torch.float32), tmp_path)
    with pytest.raises(ValueError, match="must have no auxiliary loss of experts"):
        ours.use_masked_head(trainer)
