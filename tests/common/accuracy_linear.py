# SPDX-License-Identifier: BSD-3-Clause
"""The accuracy rule of accuracy_cross_entropy.py for losses from hidden states.

A logit is a sum itself: one rounding of each of its terms moves it by sum |h w| + |b|. The
gradients of hidden states, head and bias are sums of products with the gradient of the logits,
measured as that is. Where halves are multiplied as they are, logits and their gradient are rounded
to that dtype: by as many roundings of the loss's dtype as one of the halves is. Below the normal
numbers of float16 a rounding is 2^-25: one of each product's terms, one of the gradient for an
incoming gradient of 1 before it is multiplied, one after.
"""

import torch
import torch.nn.functional as F
from accuracy_cross_entropy import Expected, Magnitudes, evaluate
from cases_linear import DIFFERENTIABLE, linear, logits_of

from masked_loss_ext import reference


class LinearExpected(Expected):
    """rounded: the dtype of the logits where that is narrower than the loss's."""

    function = staticmethod(linear(reference))
    differentiable = DIFFERENTIABLE

    def __init__(self, inputs, upstream=None, rounded=None, **options):
        self.roundings = 0.0
        if rounded is not None:
            self.roundings = torch.finfo(rounded).eps / torch.finfo(torch.float32).eps
            self.tie = 4 * torch.finfo(rounded).eps
        super().__init__(inputs, upstream, **options)
        self.sums += tuple(f"grad {name}" for name in ("hidden", "head", "bias"))
        if inputs["hidden"].dtype == torch.float16:
            factor = 1 + (1.0 if upstream is None else upstream["loss"].abs().sum().item())
            for name in self.floor:
                if name in self.sums[-3:]:
                    terms = self.terms[name] if self.roundings else 0
                    self.floor[name] = 2.0**-24 * factor * (1 + terms)

    def logits_of(self, doubled):
        return logits_of(doubled)

    def sizes(self, doubled, upstream, options, dtype):
        given = {**doubled, "logits": self.logits}
        hidden, head = given.pop("hidden"), given.pop("head").abs()
        bias = given.pop("bias", None)
        terms = F.linear(hidden.abs(), head, _finite(bias)) + self.roundings * _finite(self.logits)
        temperature = options.get("temperature", 1.0)
        if "temperature" in given:  # per row, NaN where that does not count
            temperature = given["temperature"].nan_to_num(1.0).unsqueeze(-1)
        z_terms = torch.where(terms.isfinite(), terms, 0) / temperature
        found = Magnitudes(given, upstream, options, dtype == torch.float64, z_terms)
        sizes = found.all()
        gradient = sizes.pop("grad logits")
        if self.roundings:
            alone = evaluate(reference.masked_cross_entropy, given, upstream, **options)
            gradient = gradient + self.roundings * alone["grad logits"].abs()
        on = found.on.unsqueeze(-1)
        hidden = torch.where(on, hidden, 0).abs().reshape(-1, hidden.shape[-1])
        gradient = torch.where(on, gradient, 0)
        rows = gradient.reshape(-1, gradient.shape[-1])
        sizes["grad hidden"] = gradient @ head
        sizes["grad head"] = rows.T @ hidden
        if bias is not None:
            sizes["grad bias"] = rows.sum(0)
        self.terms = {
            "grad hidden": head.sum(0).max().item(),
            "grad head": hidden.sum(0).max().item(),
            "grad bias": len(rows),
        }
        largest = {name: found.largest * (1 + terms) for name, terms in self.terms.items()}
        return sizes, largest


def _finite(x):
    return None if x is None else torch.where(x.isfinite(), x, 0).abs()
