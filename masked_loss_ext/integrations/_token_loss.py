# SPDX-License-Identifier: BSD-3-Clause
"""The loss per token, over everything since the last log: sum of the losses / number of tokens."""

import warnings

import torch
from transformers import TrainerCallback

from .._checks import check_length
from ._causal_lm import counted_tokens, keywords_of
from ._columns import check_trainer
from ._first_step import PaddingCheck


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
            :func:`masked_loss_ext.check_padding` on the model and its loss: True or "raise" to stop
            with its report where loss or gradients depend on padding, "warn" to be told. Takes some
            more forward and backward passes of that one batch, and the memory for copies of the
            parameters and their gradients. Not for models sharded over ranks (FSDP, DeepSpeed). Of
            an encoder-decoder the encoder's padding is checked, which attention_mask excludes.
        shift: by how much the loss shifts the labels, and so which it does not count. None: what
            causal_lm_loss, or a functools.partial of it, is told; 1 for any other function.

    ``padding_report`` holds what the check returned, None before.
    """

    def __init__(self, *, check_padding=False, shift=None):
        if not isinstance(check_padding, bool) and not (
            isinstance(check_padding, str) and check_padding in ("raise", "warn")
        ):
            raise ValueError(
                "TokenLossCallback: check_padding must be True, False, 'raise' or 'warn', "
                f"got {check_padding!r}"
            )
        if shift is not None:
            check_length("TokenLossCallback", "shift", shift)
        self.check_padding, self.shift = check_padding, shift
        self.padding_report = None
        self._loss_func = None
        self._check = None
        self._training, self._evaluation = TokenSum(), TokenSum()

    def attach(self, trainer):
        """Follow the losses of ``trainer``; returns the callback. Call it before ``train``."""
        check_trainer("TokenLossCallback", trainer)
        if self._loss_func is not None:
            raise ValueError("TokenLossCallback: attached already; make one for each trainer")
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
            raise TypeError(
                "TokenLossCallback: the trainer's compute_loss_func must return one number in a "
                f"tensor, got {got}"
            )
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
            raise TypeError(
                f"TokenLossCallback: labels must be a tensor, got {type(labels).__name__}: their "
                "number would not be known"
            )
        if self.shift is not None:
            told["shift"] = self.shift
        return counted_tokens(labels, **told)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin anew; wait for a batch with padding where it is to be checked."""
        if self._loss_func is None:
            raise ValueError(
                "TokenLossCallback: call TokenLossCallback().attach(trainer); it has to follow the "
                "trainer's loss, which callbacks=[...] does not show it"
            )
        self._training = TokenSum()
        if self.check_padding and self.padding_report is None:
            self._check = PaddingCheck(model, self._loss_func, self._autocast)

    def _run_check(self):
        """After a backward, whose graph is gone, and before the update of the parameters."""
        if self._check is None or not self._check.ready:
            return
        check, self._check = self._check, None
        self.padding_report = check.run()
        if self.check_padding != "warn":
            self.padding_report.raise_if_leaking()
        elif not self.padding_report:
            warnings.warn(f"TokenLossCallback: {self.padding_report}", stacklevel=2)

    def on_substep_end(self, args, state, control, **kwargs):
        """The check, if it is due."""
        self._run_check()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """The check, if it is due."""
        self._run_check()

    def on_train_end(self, args, state, control, **kwargs):
        """Say so where there was nothing to check."""
        if self._check is not None:
            self._check.give_up()
            self._check = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add what was followed to a log of training ("loss") or of an evaluation ("eval_loss")."""
        if "loss" in (logs or {}):
            self._add_to(logs, state, self._training, "", args.device)
        else:
            self._add_evaluation(logs, state, args.device)

    def on_predict(self, args, state, control, metrics=None, **kwargs):
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
