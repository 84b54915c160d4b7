# SPDX-License-Identifier: BSD-3-Clause
"""check_padding on the first training batch that has padding, as the model and the loss got it."""

import warnings

import torch


class PaddingCheck:
    """Waits for a batch with padding, then runs the model and the loss on it again.

    The batch is put together where it is seen: the model's own inputs by a hook on its forward,
    which has no labels where the Trainer has a compute_loss_func; labels, their count and columns
    of the batch by the loss that is called next.
    """

    def __init__(self, model, loss_func, autocast):
        self.model, self.loss_func, self.autocast = model, loss_func, autocast
        self.inputs = self.labels = self.num_items_in_batch = self.columns = None
        self.seen_mask = self.ready = False
        self.hook = model.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    def _keep_inputs(self, module, args, kwargs):
        mask = kwargs.get("attention_mask")
        if self.ready or not torch.is_grad_enabled() or not isinstance(mask, torch.Tensor):
            return
        self.seen_mask = True
        if mask.dim() == 2 and not mask.all():  # waits for the device, until there is padding
            self.inputs = dict(kwargs)

    def keep_loss(self, labels, num_items_in_batch, columns):
        """What the loss got for the batch that the model has just been given, if it is kept."""
        if self.inputs is not None and not self.ready:
            self.labels, self.num_items_in_batch, self.columns = labels, num_items_in_batch, columns
            self.ready = True

    def run(self):
        """The report."""
        from ..diagnostics import check_padding  # not needed by those who do not check

        self.hook.remove()
        inputs, labels = self.inputs, {"labels": self.labels}
        fixed = {}  # what attention_mask says nothing about: lengths may agree by chance
        if "decoder_input_ids" in inputs:
            fixed = {k: v for k, v in inputs.items() if k.startswith("decoder_")}
            fixed |= labels | self.columns

        def step(batch):
            batch = {**batch, **fixed}
            with self.autocast():
                outputs = self.model(**{name: batch[name] for name in inputs})
                columns = {name: batch[name] for name in self.columns}
                return self.loss_func(
                    outputs,
                    batch["labels"],
                    num_items_in_batch=self.num_items_in_batch,
                    **columns,
                )

        batch = {k: v for k, v in (inputs | labels | self.columns).items() if k not in fixed}
        return check_padding(step, batch, batch["attention_mask"], parameters=self.model)

    def give_up(self):
        """At the end of a training in which no batch had padding."""
        self.hook.remove()
        seen = (
            "no batch had padding" if self.seen_mask else "the model got no attention_mask [B, S]"
        )
        warnings.warn(f"TokenLossCallback: padding was not checked: {seen}", stacklevel=2)
