# SPDX-License-Identifier: BSD-3-Clause
"""Sums of losses: with weights that are learnt, and from a configuration."""

import inspect
import math

import torch

from .._checks import check_length
from .anti_repetition import AntiRepetitionLoss
from .contrastive import ContrastiveLoss
from .diversity import DiversityLoss
from .hidden_state_mtp import MultiTokenPredictionLoss
from .moe import AuxiliaryFreeMoEBalancer, AuxiliaryLoss
from .simple import ConsistencyLoss, FocalLoss, LabelSmoothingLoss, PerplexityLoss


class AdaptiveLossScaling(torch.nn.Module):
    r"""A sum of losses with positive weights that are learnt and add up to 1.

    .. math:: L = \sum_i w_i L_i, \qquad w = \mathrm{softmax}(\text{log\_weights})

    >>> scaling = AdaptiveLossScaling(2, init_weights=[3.0, 1.0])
    >>> total, weights = scaling([torch.tensor(1.0), torch.tensor(5.0)])
    >>> torch.testing.assert_close(total, torch.tensor(2.0))

    **Minimised with the losses, it gives all weight to the smallest of them.** Give ``log_weights``
    to the optimiser only with something that holds against it.

    Args:
        num_losses: how many.
        init_weights: as many positive numbers, their ratios. None: even.
    """

    def __init__(self, num_losses, init_weights=None):
        super().__init__()
        check_length("AdaptiveLossScaling", "num_losses", num_losses)
        if num_losses == 0:
            raise ValueError("AdaptiveLossScaling: num_losses must be at least 1, got 0")
        weights = [1.0] * num_losses if init_weights is None else list(map(float, init_weights))
        if len(weights) != num_losses or not all(0 < w < math.inf for w in weights):
            raise ValueError(
                f"AdaptiveLossScaling: init_weights must be {num_losses} positive numbers, got "
                f"{weights}"
            )
        self.num_losses = num_losses
        self.log_weights = torch.nn.Parameter(torch.tensor(weights).log())

    def forward(self, losses):
        """(total ``[]``, weights ``[n]``) of ``losses``, n 0-d tensors or one tensor ``[n]``."""
        if len(losses) != self.num_losses:
            raise ValueError(
                f"AdaptiveLossScaling: losses must have num_losses {self.num_losses} entries, got "
                f"{len(losses)}"
            )
        weights = self.log_weights.softmax(0)
        values = losses if isinstance(losses, torch.Tensor) else torch.stack(list(losses))
        return (weights * values).sum(), weights

    def extra_repr(self):
        return f"num_losses={self.num_losses}"


def _whole(result):
    return result


# type: (class, what of its result is the loss)
TYPES = {
    "focal": (FocalLoss, _whole),
    "label_smoothing": (LabelSmoothingLoss, _whole),
    "perplexity": (PerplexityLoss, lambda result: result["loss"]),
    "consistency": (ConsistencyLoss, _whole),
    "contrastive": (ContrastiveLoss, _whole),
    "diversity": (DiversityLoss, _whole),
    "auxiliary": (AuxiliaryLoss, lambda result: sum(result.values())),
    "moe_balancing": (
        AuxiliaryFreeMoEBalancer,
        lambda result: result["balancing_term"] + result["balance_loss"],
    ),
    "multi_token_prediction": (MultiTokenPredictionLoss, lambda result: result["mtp_loss"]),
    "anti_repetition": (AntiRepetitionLoss, lambda result: result[0]),
}
# The same thing by another name, for inputs that must be there.
_ALSO_CALLED = {"inputs": "logits", "target_ids": "targets", "labels": "targets"}


class CompositeLoss(torch.nn.Module):
    r"""A weighted sum of losses from a configuration: :math:`\text{total} = \sum_i w_i L_i`.

    >>> loss_fn = CompositeLoss({
    ...     "tokens": {"type": "label_smoothing", "num_classes": 7, "smoothing": 0.1},
    ...     "focal": {"weight": 0.5, "gamma": 1.0},
    ... })
    >>> out = loss_fn(inputs=logits, targets=labels, attention_mask=attention_mask)
    >>> list(out)
    ['tokens', 'focal', 'total']
    >>> torch.testing.assert_close(out["total"], out["tokens"] + 0.5 * out["focal"])

    Args:
        loss_config: ``{name: {"type": ..., "weight": 1.0, **arguments of its constructor}}``. The
            type is "focal", "label_smoothing", "perplexity", "consistency", "contrastive",
            "diversity", "auxiliary", "moe_balancing", "multi_token_prediction" or
            "anti_repetition"; without one the name is the type. It is not changed.
    """

    def __init__(self, loss_config):
        super().__init__()
        self.losses = torch.nn.ModuleDict()
        self.weights, self._types, self._inputs = {}, {}, {}
        if not loss_config:
            raise ValueError("CompositeLoss: loss_config must have at least one loss, got none")
        for name, config in loss_config.items():
            options = dict(config)
            kind = options.pop("type", name)
            if name == "total" or kind not in TYPES:
                raise ValueError(
                    f"CompositeLoss: {name}: type must be one of {', '.join(TYPES)} (and its name "
                    f"not total), got {kind!r}"
                )
            self.weights[name] = options.pop("weight", 1.0)
            self.losses[name] = TYPES[kind][0](**options)
            self._types[name] = kind
            parameters = inspect.signature(self.losses[name].forward).parameters.values()
            self._inputs[name] = [(p.name, p.default is p.empty) for p in parameters]

    def forward(self, **kwargs):
        """dict of each loss ``[]`` by name, without its weight, and ``total``.

        Args:
            kwargs: inputs of the losses by the names their ``forward`` gives them. Each takes what
                it knows. Instead of inputs it takes logits; of target_ids, and of labels where they
                are needed, targets.

        Raises:
            ValueError: an input that a loss needs is not given.
        """
        results, total = {}, 0.0
        for name, module in self.losses.items():
            found = module(**self._arguments(name, kwargs))
            results[name] = self._loss(name, found)
            total = total + self.weights[name] * results[name]
        results["total"] = total
        return results

    def _arguments(self, name, given):
        arguments = {}
        for key, needed in self._inputs[name]:
            if needed and key not in given:
                source = _ALSO_CALLED.get(key, key)
                if source not in given:
                    self._missing(name, key)
                arguments[key] = given[source]
            elif key in given:
                arguments[key] = given[key]
        return arguments

    def _loss(self, name, result):
        kind = self._types[name]
        if kind == "auxiliary" and not result:
            self._missing(name, "gate_logits or expert_outputs")
        return TYPES[kind][1](result)

    def _missing(self, name, key):
        raise ValueError(
            f"CompositeLoss: {name} of type {self._types[name]} needs {key}: pass it to forward by "
            "keyword"
        )

    def extra_repr(self):
        return f"weights={self.weights}"
