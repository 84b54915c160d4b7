# SPDX-License-Identifier: BSD-3-Clause
"""The loss per token, over everything since the last log: sum of the losses / number of tokens;
and whether the first batch with padding leaks."""

import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from .._checks import check_length, refusal
from ..diagnostics import PaddingReport, check_padding
from ._causal_lm import counted_tokens, keywords_of
from ._columns import check_trainer

_NAME = "TokenLossCallback"
_CHECKS = (True, False, "raise", "warn")


class TokenSum:
    """Sum of token losses and number of tokens, kept on their device: no synchronisation."""

    def __init__(self):
        self.loss = self.tokens = 0

    def add(self, loss, tokens):
        self.loss = self.loss + loss
        self.tokens = self.tokens + tokens

    def take(self, device):
        """(loss, tokens) over all ranks, as numbers, and begin anew. Every rank has to call it."""
        both = torch.zeros(2, dtype=torch.float64, device=device)
        both[0], both[1] = self.loss, self.tokens
        self.loss = self.tokens = 0
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(both)
        loss, tokens = both.tolist()
        return loss, int(tokens)


class PaddingCheck:
    """Waits for a batch with padding, then runs check_padding on the model and the loss.

    The batch is put together where it is seen: the model's own inputs by a hook on its forward,
    which has no labels where the Trainer has a compute_loss_func; labels, their count and columns
    of the batch by the loss that is called next.
    """

    def __init__(self, model, loss_func, autocast):
        self.model, self.loss_func, self.autocast = model, loss_func, autocast
        self.inputs = self.of_loss = None
        self.seen_mask = False
        self.hook = model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    def _keep_inputs(self, module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if self.of_loss or not torch.is_grad_enabled() or not isinstance(mask, torch.Tensor):
            return
        self.seen_mask = True
        if mask.dim() == 2 and not mask.all():  # waits for the device, until there is padding
            self.inputs = dict(kwargs)

    def keep_loss(self, labels, num_items_in_batch, columns):
        """What the loss got for the batch that the model has just been given, if it is kept."""
        if self.inputs is not None and self.of_loss is None:
            self.of_loss = labels, num_items_in_batch, columns

    def run(self):
        """The report."""
        self.hook.remove()
        inputs, (labels, count, columns) = self.inputs, self.of_loss
        of_loss = {"labels": labels, **columns}
        fixed = {}  # what attention_mask says nothing about: lengths may agree by chance
        if "decoder_input_ids" in inputs:
            fixed = {k: v for k, v in inputs.items() if k.startswith("decoder_")}
            fixed |= of_loss

        def step(batch):
            batch = {**batch, **fixed}
            with self.autocast():
                outputs = self.model(**{name: batch[name] for name in inputs})
                more = {name: batch[name] for name in columns}
                return self.loss_func(outputs, batch["labels"], num_items_in_batch=count, **more)

        batch = {k: v for k, v in (inputs | of_loss).items() if k not in fixed}
        return check_padding(step, batch, batch["attention_mask"], parameters=self.model)

    def give_up(self):
        """At the end of a training in which no batch had padding."""
        self.hook.remove()
        why = "no batch had padding"
        why = why if self.seen_mask else "the model got no attention_mask [B, S]"
        warnings.warn(f"{_NAME}: padding was not checked: {why}", stacklevel=2)


class TokenLossCallback(TrainerCallback):
    """Adds the exact loss per token to every log of a Trainer that has a compute_loss_func.

    ``token_loss``: the sum of the losses of all tokens since the last log, over all micro-batches,
    steps and ranks, over their number, ``tokens``. The Trainer's own ``loss`` is a mean of steps,
    each step weighing the same however many tokens it had, divided by what its version counts, and
    without the steps that were NaN or inf. With evaluation, ``eval_token_loss`` and ``eval_tokens``
    over all that was evaluated (the Trainer's ``eval_loss`` weights batches by rows); it may serve
    as ``metric_for_best_model``. Each log costs an all-reduce of two numbers where there are ranks.
    Under tensor or sequence parallelism ``tokens`` counts a token once per rank that holds it.

    Costs one comparison of the labels per micro-batch, and one synchronisation per log.

    Args:
        check_padding: on the first batch that has padding, before the first update, run
            ``masked_loss_ext.check_padding`` on the model and its loss: True or "raise" to stop
            with its report where loss or gradients depend on padding, "warn" to be told. Takes some
            more forward and backward passes of that one batch, and the memory for copies of the
            parameters and their gradients. Not for models sharded over ranks (FSDP, DeepSpeed). Of
            an encoder-decoder the encoder's padding is checked, which attention_mask excludes.
        shift: by how much the loss shifts the labels, and so which it does not count. None: what
            causal_lm_loss, or a functools.partial of it, is told; 1 for any other function.

    ``padding_report`` holds what the check returned, None before.
    """

    def __init__(self, *, check_padding: bool | str = False, shift: int | None = None) -> None:
        if not isinstance(check_padding, (bool, str)) or check_padding not in _CHECKS:
            rule = "be True, False, 'raise' or 'warn'"
            raise refusal(_NAME, "check_padding", rule, repr(check_padding))
        if shift is not None:
            check_length(_NAME, "shift", shift)
        self.check_padding, self.shift = check_padding, shift
        self.padding_report: PaddingReport | None = None
        self._loss_func: Any = None
        self._check: PaddingCheck | None = None
        self._training, self._evaluation = TokenSum(), TokenSum()

    def attach(self, trainer: Any) -> "TokenLossCallback":
        """Follow the losses of ``trainer``; returns the callback. Call it before ``train``."""
        check_trainer(_NAME, trainer)
        if self._loss_func is not None:
            raise ValueError(f"{_NAME}: attached already; make one for each trainer")
        self._loss_func = trainer.compute_loss_func
        self._autocast = trainer.compute_loss_context_manager
        trainer.compute_loss_func = self._followed_loss
        # First, or what reports to files and dashboards would have passed the log on before.
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def _followed_loss(self, outputs, labels, num_items_in_batch=None, **columns):
        given = num_items_in_batch
        tokens = None
        if given is None and isinstance(labels, torch.Tensor):
            num_items_in_batch = tokens = self._count(labels, columns)
        loss = self._loss_func(outputs, labels, num_items_in_batch=num_items_in_batch, **columns)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            rule = "return one number in a tensor"
            raise refusal(_NAME, "the trainer's compute_loss_func", rule, got, TypeError)
        if tokens is None:  # here the loss has checked what is counted
            tokens = self._count(labels, columns)
        count = torch.as_tensor(tokens if given is None else given, device=loss.device).sum()
        follow = self._training if torch.is_grad_enabled() else self._evaluation
        follow.add(loss.detach().double().reshape(()) * count, tokens)
        if self._check is not None:
            self._check.keep_loss(labels, num_items_in_batch, columns)
        return loss

    def _count(self, labels, columns):
        """The labels that the loss counts."""
        told = keywords_of(self._loss_func)
        told = {} if told is None else {**told, **columns}
        if not isinstance(labels, torch.Tensor) and told.get("shift_labels") is None:
            got = f"{type(labels).__name__}: their number would not be known"
            raise refusal(_NAME, "labels", "be a tensor", got, TypeError)
        if self.shift is not None:
            told["shift"] = self.shift
        return counted_tokens(labels, **told)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Begin anew; wait for a batch with padding where it is to be checked."""
        if self._loss_func is None:
            raise ValueError(
                f"{_NAME}: call TokenLossCallback().attach(trainer); it has to follow the "
                "trainer's loss, which callbacks=[...] does not show it"
            )
        self._training = TokenSum()
        if self.check_padding and self.padding_report is None:
            self._check = PaddingCheck(model, self._loss_func, self._autocast)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The check, if it is due: the graph is gone, and the parameters are not yet updated."""
        if self._check is None or self._check.of_loss is None:
            return
        check, self._check = self._check, None
        self.padding_report = report = check.run()
        if self.check_padding != "warn":
            report.raise_if_leaking()
        elif not report:
            warnings.warn(f"{_NAME}: {report}", stacklevel=2)

    on_pre_optimizer_step = on_substep_end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say so where there was nothing to check."""
        if self._check is not None:
            self._check.give_up()
            self._check = None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Add what was followed to a log of training ("loss") or of an evaluation ("eval_loss")."""
        if "loss" in (logs or {}):
            self._add_to(logs, state, self._training, "", args.device)
        else:
            self._add_evaluation(logs, state, args.device)

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any
    ) -> None:
        """As on_log; the Trainer does not log predictions."""
        self._add_evaluation(metrics, None, args.device)

    def _add_evaluation(self, metrics, state, device):
        """Metrics are those of an evaluation where they time one; its prefix may be any."""
        for key in metrics or {}:
            prefix = key.removesuffix("loss")
            if prefix not in (key, "train_") and prefix + "runtime" in metrics:
                return self._add_to(metrics, state, self._evaluation, prefix, device)

    @staticmethod
    def _add_to(logs, state, follow, prefix, device):
        loss, tokens = follow.take(device)
        if tokens == 0:
            return
        exact = {f"{prefix}token_loss": loss / tokens, f"{prefix}tokens": tokens}
        logs.update(exact)
        if state is not None and state.log_history:  # a copy, made before the callbacks are asked
            state.log_history[-1].update(exact)
