# SPDX-License-Identifier: BSD-3-Clause
"""Causal language models of transformers that train without logits.

The class's own forward runs, and with it all that its outputs and its loss are made of but two
things: the head hands its input on, and the loss function takes that. Model and head become
instances of subclasses which do so in training and are what they were otherwise; copies, replicas
and pickles of the model are then right by themselves, as those of a replaced forward would not be.
"""

import functools
import inspect
import math
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .._checks import refusal
from ..ops.linear_cross_entropy import masked_linear_cross_entropy
from ._causal_lm import beside, count_of, in_words, target_of

_NAME = "logit_free"
Model = TypeVar("Model")

# What models do to the logits, by the name that model or configuration has for the number.
_EDITS = {
    "final_logit_softcapping": lambda cap: {"softcap": cap},  # Gemma 2 and later
    "logit_scale": lambda factor: {"temperature": 1 / factor},  # Cohere
    "lm_head_multiplier": lambda factor: {"temperature": 1 / factor},  # Falcon-H1
    "logits_scaling": lambda divisor: {"temperature": divisor},  # Granite
}
_LARGEST_PROBE = 300.0  # shows what softcaps up to some thousands do to a float32 logit


def logit_free(
    model: Model,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Model:
    r"""Have a causal language model compute its loss in training without making its logits.

    Returns ``model`` itself. In training mode and with labels its forward then gives the loss from
    the hidden states h and the head's weight, see ``masked_linear_cross_entropy``, and None for
    logits; everything else of its outputs is as before. Positions that predict no label, padding
    among them, take no part in the head's products. In eval mode, without labels, and in
    ``generate`` nothing changes. The loss is the model's own to rounding,

    .. math:: L = \frac1N \sum_{b,\,t:\ y_{b,t+1} \ne -100}
        \Big(\log\sum_c e^{z_{btc}} - z_{bt,\,y_{b,t+1}}\Big), \qquad z = f(h W^\top + b),

    with f the model's final softcap or scale, N = ``num_items_in_batch`` or, without it, the labels
    that count, and ``shift_labels`` instead of labels where they are given (they may be alone).
    Equivalent, but for memory and time::

        outputs = model(**batch, labels=labels)
        outputs.loss, outputs.logits = causal_lm_loss(outputs, labels, num_items_in_batch), None

    Where no label counts the loss is 0 (the models' own: NaN). Labels alone say what counts, as for
    the models' own losses: ``MaskLabels`` puts the mask into them. Parameters, state_dict, what
    ``save_pretrained`` writes and the signature of forward stay as they are.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **tiny))
    >>> ids = torch.randint(50, (2, 8))
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> outputs = logit_free(model)(input_ids=ids, labels=ids)
    >>> torch.testing.assert_close(outputs.loss, expected)
    >>> outputs.logits is None, with_logits(model)(input_ids=ids, labels=ids).logits is None
    (True, False)

    Call it before what wraps the model or its forward: the Trainer, accelerate, DDP, FSDP, PEFT
    (whose adapters must leave the head alone). Not for ``Trainer(compute_loss_func=...)`` nor
    ``TrainingArguments(label_smoothing_factor=...)``: with these the Trainer gives the model no
    labels, so that it makes logits. FSDP may shard the model as a whole, but not its head apart.

    Args:
        model: a PreTrainedModel whose loss is ``ForCausalLMLoss`` of what a plain ``nn.Linear``
            makes of its hidden states. Tied weights, a bias, a final softcap and a scale of the
            logits are known. A few forward passes of eight tokens check that nothing else is done.
        label_smoothing, z_loss, focal_gamma, class_weight, chunk_rows, logits_dtype: as in
            ``masked_linear_cross_entropy``, in training alone: an evaluation has the model's loss.
        ignore_index: the label that does not count; the Trainer counts those that are not -100. A
            call's own ``ignore_index`` goes before it.

    Called again it takes the new options.

    Raises:
        TypeError: model is no PreTrainedModel, its head no plain ``nn.Linear`` (LoRA, quantised,
            sharded, with hooks).
        ValueError: the loss is of another function, the logits are changed in an unknown way, or
            forward has been replaced; an option that does not fit.
    """
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise refusal(_NAME, "model", "be a PreTrainedModel, not wrapped", got, TypeError)
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "focal_gamma": focal_gamma,
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "chunk_rows": chunk_rows,
        "logits_dtype": logits_dtype,
    }
    known: Any = model  # to mypy a PreTrainedModel is Any, and so what it is narrowed to
    if isinstance(known, _LogitFree):
        with_logits(known)
    _check_model(known)
    head = _checked_head(known)
    batch = _probe_batch(known, head)
    own = _in_evaluation(known, known.forward, **batch)
    known.__class__, head.__class__ = _logit_free_class(known.__class__), LogitFreeHead
    try:
        known._logit_free_edit = _found_edit(known, head, batch)
        known._logit_free_options = {}
        _check_loss(known, own.loss, batch)
        known._logit_free_options = options  # wrong ones are refused now, not in the first step
        every = {**batch, "labels": batch["input_ids"]}  # no -100, which ignore_index may not be
        _in_evaluation(known, known._forward_without_logits, **every)
    except BaseException:
        with_logits(known)
        raise
    return model


def with_logits(model: Model) -> Model:
    """Undo ``logit_free``: ``model`` itself, whose forward makes logits in training again.

    Raises:
        ValueError: a model that is not logit-free, or is wrapped.
    """
    known: Any = model
    if type(known) not in _of_logit_free:
        rule = "be one that logit_free has returned, not wrapped"
        raise refusal("with_logits", "model", rule, type(model).__name__)
    for module in known.modules():
        if type(module) is LogitFreeHead:
            module.__class__ = torch.nn.Linear
            module.__dict__.pop("instead", None)
    known.__class__ = _of_logit_free[type(known)]
    for name in ("_logit_free_edit", "_logit_free_options", "_logit_free_step"):
        known.__dict__.pop(name, None)
    return model


class LogitFreeHead(torch.nn.Linear):
    """The ``nn.Linear`` that it was, but that ``instead`` may stand in for its product."""

    instead: Any = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As that of nn.Linear, or what ``instead`` says."""
        return super().forward(input) if self.instead is None else self.instead(input)


class _Step:
    """One forward without logits: the head gives it hidden states, the loss function labels."""

    def __init__(self, head, options):
        self.head, self.options, self.hidden = head, options, None

    def take(self, hidden):
        """Logits of no classes: what is done to them costs nothing."""
        if self.hidden is not None:
            raise refusal(_NAME, "model", "call its head once in a forward", "twice")
        self.hidden = hidden
        return hidden.detach()[..., :0]

    def loss(
        self, logits, labels, vocab_size=None, num_items_in_batch=None, ignore_index=None,
        shift_labels=None, **kwargs,
    ):  # fmt: skip
        """In the place of ForCausalLMLoss, by the same names; it ignores further ones as well."""
        hidden, head, source = self.hidden, self.head, "the hidden states"
        if hidden is None:
            raise refusal(_NAME, "model", "call its head", "a loss without it")
        if hasattr(head.weight, "placements"):
            rule = "be a whole tensor: leave the head in the unit of the model that FSDP shards"
            raise refusal(_NAME, "the head's weight", rule, "a DTensor")
        target, shift, name = target_of(_NAME, labels, shift_labels, None)
        target = beside(_NAME, name, target, source, hidden)
        count = count_of(_NAME, num_items_in_batch, source, hidden)
        options = dict(self.options)
        if ignore_index is not None:
            options["ignore_index"] = ignore_index
        weight = options.get("class_weight")
        options["class_weight"] = beside(_NAME, "class_weight", weight, source, hidden)
        options |= {"bias": head.bias, "shift": shift, "normalizer": count}
        try:
            return masked_linear_cross_entropy(hidden, head.weight, target, **options)
        except (ValueError, TypeError, IndexError) as error:
            words = {"hidden": source, "target": name, "normalizer": "num_items_in_batch"}
            words["masked_linear_cross_entropy"] = _NAME
            raise type(error)(in_words(error, words)) from None


class _LogitFree:
    """What a logit-free model's class has before its own."""

    _logit_free_step: Any = None
    _own_class: Any = None

    def __new__(cls, *args, **kwargs):
        """from_pretrained and the like make a new model, which nobody has made logit-free; copies,
        pickles and replicas begin with an empty one."""
        return cls._own_class(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def _forward_without_logits(self: Any, *args, **kwargs):
        head = self.get_output_embeddings()
        if not isinstance(head, LogitFreeHead):
            rule = "be the one that it had: let what changes it come first, or leave it alone"
            raise refusal(_NAME, "the head of model", rule, type(head).__name__, TypeError)
        as_dict = kwargs.get("return_dict")
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        if kwargs.get("shift_labels") is not None and kwargs.get("labels") is None:
            kwargs["labels"] = kwargs["shift_labels"]  # or forward would not ask for a loss
        options = self._logit_free_options | _edit(self, self._logit_free_edit)
        self._logit_free_step = step = _Step(head, options)
        head.instead = step.take
        try:
            outputs = self._own_class.forward(self, *args, **{**kwargs, "return_dict": True})
        finally:
            self._logit_free_step = head.instead = None
        outputs = type(outputs)(**{k: v for k, v in outputs.items() if k != "logits"})
        return outputs if as_dict else outputs.to_tuple()

    @property
    def loss_function(self: Any):
        step = self._logit_free_step
        return self._own_class.loss_function.fget(self) if step is None else step.loss

    @loss_function.setter
    def loss_function(self, value):
        raise refusal(_NAME, "loss_function", "stay that of the model; see with_logits", value)

    def __reduce_ex__(self: Any, protocol):
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (self._own_class,), *reduced[2:]


_of_logit_free: dict[type, type] = {}  # the class that it was made of


@functools.cache
def _logit_free_class(cls):
    """A subclass that looks like ``cls``: the Trainer and configurations go by the name."""
    signature = inspect.signature(cls.forward)
    place = list(signature.parameters).index("labels") - 1

    @functools.wraps(cls.forward)
    def forward(self, *args, **kwargs):
        labels = args[place] if len(args) > place else kwargs.get("labels")
        given = labels is not None or kwargs.get("shift_labels") is not None
        # Under another class once with_logits has been called, if something kept this function.
        if self.training and given and isinstance(self, _LogitFree):
            return self._forward_without_logits(*args, **kwargs)
        return cls.forward(self, *args, **kwargs)

    del forward.__wrapped__  # accelerate's unwrap_model(keep_fp32_wrapper=False) would call that
    forward.__signature__ = signature
    names = ("__module__", "__qualname__", "__doc__")
    body = {name: getattr(cls, name) for name in names} | {"forward": forward, "_own_class": cls}
    made = type(cls)(cls.__name__, (_LogitFree, cls), body)
    _of_logit_free[made] = cls
    return made


def _new(cls):
    """An instance without attributes, for copy and pickle."""
    return _LogitFree.__new__(_logit_free_class(cls))


# --- what is known of a model --------------------------------------------------------------------


def _check_model(model):
    name = type(model).__name__
    if "forward" in model.__dict__:
        rule = "come before what replaces its forward (accelerate, Liger's patches, hooks)"
        raise refusal(_NAME, "model", rule, f"{name} with a forward of its own")
    if "labels" not in inspect.signature(model.forward).parameters:
        raise refusal(_NAME, "model", "take labels", f"{name}, whose forward has none")
    if getattr(model.config, "is_encoder_decoder", False):
        raise refusal(_NAME, "model", "be a decoder", f"{name}, an encoder-decoder")
    if model.loss_function is not ForCausalLMLoss:
        got = getattr(model.loss_function, "__name__", type(model.loss_function).__name__)
        raise refusal(_NAME, f"the loss_function of {name}", "be ForCausalLMLoss", got)


def _checked_head(model):
    head, name = model.get_output_embeddings(), f"the head of {type(model).__name__}"
    if type(head) is not torch.nn.Linear:
        raise refusal(_NAME, name, "be a plain nn.Linear", type(head).__name__, TypeError)
    if type(head.weight) is not torch.nn.Parameter:
        got = f"a weight that is a {type(head.weight).__name__}"
        raise refusal(_NAME, name, "be a plain nn.Linear", got, TypeError)
    if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
        raise refusal(_NAME, name, "be a plain nn.Linear", "hooks on it", TypeError)
    if head.weight.is_meta:
        raise refusal(_NAME, "model", "have its weights", "a model on the meta device")
    return head


def _edit(model, name):
    """Keywords of the loss for what the model does to its logits."""
    if name is None:
        return {}
    value = getattr(model, name, None)
    value = getattr(model.config.get_text_config(), name, None) if value is None else value
    number = isinstance(value, (int, float)) and 0 < value < math.inf
    return _EDITS[name](value) if number else {}


def _found_edit(model, head, batch):
    """The name of what the model does to its logits, seen by what it makes of known ones."""
    classes, dtype = head.out_features, head.weight.dtype
    given = torch.linspace(-_LARGEST_PROBE, _LARGEST_PROBE, classes, device=head.weight.device)
    given = given.to(dtype)
    head.instead = lambda hidden: given.expand(*hidden.shape[:-1], -1)
    try:
        shown = _in_evaluation(model, model.forward, **{**batch, "labels": None}).logits
    finally:
        head.instead = None
    tolerance = 6 * torch.finfo(dtype).eps  # a division, a tanh, a product
    for name in (None, *_EDITS):
        known, edit = given.double(), _edit(model, name)
        if "softcap" in edit:
            known = (known / edit["softcap"]).tanh() * edit["softcap"]
        known = known / edit.get("temperature", 1.0)
        if shown.shape[-1:] == known.shape and torch.allclose(
            shown.double(), known.expand_as(shown), rtol=tolerance, atol=0
        ):
            return name
    rule = f"leave the logits of its head as they are, or have one of {', '.join(_EDITS)}"
    raise refusal(_NAME, "model", rule, f"{type(model).__name__}, which changes them otherwise")


def _probe_batch(model, head):
    """Three tokens a row, of which the labels of two are predicted and all three are labels."""
    ids = torch.arange(8, device=head.weight.device).reshape(2, 4) % head.out_features
    labels = torch.where(torch.arange(4, device=ids.device) < 3, ids, -100)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "num_items_in_batch": 1,
    }  # fmt: skip


def _check_loss(model, expected, batch):
    """What would be trained is what the model itself would train, whatever its forward does."""
    try:
        loss = _in_evaluation(model, model._forward_without_logits, **batch).loss
    except Exception as error:
        got = f"{type(model).__name__}, which fails without them: {error}"
        raise refusal(_NAME, "model", "use its logits for its loss alone", got) from error
    eps = torch.finfo(model.get_output_embeddings().weight.dtype).eps
    allowed = max(1e-4, 16 * eps)  # the model's own takes softcap and scale in that dtype
    if not torch.allclose(loss.double(), expected.double(), rtol=allowed, atol=allowed):
        got = f"{type(model).__name__}, with loss {loss.item():g} where its own is {expected:g}"
        raise refusal(_NAME, "model", "take its loss from its head's logits alone", got)


def _in_evaluation(model, forward, **batch):
    """Without dropout and gradients, each module left in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return forward(**batch)
    finally:
        for module, mode in modes:
            module.training = mode
