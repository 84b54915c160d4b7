# SPDX-License-Identifier: BSD-3-Clause
"""use_causal_lm_loss: the model's own loss, in the real Trainer and by hand."""

import copy
import pickle

import pytest
import torch
from places import place

place("transformers")

from tiny_models import (  # noqa: E402
    LOGGED,
    Collator,
    logged,
    make_model,
    make_rows,
    train,
    trained_by_hand,
    weights,
)
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

import masked_loss_ext as mle  # noqa: E402
from masked_loss_ext.integrations import _loss_function  # noqa: E402
from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    logit_free,
    use_causal_lm_loss,
)

ARRANGEMENTS = [(8, 1), (4, 2), (1, 8)]  # rows in a micro-batch, micro-batches in a step
ROUNDING = dict(rtol=1e-12, atol=1e-13)


def batch_of(model):
    batch = MaskLabels(Collator())(make_rows())
    return batch | {"labels": batch["labels"].clone()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(name, tmp_path):
    """The weights of a float64 model come out to its rounding, which its own loss in float32 would
    not give: the operator ran."""
    loss, expected = trained_by_hand(name, make_rows())
    close = dict(rtol=0, atol=1e-8) if name == "gemma2" else ROUNDING  # norms in float32
    for batch, accumulate in ARRANGEMENTS:
        model = use_causal_lm_loss(make_model(name))
        options = dict(compute_loss_func=None, batch=batch, accumulate=accumulate)
        trainer = train(model, tmp_path, **options)
        torch.testing.assert_close(weights(model), expected, **close)
        torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)


def test_a_broken_hook_is_noticed(tmp_path, monkeypatch):
    """What the test before would see if the count were not that of the window."""

    def without_count(outputs, labels, num_items_in_batch, **options):
        return causal_lm_loss(outputs, labels, None, **options)

    causal_lm_loss = _loss_function.causal_lm_loss
    monkeypatch.setattr(_loss_function, "causal_lm_loss", without_count)
    _, expected = trained_by_hand("llama", make_rows())
    model = use_causal_lm_loss(make_model("llama"))
    train(model, tmp_path, compute_loss_func=None, batch=4, accumulate=2)
    assert (weights(model) - expected).abs().max() > 1e-3


def test_against_the_reference_with_options():
    model = make_model("llama").train()
    batch = batch_of(model)
    options = dict(label_smoothing=0.1, z_loss=1e-2, focal_gamma=1.0)
    outputs = use_causal_lm_loss(model, **options)(**batch, num_items_in_batch=torch.tensor(7))
    expected = mle.reference.masked_cross_entropy(
        outputs.logits, batch["labels"], shift=1, normalizer=7, **options
    )
    torch.testing.assert_close(outputs.loss, expected)
    shifted = mle.shift_labels(batch["labels"], batch["labels"] != -100)
    given = {k: v for k, v in batch.items() if k != "labels"}
    loss = model.loss_function(model(**given).logits, None, 61, 7, shift_labels=shifted)
    torch.testing.assert_close(loss, expected)


def test_no_label_counts():
    model = use_causal_lm_loss(make_model("llama"))
    ids = torch.arange(6).reshape(1, 6)
    loss = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    assert loss == 0
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_copies_and_undoing():
    model = use_causal_lm_loss(make_model("llama"), z_loss=0.5)
    batch = batch_of(model)
    loss = model(**batch).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch).loss, loss)
    use_causal_lm_loss(model)  # without the option
    plain = model(**batch).loss
    assert plain < loss
    model.loss_function = ForCausalLMLoss
    torch.testing.assert_close(model(**batch).loss.double(), plain, rtol=1e-6, atol=0)
    logit_free(model)


def test_refusals():
    with pytest.raises(TypeError, match="model must be a PreTrainedModel, not wrapped, got Linear"):
        use_causal_lm_loss(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="loss_function of BertForMaskedLM must be ForCausalLMLoss"
    ):
        use_causal_lm_loss(make_model("bert"))
    with pytest.raises(TypeError, match="unexpected keyword argument z_los; did you mean z_loss"):
        use_causal_lm_loss(make_model("llama"), z_los=1e-4)
    with pytest.raises(TypeError, match="unexpected keyword argument mask"):
        use_causal_lm_loss(make_model("llama"), mask=torch.ones(2, 2))
    model = use_causal_lm_loss(make_model("llama"))
    with pytest.raises(ValueError, match="loss_function of LlamaForCausalLM must be ForCausal"):
        logit_free(model)


def test_the_kernel_mapping_of_transformers_reaches_no_loss():
    """Why it is not offered: when a release's models do have such a layer, this says so."""
    kernel_config = pytest.importorskip("transformers.utils.kernel_config", reason="transformers 4")
    if not hasattr(kernel_config.KernelConfig, "sanitize_kernel_mapping"):
        pytest.skip("this release of transformers has no KernelConfig that checks its layers")
    config = kernel_config.KernelConfig(
        {"ForCausalLMLoss": "/a/folder:Layer"}, use_local_kernel=True
    )
    with pytest.raises(ValueError, match="Layer ForCausalLMLoss is not registered in the model"):
        config.sanitize_kernel_mapping(make_model("llama"))
    assert "cpu" not in kernel_config.KERNELS_SUPPORTED_DEVICE_TYPES
