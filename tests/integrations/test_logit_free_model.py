# SPDX-License-Identifier: BSD-3-Clause
"""logit_free: one forward by hand, what stays as it was, options, and what is refused by name."""

import copy
import doctest
import inspect
import io
import math
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from tiny_models import (  # noqa: E402
    DECODERS,
    PREDICTED,
    VOCABULARY,
    Collator,
    make_model,
    make_rows,
)
from transformers import LlamaConfig, LlamaForCausalLM, set_seed  # noqa: E402

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    causal_lm_loss,
    logit_free,
    with_logits,
)

MODELS = ["gpt2", *DECODERS]
CLOSE = dict(rtol=1e-5, atol=1e-6)  # models in float32


def make_batch(**options):
    return MaskLabels(Collator(**options))(make_rows())


def step(model, **batch):
    """(outputs, gradients)"""
    model.zero_grad()
    outputs = model(**batch)
    outputs["loss"].backward()
    return outputs, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def test_by_hand():
    """Hidden states that are given; token t has t of them, and class 1 a logit of ln 3 for each."""
    config = LlamaConfig(
        vocab_size=2,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=0,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).double()
    model.model.norm = torch.nn.Identity()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.tensor([[0, 0], [math.log(3), 0]], dtype=torch.float64))
    hidden = torch.tensor([[[0.0, 5], [1, 5], [2, 5], [math.nan, 5]]], dtype=torch.float64)
    # Classes 0 and 1 have 1/2 and 1/2 at the first token, 1/4 and 3/4, 1/10 and 9/10.
    labels = torch.tensor([[1, 1, -100, 0]])
    expected = math.log(2) + math.log(10)
    outputs = logit_free(model)(inputs_embeds=hidden, labels=labels)
    torch.testing.assert_close(outputs.loss.item(), expected / 2, rtol=1e-12, atol=0)
    assert outputs.logits is None and "logits" not in outputs
    for count in (7, 7.0, torch.tensor(7)):
        loss = model(inputs_embeds=hidden, labels=labels, num_items_in_batch=count).loss
        torch.testing.assert_close(loss.item(), expected / 7, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_the_model_itself(name):
    batch = make_batch()
    shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    calls = [
        batch,
        batch | {"num_items_in_batch": PREDICTED},
        batch | {"num_items_in_batch": torch.tensor(100)},
        batch | {"shift_labels": shifted, "labels": batch["labels"].flip(0)},
        batch | {"use_cache": True, "output_hidden_states": True},
    ]
    for call in calls:
        model = make_model(name, dtype=torch.float32)
        own, gradients = step(model, **call)
        outputs, ours = step(logit_free(model), **call)
        torch.testing.assert_close(outputs.loss, own.loss, **CLOSE)
        torch.testing.assert_close(ours, gradients, **CLOSE)
        assert type(outputs) is type(own) and set(own) - set(outputs) == {"logits"}
        torch.testing.assert_close(outputs.hidden_states, own.hidden_states, rtol=0, atol=0)


def test_shift_labels_alone():
    """As sequence parallelism gives them; the model itself has no loss then."""
    batch = make_batch()
    model = make_model("llama")
    expected = model(**batch).loss
    shifted = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    assert model(**batch, shift_labels=shifted).loss is None
    outputs = logit_free(model)(**batch, shift_labels=shifted)
    torch.testing.assert_close(outputs.loss.float(), expected, rtol=1e-6, atol=0)
    assert outputs.logits is None


def test_tuples_and_positions():
    batch = make_batch()
    model = make_model("llama", dtype=torch.float32)
    own = model(**batch, return_dict=False)
    ours = logit_free(model)(**batch, return_dict=False)
    assert isinstance(ours, tuple) and len(ours) == len(own) - 1
    torch.testing.assert_close(ours[0], own[0], **CLOSE)
    order = ["input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"]
    outputs = model(*[batch.get(name) for name in order], batch["labels"])
    torch.testing.assert_close(outputs.loss, own[0], **CLOSE)
    assert outputs.logits is None


def test_auxiliary_loss():
    """The balancing of experts, which the model adds to its loss, is kept."""
    batch = make_batch()
    model = make_model("mixtral", dtype=torch.float32)
    own, outputs = model(**batch), logit_free(model)(**batch)
    assert own.aux_loss > 0.1
    torch.testing.assert_close(outputs.aux_loss, own.aux_loss, rtol=0, atol=0)
    torch.testing.assert_close(outputs.loss, own.loss, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_evaluation_and_generation_have_their_logits(name):
    batch = make_batch()
    model = make_model(name, dtype=torch.float32).eval()
    prompt = {"input_ids": batch["input_ids"][:1, :3], "max_new_tokens": 5, "do_sample": False}
    own, text = model(**batch), model.generate(**prompt)
    logit_free(model)
    outputs = model(**batch)
    assert torch.equal(outputs.logits, own.logits) and torch.equal(outputs.loss, own.loss)
    assert torch.equal(model.generate(**prompt), text)
    model.train()  # without labels
    assert model(input_ids=batch["input_ids"]).logits is not None
    assert torch.equal(model.generate(**prompt), text)
    assert model(**batch).logits is None


def test_undone_by_one_call():
    batch, model = make_batch(), make_model("llama")
    attributes, head = dict(model.__dict__), dict(model.lm_head.__dict__)
    own, printed = model(**batch), str(model)
    assert logit_free(model) is model and model(**batch).logits is None
    assert with_logits(model) is model
    assert type(model) is LlamaForCausalLM and type(model.lm_head) is torch.nn.Linear
    assert model.__dict__.keys() == attributes.keys()
    assert model.lm_head.__dict__.keys() == head.keys()
    assert str(model) == printed
    outputs = model(**batch)
    assert torch.equal(outputs.logits, own.logits) and torch.equal(outputs.loss, own.loss)


def test_what_others_look_at_stays():
    model, plain = make_model("llama"), make_model("llama")
    modes = [module.eval() and module.training for module in model.model.layers]
    logit_free(model)
    assert [module.training for module in model.model.layers] == modes and model.training
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.signature(type(model).forward) == inspect.signature(type(plain).forward)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert isinstance(model, LlamaForCausalLM) and type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(model.get_output_embeddings(), torch.nn.Linear)
    set_seed(3)
    expected = torch.rand(2)
    set_seed(3)
    logit_free(plain)
    assert torch.equal(torch.rand(2), expected), "no random number was taken"


def test_what_accelerate_wraps_and_unwraps():
    batch, model = make_batch(), logit_free(make_model("llama", dtype=torch.float32))
    AcceleratorState._reset_state(True)  # a Trainer before this test has made one in float32
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    assert prepared(**batch).logits is None
    free = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert free(**batch).logits is None
    assert with_logits(free)(**batch).logits is not None


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "replica"])
def test_copies_are_of_their_own(way):
    """What a copy computes, it computes with its own weights."""
    batch, model = make_batch(), logit_free(make_model("qwen2"), label_smoothing=0.1)
    expected = model(**batch).loss.item()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:  # as DataParallel makes them
        other = model._replicate_for_data_parallel()
        assert type(other) is type(model)
        return
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    outputs = other(**batch)
    assert outputs.logits is None and outputs.loss.item() == expected
    assert with_logits(other)(**batch).logits is not None
    assert model(**batch).logits is None, "the copy alone was changed"


def test_options_are_those_of_causal_lm_loss():
    batch, model = make_batch(), make_model("gemma2")
    outputs = model(**batch)
    weight = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(7)) + 0.5
    labels = batch["labels"]
    plain = causal_lm_loss(outputs, labels)
    for options in (
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"focal_gamma": 2.0},
        {"class_weight": weight},
        {"ignore_index": labels[0, 1].item()},
    ):
        known = {("weight" if k == "class_weight" else k): v for k, v in options.items()}
        given = torch.where(labels == -100, options.get("ignore_index", -100), labels)
        expected = causal_lm_loss(outputs, given, **known)
        loss = logit_free(model, **options)(**{**batch, "labels": given}).loss
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        assert (loss - plain).abs() > 1e-6
    for chunk_rows in (1, 7):
        loss = logit_free(model, chunk_rows=chunk_rows)(**batch).loss
        torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    half = logit_free(make_model("llama", dtype=torch.bfloat16), logits_dtype=torch.float32)
    assert half(**batch).loss.dtype == torch.float32


def test_nothing_counts():
    batch, model = make_batch(), logit_free(make_model("llama"))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    outputs, gradients = step(model, **batch)
    assert outputs.loss == 0 and all((g is None) or (g == 0).all() for g in gradients)


def test_one_graph():
    """torch.compile traces the forward as a whole."""
    batch, model = make_batch(), logit_free(make_model("gemma2"))
    expected, gradients = step(model, **batch)
    torch._dynamo.reset()
    outputs, compiled = step(torch.compile(model, backend="aot_eager", fullgraph=True), **batch)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(compiled, gradients)
    assert outputs.logits is None


# --- refused by name -----------------------------------------------------------------------------


class Adapted(torch.nn.Module):
    """As PEFT wraps a layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.weight = base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + 1


class Quantised(torch.nn.Parameter):
    pass


class Shifted(LlamaForCausalLM):
    """Its logits are moved by what no list of ours has."""

    def forward(self, labels=None, num_items_in_batch=None, return_dict=True, **kwargs):
        outputs = super().forward(**kwargs)
        outputs.logits = outputs.logits + torch.linspace(0, 1, outputs.logits.shape[-1])
        if labels is not None:
            outputs["loss"] = self.loss_function(
                outputs.logits, labels, VOCABULARY, num_items_in_batch=num_items_in_batch
            )
        return outputs


class Penalised(Shifted):
    """Its loss takes more from the logits than the loss function does."""

    def forward(self, labels=None, num_items_in_batch=None, return_dict=True, **kwargs):
        outputs = LlamaForCausalLM.forward(self, **kwargs)
        if labels is not None:
            count = {"num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(outputs.logits, labels, VOCABULARY, **count)
            outputs["loss"] = loss + outputs.logits.square().sum()
        return outputs


class OwnLoss(Shifted):
    """As many older models: the cross entropy of torch, not loss_function."""

    def forward(self, labels=None, num_items_in_batch=None, return_dict=True, **kwargs):
        outputs = LlamaForCausalLM.forward(self, **kwargs)
        if labels is not None:
            logits, target = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            outputs["loss"] = F.cross_entropy(logits, target)
        return outputs


def of_class(cls):
    model = make_model("llama", dtype=torch.float32)
    model.__class__ = cls
    return model


def adapted():
    model = make_model("llama")
    model.lm_head = Adapted(model.lm_head)
    return model


def quantised():
    model = make_model("llama")
    model.lm_head.weight = Quantised(model.lm_head.weight.detach())
    return model


def hooked():
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


def with_a_forward():
    model = make_model("llama")
    model.forward = model.forward
    return model


def with_a_loss():
    model = make_model("llama")
    model.loss_function = F.cross_entropy
    return model


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: torch.nn.Linear(2, 2), TypeError, "model must be a PreTrainedModel.*got Linear"),
        (
            lambda: make_model("llama").model,
            ValueError,
            "take labels, got LlamaModel, whose forwar",
        ),
        (lambda: make_model("t5"), ValueError, "must be a decoder, got T5ForConditionalGeneration"),
        (lambda: make_model("bert"), ValueError, "of BertForMaskedLM must be ForCausalLMLoss"),
        (with_a_loss, ValueError, "LlamaForCausalLM must be ForCausalLMLoss, got cross_entropy"),
        (adapted, TypeError, "head of LlamaForCausalLM must be a plain nn.Linear, got Adapted"),
        (quantised, TypeError, "must be a plain nn.Linear, got a weight that is a Quantised"),
        (hooked, TypeError, "must be a plain nn.Linear, got hooks on it"),
        (with_a_forward, ValueError, "got LlamaForCausalLM with a forward of its own"),
        (lambda: make_model("llama").to("meta"), ValueError, "its weights, got a model on the met"),
        (lambda: of_class(Shifted), ValueError, "got Shifted, which changes them otherwise"),
        (lambda: of_class(Penalised), ValueError, "model must take its loss from its head's"),
        (lambda: of_class(OwnLoss), ValueError, "got OwnLoss, which fails without them: "),
    ],
)
def test_models_that_are_refused(make, error, text):
    model = make()
    kind, head = type(model), getattr(model, "lm_head", None)
    with pytest.raises(error, match="logit_free: .*" + text):
        logit_free(model)
    assert type(model) is kind and model.__dict__.keys() == make().__dict__.keys()
    assert head is None or type(head) in (torch.nn.Linear, Adapted)


def test_a_softcap_that_is_hidden_from_small_logits():
    """Logits of a fresh model are near 0, where a softcap of 50 does nothing that one could see."""

    class Capped(Shifted):
        def forward(self, labels=None, num_items_in_batch=None, return_dict=True, **kwargs):
            outputs = LlamaForCausalLM.forward(self, **kwargs)
            outputs.logits = 50 * (outputs.logits / 50).tanh()
            if labels is not None:
                outputs["loss"] = self.loss_function(
                    outputs.logits, labels, VOCABULARY, num_items_in_batch=num_items_in_batch
                )
            return outputs

    model = of_class(Capped)
    with pytest.raises(ValueError, match="got Capped, which changes them otherwise"):
        logit_free(model)
    model.config.final_logit_softcapping = 50.0  # by the name that is known
    batch = make_batch()
    expected = model(**batch).loss
    torch.testing.assert_close(logit_free(model)(**batch).loss, expected, **CLOSE)


def test_heads_that_come_later_are_refused():
    batch, model = make_batch(), logit_free(make_model("llama"))
    model.lm_head = Adapted(model.lm_head)
    with pytest.raises(TypeError, match="the head of model must be the one that it had.*Adapted"):
        model(**batch)
    model.lm_head = model.lm_head.base_layer
    model.resize_token_embeddings(VOCABULARY + 3)
    with pytest.raises(TypeError, match="the head of model must be the one that it had.*Linear"):
        model(**batch)
    assert logit_free(model)(**batch).logits is None


def test_options_that_are_refused():
    model = make_model("llama")
    for options, error, text in (
        ({"softcap": 3.0}, TypeError, "unexpected keyword argument 'softcap'"),
        ({"label_smoothing": 2.0}, ValueError, "logit_free: label_smoothing must"),
        ({"chunk_rows": 0}, ValueError, "logit_free: chunk_rows must be at least 1, got 0"),
        ({"class_weight": torch.ones(3)}, ValueError, "logit_free: class_weight must have one ent"),
    ):
        with pytest.raises(error, match=text):
            logit_free(model, **options)
        assert type(model) is LlamaForCausalLM
    batch = make_batch()
    logit_free(model)
    with pytest.raises(IndexError, match="logit_free: .*labels.*61"):
        model(**{**batch, "labels": torch.full_like(batch["labels"], VOCABULARY)})
    assert model(**batch).logits is None and model.eval()(**batch).logits is not None
    with pytest.raises(ValueError, match="logit_free: labels must be a tensor, got list"):
        model.train()(**{**batch, "labels": batch["labels"].tolist()})
    with pytest.raises(ValueError, match="loss_function must stay that of the model"):
        model.loss_function = F.cross_entropy
    with pytest.raises(ValueError, match="with_logits: model must be one that logit_free has ret"):
        with_logits(with_logits(model))


def test_the_example_of_its_docstring_runs():
    names = dict(torch=torch, logit_free=logit_free, with_logits=with_logits)
    (test,) = doctest.DocTestFinder(recurse=False).find(logit_free, "logit_free", globs=names)
    report: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert test.examples and not report, "".join(report)
