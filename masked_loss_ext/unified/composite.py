# SPDX-License-Identifier: BSD-3-Clause
"""Sums of losses: with weights that are learnt, and from a configuration."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .._checks import check_device, check_number, check_rank, refusal, refuse_unknown
from ._options import LossModule, Rule, check_size
from ._rows import check_features, check_list
from ._state import SyncsState
from .consistency import ConsistencyLoss
from .contrastive import ContrastiveLoss
from .experts import AuxiliaryFreeMoEBalancer, AuxiliaryLoss, DiversityLoss
from .hidden_state_mtp import HiddenStateMTPLoss
from .penalties import AntiRepetitionLoss
from .simple import FocalLoss, LabelSmoothingLoss, PerplexityLoss

_NAME = "CompositeLoss"


@dataclass(eq=False, repr=False)
class AdaptiveLossScaling(LossModule):
    r"""A sum of losses with positive weights that are learnt and add up to 1.

    .. math:: L = \sum_i w_i L_i, \qquad w = \mathrm{softmax}(\text{log\_weights})

    >>> scaling = AdaptiveLossScaling(2, init_weights=[3.0, 1.0])
    >>> total, weights = scaling([torch.tensor(1.0), torch.tensor(5.0)])
    >>> torch.testing.assert_close(total, torch.tensor(2.0))

    **Minimised with the losses, it gives all weight to the smallest of them.** Give ``log_weights``
    to the optimiser only with something that holds against it.

    Args:
        num_losses: how many, at most 2^20.
        init_weights: as many positive numbers, their ratios. None: even.
    """

    num_losses: Annotated[int, Rule("1 to 2^20", check_size, most=2**20)]
    init_weights: InitVar[Sequence[float] | Tensor | None] = None

    def __post_init__(self, init_weights: Sequence[float] | Tensor | None) -> None:
        super().__post_init__()
        weights = self._numbers(init_weights)
        if len(weights) != self.num_losses or not all(0 < w < math.inf for w in weights):
            rule = f"be {self.num_losses} positive numbers"
            raise refusal(self.function, "init_weights", rule, weights)
        self.log_weights = torch.nn.Parameter(torch.tensor(weights, dtype=torch.float32).log())

    def forward(self, losses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """(total ``[]``, weights ``[n]``) of ``losses``, n 0-d tensors or one tensor ``[n]``."""
        self._check(losses)
        if len(losses) != self.num_losses:
            rule = f"have num_losses {self.num_losses} entries"
            raise refusal(self.function, "losses", rule, len(losses))
        weights = self.log_weights.softmax(0)
        values = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
        return (weights * values).sum(), weights

    def _check(self, losses):
        whole = isinstance(losses, Tensor)
        if not whole:
            check_list(self.function, "losses", losses)
        for i, loss in enumerate([losses] if whole else losses):
            where, rank, layout = ("losses", 1, "[n]") if whole else (f"losses[{i}]", 0, "[]")
            check_features(self.function, where, loss)
            check_rank(self.function, where, loss, rank, layout)
            check_device(self.function, where, loss, "log_weights", self.log_weights)

    def _numbers(self, weights):
        if weights is None:
            return [1.0] * self.num_losses
        if isinstance(weights, Tensor):
            weights = weights.tolist()
        if not isinstance(weights, (list, tuple)):
            got = type(weights).__name__
            raise refusal(self.function, "init_weights", "be a list of numbers", got, TypeError)
        for i, weight in enumerate(weights):
            check_number(self.function, f"init_weights[{i}]", weight, above=0)
        return [float(weight) for weight in weights]


def _whole(result):
    return result


# type: (class, what of its result is the loss)
TYPES: dict[str, tuple[type[Any], Callable[[Any], Any]]] = {
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
    "multi_token_prediction": (HiddenStateMTPLoss, lambda result: result["mtp_loss"]),
    "anti_repetition": (AntiRepetitionLoss, lambda result: result[0]),
}
# The same thing by another name, for inputs that must be there.
_ALSO_CALLED = {"inputs": "logits", "target_ids": "targets", "labels": "targets"}
_INPUTS = tuple(
    dict.fromkeys(
        name
        for cls, _ in TYPES.values()
        for name in inspect.signature(cls.forward).parameters
        if name != "self"
    )
)


class CompositeLoss(SyncsState):
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

    Raises:
        ValueError: no loss, a type that there is not, a name that no module may have, a weight that
            is not finite.
        TypeError: an argument that the loss does not know.
    """

    def __init__(self, loss_config: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.losses = torch.nn.ModuleDict()
        self.weights, self._types, self._inputs = {}, {}, {}
        if not isinstance(loss_config, dict):
            raise refusal(_NAME, "loss_config", "be a dict", type(loss_config).__name__, TypeError)
        if not loss_config:
            raise ValueError(f"{_NAME}: loss_config must have at least one loss, got none")
        for name, config in loss_config.items():
            if not isinstance(config, dict):
                got = type(config).__name__
                raise refusal(_NAME, f"loss_config[{name!r}]", "be a dict", got, TypeError)
            options = dict(config)
            kind = options.pop("type", name)
            self._check_name(name, kind)
            self.weights[name] = options.pop("weight", 1.0)
            check_number(_NAME, f"{name}: weight", self.weights[name])
            known = inspect.signature(TYPES[kind][0]).parameters
            refuse_unknown(f"{_NAME}: {name}", [key for key in options if key not in known], known)
            self.losses[name] = TYPES[kind][0](**options)
            self._types[name] = kind
            parameters = inspect.signature(self.losses[name].forward).parameters.values()
            self._inputs[name] = [(p.name, p.default is p.empty) for p in parameters]

    def forward(self, **kwargs: Any) -> dict[str, Tensor]:
        """dict of each loss ``[]`` by name, without its weight, and ``total``.

        ``sync_state`` does for each loss what is said there.

        Args:
            kwargs: inputs of the losses by the names their ``forward`` gives them. Each takes what
                it knows; what no type of loss knows is refused. Instead of inputs it takes logits;
                of target_ids, and of labels where they are needed, targets.

        Raises:
            ValueError: an input that a loss needs is not given.
        """
        refuse_unknown(_NAME, [key for key in kwargs if key not in _INPUTS], _INPUTS)
        results, total = {}, 0.0
        for name, module in self.losses.items():
            found = module(**self._arguments(name, kwargs))
            results[name] = self._loss(name, found)
            total = total + self.weights[name] * results[name]
        results["total"] = total
        return results

    def _check_name(self, name, kind):
        if not isinstance(kind, str) or kind not in TYPES or name == "total":
            rule = f"be one of {', '.join(TYPES)} (and its name not total)"
            raise refusal(_NAME, f"{name}: type", rule, repr(kind))
        if not isinstance(name, str) or not name or "." in name or hasattr(self.losses, name):
            raise ValueError(
                f"{_NAME}: loss_config must have names that a module may have (not empty, without "
                f"a dot, no attribute of ModuleDict), got {name!r}"
            )

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
            f"{_NAME}: {name} of type {self._types[name]} needs {key}: pass it to forward by "
            "keyword"
        )

    def extra_repr(self) -> str:
        return f"weights={self.weights}"
