#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Training with the transformers Trainer: from logits, without logits, with the padding counted.

A small Llama over the words of Python functions, the same rows each time, in accumulated
micro-batches. `causal_lm_loss` takes the logits, `logit_free` makes none; the third run is what
the same collator does without MaskLabels: labels are a copy of the words, padding and all.

python examples/trainer.py          about a minute on two cores
python examples/trainer.py --quick
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import examples_common as common
import torch
from acts.language.head import in_words, vocabulary
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import masked_loss_ext as mle
from masked_loss_ext.integrations.transformers import MaskLabels, causal_lm_loss, logit_free

WORDS, LONGEST = 8000, 128
ROWS, MICRO_BATCHES = 4, 2


def pad(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A collator as one writes it: 0 in the padding, labels a copy."""
    lengths = [len(row["input_ids"]) for row in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor(row["input_ids"])
    return {"input_ids": ids, "attention_mask": mle.lengths_to_mask(lengths), "labels": ids}


def make_model(wanted) -> LlamaForCausalLM:
    torch.manual_seed(wanted.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS, hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=3, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        )
    )  # fmt: skip


@dataclass
class Run:
    model: LlamaForCausalLM
    seconds: float  # per step
    said: float  # the loss that the Trainer says of the held-out rows


def train(wanted, rows: list[dict], others: list[dict], way: str) -> Run:
    model = make_model(wanted)
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=ROWS, max_steps=wanted.steps,
            gradient_accumulation_steps=MICRO_BATCHES, learning_rate=3e-3, seed=wanted.seed,
            per_device_eval_batch_size=16, report_to="none", save_strategy="no",
            logging_strategy="no", use_cpu=True,
        )  # fmt: skip
        trainer = Trainer(
            model=logit_free(model) if way == "without logits" else model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=others,
            data_collator=pad if way == "padding counted" else MaskLabels(pad),
            compute_loss_func=causal_lm_loss if way == "with logits" else None,
        )
        print(f"{way}:", flush=True)
        begin = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - begin) / wanted.steps
        return Run(model.eval(), seconds, trainer.evaluate()["eval_loss"])


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: list[dict]) -> float:
    """Nats per word, of real words alone."""
    loss, count = 0.0, 0
    for first in range(0, len(rows), 16):
        batch = MaskLabels(pad)(rows[first : first + 16])
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss += causal_lm_loss(outputs, batch["labels"], 1).item()
        count += int((batch["labels"] != -100).sum())
    return loss / count


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=60, quick=2)
    learn, held_out = common.texts(wanted.quick)
    index = vocabulary(learn, WORDS)
    rows, others = (
        [{"input_ids": words[:LONGEST]} for words in in_words(group, index)]
        for group in (learn, held_out[: 16 if wanted.quick else 320])
    )
    ways = ("with logits", "without logits", "padding counted")
    runs = {way: train(wanted, rows, others, way) for way in ways}
    for way, run in runs.items():
        loss = held_out_loss(run.model, others)
        print(
            f"{way}: {1000 * run.seconds:.0f} ms per step; held out, the Trainer says "
            f"{run.said:.3f} nats per word, and the mean over the words is {loss:.3f}"
        )
    before, after = (
        held_out_loss(model, others) for model in (make_model(wanted), runs["without logits"].model)
    )
    wrong = runs["padding counted"]
    off = wrong.said - held_out_loss(wrong.model, others)
    print(
        f"nats per word, held out: {before:.3f} before, {after:.3f} after training without logits; "
        f"with the padding counted the Trainer's own number is off by {off:+.3f}"
    )


if __name__ == "__main__":
    main()
