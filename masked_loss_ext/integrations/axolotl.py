# SPDX-License-Identifier: BSD-3-Clause
"""A plugin of axolotl: the loss of this package, chosen in the YAML file of a run.

plugins:
  - masked_loss_ext.integrations.axolotl.MaskedLossPlugin
masked_loss: logit_free         # or logits
masked_loss_options:
  z_loss: 0.0001
"""

from typing import Any, Literal

from .._checks import refusal
from ._packages import known, needed
from .transformers import logit_free, use_causal_lm_loss

BasePlugin: Any = known(
    "axolotl", needed("axolotl", "axolotl.integrations.base", "axolotl"), "BasePlugin"
)
BaseModel: Any = known("axolotl", needed("axolotl", "pydantic", "axolotl"), "BaseModel")

_NAME = "MaskedLossPlugin"
_WAYS = {"logit_free": logit_free, "logits": use_causal_lm_loss}
# Settings of axolotl that replace the loss or the forward that this would replace.
_OTHERS = (
    "cut_cross_entropy", "chunked_cross_entropy", "liger_cross_entropy",
    "liger_fused_linear_cross_entropy", "use_eaft",
    "orpo_alpha", "rl",
)  # fmt: skip
__all__ = ["MaskedLossArgs", "MaskedLossPlugin"]


class MaskedLossArgs(BaseModel):
    """What the plugin reads of the YAML file."""

    masked_loss: Literal["logit_free", "logits"] = "logit_free"
    masked_loss_options: dict[str, Any] | None = None


class MaskedLossPlugin(BasePlugin):
    """The model's own loss by ``logit_free`` (``masked_loss: logit_free``, the default) or
    ``use_causal_lm_loss`` (``logits``), with ``masked_loss_options`` as its keywords.

    What counts is what axolotl's labels say, -100 at prompts and padding. The loss of a step is the
    mean over the tokens of its whole accumulation window, over all ranks: axolotl's trainer gives
    the model no count of them by itself (0.19), so that it averages the means of micro-batches.

    Beside another plugin or setting that replaces the loss it is refused.
    """

    def get_input_args(self) -> str:
        """Where axolotl finds the arguments."""
        return f"{__name__}.MaskedLossArgs"

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Before adapters are put around the model."""
        taken = [name for name in _OTHERS if getattr(cfg, name, None)]
        if taken:
            rule = "be the only one that makes the loss"
            raise refusal(_NAME, "the plugin", rule, f"{taken[0]} beside it")
        way = getattr(cfg, "masked_loss", None) or "logit_free"
        if way not in _WAYS:
            raise refusal(_NAME, "masked_loss", f"be one of {', '.join(_WAYS)}", way)
        _WAYS[way](model, **(getattr(cfg, "masked_loss_options", None) or {}))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """The model takes the count of the window, so the trainer is to hand it over."""
        trainer.model_accepts_loss_kwargs = True
