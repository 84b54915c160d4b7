# SPDX-License-Identifier: BSD-3-Clause
"""Documentation is executed: docstring examples, usage as users write it (pages: tests/docs)."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import masked_loss_ext as mle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
NAMES = [
    "AttentionMaskMseLoss",
    "ChannelInvariantTokenLoss",
    "HiddenStateMTPLoss",
    "MaskEditLoss",
    "MaskedCrossEntropyLoss",
    "MaskedLinearCrossEntropyLoss",
    "MseLoss",
    "MultiTokenPredictionLoss",
    "PackedLayout",
    "RowIntervals",
    "UnifiedLoss",
    "aggregate_tokens",
    "check_padding",
    "compute_loss_multi_resolution",
    "create_unified_loss",
    "lengths_to_mask",
    "linear_row_statistics",
    "map_mask_to_latent",
    "mask_labels",
    "masked_cross_entropy",
    "masked_edit_token_mean_loss",
    "masked_linear_cross_entropy",
    "masked_mse",
    "masked_sse",
    "nested_dropout_block_mask",
    "pad_latents_for_multi_res",
    "row_statistics",
    "sample_keep_k",
    "shift_labels",
    "unpad",
]
FUNCTIONS = [name for name in NAMES if name[0].islower()]
MODULES = [
    name for name in NAMES if name[0].isupper() and issubclass(getattr(mle, name), torch.nn.Module)
]


def samples():
    """The tensors that docstring examples speak of."""
    g = torch.Generator().manual_seed(0)
    names = {name: getattr(mle, name) for name in mle.__all__}
    return names | {
        "torch": torch,
        "F": torch.nn.functional,
        "mle": mle,
        "model_pred": torch.randn(2, 5, 4, generator=g),
        "target": torch.randn(2, 5, 4, generator=g),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        "edit_mask": torch.rand(2, 5, generator=g),
        "weighting": torch.rand(2, 5, 1, generator=g),
        "x_recon": torch.randn(2, 4, generator=g),
        "x": torch.randn(2, 4, generator=g),
        "logits": torch.randn(2, 5, 7, generator=g),
        "logits_list": [torch.randn(2, 5, 7, generator=g) for _ in range(2)],
        "labels": torch.randint(7, (2, 5), generator=g),
        "hidden": torch.randn(2, 5, 4, generator=g),
        "weight": torch.randn(7, 4, generator=g),
        "visible": torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool),
    }


def test_public_names():
    assert set(NAMES) <= set(mle.__all__)
    for name in mle.__all__:
        assert hasattr(mle, name)
    assert mle.ChannelInvariantTokenLoss is mle.AttentionMaskMseLoss
    visible = {n for n in vars(mle) if not n.startswith("_") and not inspect.ismodule(vars(mle)[n])}
    assert visible <= set(mle.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(mle, name), name, globs=samples())
    examples = [example for test in tests for example in test.examples]
    assert examples, f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_a_reader_needs(name):
    text = inspect.getdoc(getattr(mle, name))
    first = text.splitlines()[0]
    assert first.rstrip()[-1] in ".:" and first[0] != " ", "begins with a sentence"
    function = getattr(mle, name)
    if name in MODULES:
        function = function.forward
        assert function.__doc__, "forward has no docstring"
        text += function.__doc__ + inspect.getdoc(mle.masked_edit_token_mean_loss)
    refers = re.search(r"as in\s+``(\w+)``", text)
    if refers:
        text += inspect.getdoc(getattr(mle, refers.group(1)))
    parameters = set(inspect.signature(function).parameters) - {"self", "unknown"}
    missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert not missing, "arguments that are not described"
    assert re.search(r"``\[[\w.,* ()/+]*\]``", text), "no shape"
    if name in FUNCTIONS:
        assert "Args:" in text and "Returns:" in text


def test_every_function_of_reference_has_a_docstring():
    for name in mle.reference.__all__:
        assert inspect.getdoc(getattr(mle.reference, name)), name


# --- usage as documented for each loss: positional order, defaults, keywords ---------------------


def test_usage_of_token_losses():
    s = samples()
    loss_fn = mle.AttentionMaskMseLoss(foreground_weight=2.0, background_weight=1.0)
    assert repr(loss_fn) == (
        "AttentionMaskMseLoss(foreground_weight=2.0, background_weight=1.0, eps=1e-12, "
        "reduction='mean')"
    )
    assert not list(loss_fn.parameters()) and not list(loss_fn.buffers())
    pair = s["model_pred"].requires_grad_(), s["target"]
    masks = s["attention_mask"], s["edit_mask"]
    plain = loss_fn(*pair, masks[0])
    plain.backward()
    assert (pair[0].grad[masks[0] == 0] == 0).all()
    edited = loss_fn(*pair, *masks)
    weighted = loss_fn(*pair, *masks, s["weighting"])
    functional = mle.masked_edit_token_mean_loss(
        *pair,
        masks[0],
        edit_mask=masks[1],
        weighting=s["weighting"],
        foreground_weight=2.0,
        background_weight=1.0,
    )
    assert torch.equal(functional, weighted) and edited > plain
    # what a trainer passes to whichever loss it was given
    keywords = dict(attention_mask=masks[0], edit_mask=masks[1], weighting=None)
    assert torch.equal(loss_fn(model_pred=pair[0], target=pair[1], **keywords), edited)
    for other in (mle.MaskEditLoss(), mle.MseLoss()):
        other(model_pred=pair[0], target=pair[1], **keywords).backward()


def test_usage_of_multi_resolution_batches():
    loss_fn = mle.AttentionMaskMseLoss(foreground_weight=2.0, background_weight=1.0)
    latents = [torch.randn(n, 64) for n in (100, 150, 120)]
    padded, attention_mask = mle.pad_latents_for_multi_res(latents, 150)
    assert padded.shape == (3, 150, 64) and attention_mask.shape == (3, 150)
    loss = loss_fn(padded, torch.zeros_like(padded), attention_mask)
    torch.testing.assert_close(loss, torch.cat(latents).square().mean())


def test_usage_of_autoencoder_losses():
    s = samples()
    mask = ~s["visible"]
    expected = (s["x_recon"][mask] - s["x"][mask]).square()
    sse = mle.masked_sse(s["x_recon"], s["x"], mask, reduction="batch_mean")
    mse = mle.masked_mse(s["x_recon"], s["x"], mask, reduction="mean")
    torch.testing.assert_close(sse, expected.sum() / 2)
    torch.testing.assert_close(mse, expected.mean())


def test_usage_of_language_model_losses():
    s = samples()
    logits, tokens, mask = s["logits"].requires_grad_(), s["labels"], s["attention_mask"]
    loss = mle.MaskedCrossEntropyLoss(shift=1)(logits, tokens, mask)
    masked = mle.mask_labels(tokens, mask)
    rows, targets = logits[:, :-1].flatten(0, 1), masked[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(rows, targets)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[:, :-1][mask[:, 1:] == 0] == 0).all() and (logits.grad[:, -1] == 0).all()
    # what code for the list-of-heads loss does: defaults, positions, a dict of printable values
    total, loss_dict = mle.MultiTokenPredictionLoss(
        n_pred_tokens=4, aux_loss_weights=(1.0, 0.5, 0.3, 0.2), ignore_index=-100
    )(s["logits_list"] * 2, tokens, mask)
    names = [f"loss_t{i}" for i in (1, 2, 3, 4)] + ["total_multitoken_loss"]
    assert list(loss_dict) == names and f"{loss_dict[names[-1]]:.4f}" == f"{total.item():.4f}"


SIZES = {"HiddenStateMTPLoss": (7, 4), "UnifiedLoss": (7,)}  # that have no defaults


def arguments(name):
    """What a loss module is called with."""
    s = samples()
    if name == "HiddenStateMTPLoss":
        return s["model_pred"], s["labels"]
    if name == "UnifiedLoss":
        return s["logits"], s["labels"]
    if name == "MaskedCrossEntropyLoss":
        return s["logits"], s["labels"]
    if name == "MaskedLinearCrossEntropyLoss":
        return s["hidden"], s["weight"], s["labels"]
    if name == "MultiTokenPredictionLoss":
        return s["logits_list"] * 2, s["labels"]
    return s["model_pred"], s["target"]


@pytest.mark.parametrize("name", MODULES)
def test_modules_can_be_pickled_and_copied(name, tmp_path):
    import copy

    module = getattr(mle, name)(*SIZES.get(name, ()))
    torch.save(module, tmp_path / "loss.pt")
    loaded = torch.load(tmp_path / "loss.pt", weights_only=False)
    copied = copy.deepcopy(module)
    expected = module(*arguments(name))
    for other in (loaded, copied):
        assert repr(other) == repr(module)
        torch.testing.assert_close(other(*arguments(name)), expected, rtol=0, atol=0)
