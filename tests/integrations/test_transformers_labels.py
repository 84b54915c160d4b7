# SPDX-License-Identifier: BSD-3-Clause
"""causal_lm_loss of labels that have been shifted before, and behind virtual tokens."""

import contextlib
import functools
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    LEARNING_RATE,
    Collator,
    logged,
    make_model,
    make_rows,
    make_trainer,
)

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
)


def causal_example():
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 6, 11, generator=g, dtype=torch.float64)
    labels = torch.randint(11, (2, 6), generator=g)
    labels[0, 4:], labels[1, 2] = -100, -100
    return logits, labels, F.pad(labels[:, 1:], (0, 1), value=-100)


def test_shift_labels_as_the_models_own_losses_take_them():
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels, shifted = causal_example()
    expected = causal_lm_loss((logits,), labels, 7)
    for given in (None, labels, labels.flip(0)):  # never looked at
        own = ForCausalLMLoss(logits, given, 11, num_items_in_batch=7, shift_labels=shifted)
        loss = causal_lm_loss((logits,), given, 7, shift_labels=shifted)
        torch.testing.assert_close(loss, own.double(), rtol=1e-6, atol=0)
        torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    own_count = causal_lm_loss((logits,), shift_labels=shifted, shift=0)  # 3 of row 0, 4 of row 1
    torch.testing.assert_close(own_count, expected, rtol=1e-14, atol=0)
    # A sequence cut in two: the last token of the first part keeps its label.
    parts = [causal_lm_loss((logits[:, c],), labels[:, c], 7, shift_labels=shifted[:, c])
             for c in (slice(3), slice(3, 6))]  # fmt: skip
    torch.testing.assert_close(sum(parts), expected, rtol=1e-14, atol=0)


def test_virtual_tokens_as_peft_pads_labels():
    """It puts -100 in front of labels, and the model shifts: the last of them predicts a label."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 6 + 3, 11, generator=g, dtype=torch.float64, requires_grad=True)
    _, labels, _ = causal_example()
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), F.pad(labels, (3, 0), value=-100)[:, 1:].flatten()
    )
    loss = causal_lm_loss((logits,), labels, virtual_tokens=3)
    torch.testing.assert_close(loss, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (loss, expected)))
    narrow = causal_lm_loss((logits,), labels.to(torch.int8), 9, virtual_tokens=3)
    torch.testing.assert_close(narrow, expected)  # -100 in front, whatever dtype
    bytes_ = causal_lm_loss((logits,), labels.clamp_min(0).to(torch.uint8), virtual_tokens=3)
    torch.testing.assert_close(
        bytes_, causal_lm_loss((logits,), labels.clamp_min(0), virtual_tokens=3)
    )


def test_virtual_tokens_and_what_belongs_to_the_tokens():
    """Worked out on the tokens alone: rows 2 to 7 of the logits predict the labels 0 to 5."""
    g = torch.Generator().manual_seed(6)
    logits = torch.randn(2, 6 + 3, 11, generator=g, dtype=torch.float64)
    _, labels, _ = causal_example()
    weight = torch.rand(2, 6, generator=g)
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    documents = torch.tensor([[0, 0, 0, 0, 0, 0], [7, 7, 7, 8, 8, 8]])
    losses = F.cross_entropy(logits[:, 2:8].mT, labels, reduction="none") * weight
    counts = (labels != -100) & (mask != 0)
    counts[1, 3] = False  # the first of document 8; document 7 begins after the virtual tokens
    loss = causal_lm_loss(
        (logits,), labels, virtual_tokens=3, mask=mask, token_weight=weight, segment_ids=documents
    )
    torch.testing.assert_close(loss, losses[counts].sum() / counts.sum(), rtol=1e-7, atol=0)


class PromptTuned(torch.nn.Module):
    """What PEFT's prompt tuning does to a model, as far as a loss is concerned."""

    def __init__(self, n):
        super().__init__()
        self.model = make_model("llama").requires_grad_(False)
        self.prompt = torch.nn.Parameter(torch.randn(n, 16, dtype=torch.float64))

    def forward(self, input_ids, attention_mask, labels=None, num_items_in_batch=None):
        prompt = self.prompt.expand(len(input_ids), -1, -1)
        n = prompt.shape[1]
        tokens = self.model.get_input_embeddings()(input_ids)
        if labels is not None:
            labels = F.pad(labels, (n, 0), value=-100)
        return self.model(
            inputs_embeds=torch.cat([prompt, tokens], 1),
            attention_mask=F.pad(attention_mask, (n, 0), value=1),
            labels=labels,
        )


def test_prompt_tuning_through_the_trainer(tmp_path):
    """The model's own loss of all rows, which rounds logits to float32, against 2 x 4."""
    torch.manual_seed(3)
    model = PromptTuned(3)
    collator = MaskLabels(Collator(), mask_sources=True)
    own = model(**collator(make_rows()))
    own.loss.backward()
    expected = model.prompt.detach() - LEARNING_RATE * model.prompt.grad
    trainer = make_trainer(
        model, tmp_path, data_collator=collator, batch=4, accumulate=2,
        compute_loss_func=functools.partial(causal_lm_loss, virtual_tokens=3),
    )  # fmt: skip
    follow = TokenLossCallback(check_padding=True).attach(trainer)
    trainer.train()
    torch.testing.assert_close(model.prompt.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logged(trainer, "token_loss"), [own.loss.item()], rtol=1e-6, atol=0)
    assert follow.padding_report and follow.padding_report.changes
    with pytest.raises(ValueError, match=r"are there 3 virtual tokens in front\? Then virtual_to"):
        causal_lm_loss(own, collator(make_rows())["labels"])


def test_one_graph_for_all_of_it():
    logits, labels, shifted = causal_example()
    weight = torch.rand(2, 6)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits, labels, shifted, weight, count):
        first = causal_lm_loss({"logits": logits}, labels, count, token_weight=weight)
        second = causal_lm_loss({"logits": logits}, None, count, shift_labels=shifted)
        tuned = causal_lm_loss({"logits": logits}, labels[:, 2:], count, virtual_tokens=2)
        return first, second, tuned

    count = torch.tensor(7)
    got = compiled(logits, labels, shifted, weight, count)
    expected = (
        causal_lm_loss((logits,), labels, 7, token_weight=weight),
        causal_lm_loss((logits,), None, 7, shift_labels=shifted),
        causal_lm_loss((logits,), labels[:, 2:], 7, virtual_tokens=2),
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("fake", [True, False])
def test_tensors_without_data(fake):
    """As a dry run or a tracer has them: nothing is read."""
    logits, labels, shifted = causal_example()
    tensors = [logits.float(), labels, shifted, torch.rand(2, 6), torch.tensor(7)]
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    logits, labels, shifted, weight, count = (
        mode.from_tensor(x) if fake else x.to("meta") for x in tensors
    )
    with mode:
        losses = [
            causal_lm_loss((logits,), labels, count, token_weight=weight),
            causal_lm_loss((logits,), None, 7, shift_labels=shifted),
            causal_lm_loss((logits,), labels[:, 2:], count, virtual_tokens=2),
        ]
    for loss in losses:
        assert loss.shape == () and loss.dtype == torch.float32 and loss.device == logits.device
