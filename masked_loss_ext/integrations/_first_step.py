# SPDX-License-Identifier: BSD-3-Clause
"""check_padding on the first training batch that has padding, as the model and the loss got it."""

import warnings

import torch


class PaddingCheck:
    """Waits for a batch with padding, then runs the model and the loss on it again.

    The batch is put together where it is seen: the model's own inputs by a hook on its forward,
    which has no labels where the Trainer has a compute_loss_func; labels and their count by the
    loss that is called next.
    """

    def __init__(self, model, loss_func, autocast):
        self.model, self.loss_func, self.autocast = model, loss_func, autocast
        self.inputs = self.labels = self.num_items_in_batch = None
        self.seen_mask = False
        self.hook = model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    @property
    def ready(self):
        return self.labels is not None

    def _keep_inputs(self, module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if self.ready or not torch.is_grad_enabled() or not isinstance(mask, torch.Tensor):
            return
        self.seen_mask = True
        if mask.dim() == 2 and not mask.all():  # waits for the device, until there is padding
            self.inputs = dict(kwargs)

    def keep_labels(self, labels, num_items_in_batch):
        """The labels of the batch that the model has just been given, if it is to be kept."""
        if self.inputs is not None and not self.ready:
            self.labels, self.num_items_in_batch = labels, num_items_in_batch

    def run(self):
        """The report."""
        from ..diagnostics import check_padding  # not needed by those who do not check

        self.hook.remove()

        def step(batch):
            batch = dict(batch)
            labels = batch.pop("labels")
            with self.autocast():
                outputs = self.model(**batch)
                return self.loss_func(outputs, labels, num_items_in_batch=self.num_items_in_batch)

        batch = {**self.inputs, "labels": self.labels}
        return check_padding(step, batch, batch["attention_mask"], parameters=self.model)

    def give_up(self):
        """At the end of a training in which no batch had padding."""
        self.hook.remove()
        seen = (
            "no batch had padding" if self.seen_mask else "the model got no attention_mask [B, S]"
        )
        warnings.warn(f"TokenLossCallback: padding was not checked: {seen}", stacklevel=2)
