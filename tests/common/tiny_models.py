# SPDX-License-Identifier: BSD-3-Clause
"""Tiny language models with random weights, rows of unequal length, the real Trainer."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    __version__,
)

from masked_loss_ext.integrations.transformers import MaskLabels, causal_lm_loss  # noqa: E402

VOCABULARY = 61
PAD = 0
LENGTHS = (12, 3, 7, 2, 9, 4, 11, 5)  # sums of halves and quarters differ, and none is a mean
PREDICTED = sum(LENGTHS) - len(LENGTHS)  # tokens; nothing predicts the first of a row
LEARNING_RATE = 0.5

# Of a number that has been float32, as the Trainer's sum and its counts are.
EXACT = dict(rtol=1e-6, atol=0)
# Of its own log: version 4 rounds that to four digits.
LOGGED = dict(rtol=1e-6, atol=0 if int(__version__.split(".")[0]) > 4 else 5.1e-5)


# What all configurations of the kind of Llama have.
DECODER = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
)  # fmt: skip
IDS = dict(pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
# name: what transformers calls it, and in what it differs from a tiny Llama
DECODERS = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "gemma2": ("Gemma2", dict(**IDS, head_dim=8, final_logit_softcapping=0.5)),
    "cohere": ("Cohere", dict(**IDS, logit_scale=0.3)),
    "granite": ("Granite", dict(**IDS, logits_scaling=3.0)),
    "mixtral": ("Mixtral", EXPERTS),
    "phi": ("Phi", dict(resid_pdrop=0.0)),  # its head has a bias
}


def make_model(name, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(1)
    if name == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return GPT2LMHeadModel(config).to(dtype)
    if name == "bert":
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, max_position_embeddings=16, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )  # fmt: skip
        return BertForMaskedLM(config).to(dtype)
    if name == "t5":
        config = T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
            dropout_rate=dropout, decoder_start_token_id=PAD, pad_token_id=PAD,
        )  # fmt: skip
        return T5ForConditionalGeneration(config).to(dtype)
    family, more = DECODERS[name]
    config = getattr(transformers, f"{family}Config")(**DECODER, attention_dropout=dropout, **more)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def make_rows(lengths=LENGTHS):
    g = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=g)} for n in lengths]


class Collator:
    """As users write them: pads, makes the mask, copies input_ids to labels, padding and all."""

    def __init__(self, side="right", garbage=False):
        self.side, self.garbage = side, garbage

    def __call__(self, rows):
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), PAD)
        mask = torch.zeros_like(ids)
        if self.garbage:
            g = torch.Generator().manual_seed(sum(len(row["input_ids"]) for row in rows))
            ids = torch.randint(0, VOCABULARY, ids.shape, generator=g)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            place = slice(n) if self.side == "right" else slice(longest - n, None)
            ids[i, place], mask[i, place] = row["input_ids"], 1
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


class InOrder(Trainer):
    """The rows in their order."""

    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def make_trainer(model, directory, *, rows=None, batch=8, accumulate=1, steps=1, **options):
    arguments = dict(
        output_dir=str(directory),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,  # clipping would hide a gradient of the wrong size
        optim="sgd",  # an update is the gradient times a constant
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    for name in [n for n in options if n in TrainingArguments.__dataclass_fields__]:
        arguments[name] = options.pop(name)
    return InOrder(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=make_rows() if rows is None else rows,
        **options,
    )


def train(model, directory, **options):
    """The trainer, after it has trained on causal_lm_loss with the mask in the labels."""
    options = dict(data_collator=MaskLabels(Collator()), compute_loss_func=causal_lm_loss) | options
    trainer = make_trainer(model, directory, **options)
    trainer.train()
    return trainer


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def token_losses(model, rows):
    """Cross entropy of all predicted tokens, each row by itself: there is no padding."""
    parts = []
    for row in rows:
        logits = model(input_ids=row["input_ids"][None]).logits[0, :-1]
        parts.append(F.cross_entropy(logits, row["input_ids"][1:], reduction="none"))
    return torch.cat(parts)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained_by_hand(name, rows):
    """Loss and weights after one step on the mean over all tokens; no batch, so no padding."""
    model = make_model(name)
    loss = token_losses(model, rows).mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LEARNING_RATE * p.grad
    return loss.item(), weights(model)
