# SPDX-License-Identifier: BSD-3-Clause
"""Steps of the real transformers Trainer, AdamW included: the model's own loss, causal_lm_loss on
its logits, and logit_free(model).

A call is ``Trainer.train()`` for one step, in which AdamW makes its state, and ``STEPS`` more, of
which the time is that of one. Weights are put back before each call. Checked are the loss of the
first step and the norm of every parameter's gradient; the gradients themselves are those of the
case "step" (logit_free.py).
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Contender, Problem, clock_for
from .logit_free import TOLERANCE, make_batch, make_model, reference

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded

STEPS = 2


@functools.cache
def watched_trainer() -> type:
    """The Trainer, which also keeps loss and gradients' norms of its first step, and a mark of when
    the second began."""
    from transformers import Trainer

    class WatchedTrainer(Trainer):
        seen: tuple[Tensor, Tensor] | None = None
        mark: object = None

        def training_step(self, model: torch.nn.Module, *others: Any, **more: Any) -> Tensor:
            if self.seen is not None and self.mark is None:
                self.mark = clock_for(self.args.device.type).mark()
            loss = super().training_step(model, *others, **more)
            if self.seen is None:
                gradients = [weight.grad for weight in model.parameters()]
                self.seen = loss.detach().clone(), norms_of(gradients)
            return loss

    return WatchedTrainer


def norms_of(gradients: Sequence[Tensor]) -> Tensor:
    """Added up in float64: in float32 that of a large head is right to four digits alone."""
    norms = [torch.linalg.vector_norm(one, dtype=torch.float64) for one in gradients]
    return torch.stack(norms)


def rows_of(batch: list[Tensor]) -> list[dict[str, Tensor]]:
    """What a data set is to the Trainer."""
    names = ("input_ids", "attention_mask", "labels")
    return [dict(zip(names, row, strict=True)) for row in zip(*batch, strict=True)]


def make_trainer(model: torch.nn.Module, rows: list[dict], folder: str, loss: Callable | None):
    """One batch of all rows, again and again; no clipping, so that norms are the gradients' own."""
    from transformers import PrinterCallback, TrainingArguments

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=1 + STEPS,
        per_device_train_batch_size=len(rows),
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=next(model.parameters()).device.type == "cpu",
    )
    more = {} if loss is None else {"compute_loss_func": loss}
    trainer = watched_trainer()(model=model, args=arguments, train_dataset=rows, **more)
    trainer.remove_callback(PrinterCallback)
    return trainer


def training(name: str, model: torch.nn.Module, loss: Callable | None, inputs: tuple) -> Contender:
    """The weights of ``inputs`` are what every call begins with, the model's own are trained."""
    *initial, ids, mask, labels = inputs
    rows, waiting, marks = rows_of([one.cpu() for one in (ids, mask, labels)]), [], []
    folder = tempfile.TemporaryDirectory(prefix="benchmark_trainer_")

    def prepare(*_: Tensor) -> None:
        waiting.clear()
        gc.collect()  # the optimizer's state of the call before is in a cycle
        with torch.no_grad():
            for weight, value in zip(model.parameters(), initial, strict=True):
                weight.copy_(value)
        waiting.append(make_trainer(model, rows, folder.name, loss))

    def train(*_: Tensor) -> tuple[Tensor, Tensor]:
        trainer = waiting.pop()
        trainer.train()
        marks[:] = [trainer.mark]
        return trainer.seen

    more = {"prepare": prepare, "steps": STEPS, "began": lambda: marks[0]}
    return Contender(name, train, [inputs], **more)


def true_step(model: torch.nn.Module, names: list[str], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and norms of the first step, of the logits of the predicted tokens alone."""
    *weights, ids, mask, labels = inputs
    leaves = [weight.detach().requires_grad_(True) for weight in weights]
    loss = reference(model, names, *leaves, ids, mask, labels)
    return loss.detach(), norms_of(torch.autograd.grad(loss, leaves))


def trainer_problem(
    lengths: tuple[int, ...], vocabulary: int, width: int, layers: int, device: str
) -> Problem:
    from masked_loss_ext.integrations.transformers import causal_lm_loss, logit_free

    model = make_model(vocabulary, width, layers).to(device)
    names, weights = zip(*model.named_parameters(), strict=True)
    free = logit_free(copy.deepcopy(model, {id(weight): weight for weight in weights}))
    initial = [weight.detach().clone() for weight in weights]
    inputs = (*initial, *make_batch(lengths, vocabulary, device))
    return Problem(
        [
            training("ours", free, None, inputs),
            training("own loss", model, None, inputs),
            training("causal_lm_loss", model, causal_lm_loss, inputs),
        ],
        functools.partial(true_step, model, list(names)),
        bytes_moved=0,
        gradient_bytes=0,
        gradient_tolerance=TOLERANCE,
    )
