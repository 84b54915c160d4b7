# SPDX-License-Identifier: BSD-3-Clause
"""Properties of the unified loss: its total against plain_unified's loops in float64, and what
holds for every module of its family."""

import copy

import torch
import unified_cases

from masked_loss_ext import UnifiedLoss
from tests.fuzz.agreement import assert_bits
from tests.fuzz.choices import poison_value
from tests.unified import test_laws, test_loss

V, H, E, EOS, PAD = test_loss.V, test_loss.H, test_loss.E, test_loss.EOS, test_loss.PAD
MASKED = [case for case in unified_cases.CASES if case.mask]


def _options(c):
    wanted = c.byte()
    primary = c.pick(("standard", "deepseek", "adaptive_mtp"))
    options = {
        "primary_loss_type": primary,
        "label_smoothing": c.pick((0.1, 0.0, 0.5)),
        "penalty_on": c.pick(("targets", "model")),
        "ngram_size": c.pick((2, 1, 3, 9)),
        "use_ngram_penalty": not wanted & 1,
        "use_immediate_repetition_penalty": not wanted & 2,
        "eos_token_id": EOS if wanted & 4 else None,
        "pad_token_id": PAD if wanted & 8 else None,
        "use_focal_loss": bool(wanted & 16),
        "focal_mode": c.pick(("replace", "add", "report")),
        "focal_gamma": c.pick((2.0, 0.5, 0.0)),
        "min_sequence_length": c.pick((4, 0, 20)),
    }
    if primary == "deepseek":  # a number that float32, as which T is kept, holds
        options["initial_temperature"] = c.pick((1.0, 1.25, 0.5))
        options["adaptive_temperature"] = bool(c.below(2))
    if wanted & 32:
        options |= dict(num_experts=E, use_moe_balancing=True, use_auxiliary_loss=True)
        options["use_diversity_loss"] = bool(c.below(2))
    if wanted & 64 and primary != "adaptive_mtp":
        options |= dict(use_mtp=True, mtp_type="adaptive", mtp_weight=0.7)
    return options


def unified_loss(c):
    """Total and gradients; NaN wherever the mask or the target says no."""
    options, shape, g = _options(c), (c.pick((3, 1, 2)), c.pick((6, 2, 10))), c.generator()
    active, share = bool(c.below(2)), c.pick((0.8, 1.0, 0.4))
    targets = torch.randint(0, V, shape, generator=g)
    targets = torch.where(torch.rand(shape, generator=g) < 0.1, -100, targets)
    mask = torch.rand(shape, generator=g) < share
    mask[0, :2], targets[0, :2] = True, targets[0, :2].clamp(min=0)
    c.said |= {**options, "shape": shape, "mtp_active": active}
    given = {"targets": targets, "attention_mask": mask.long()}
    given |= _values(g, shape, ~mask | (targets == -100))
    loss_fn = UnifiedLoss(V, H, **options).double()
    unused = (
        []
        if loss_fn.diversity_loss is not None or loss_fn.auxiliary_loss is not None
        else ["expert_outputs"]
    )
    ours = _evaluate(lambda x: loss_fn(**x, mtp_active=active), given, unused)
    theirs = _evaluate(lambda x: test_loss.composed(loss_fn, x, active), given, ())
    for name, result in ours.items():
        torch.testing.assert_close(
            result,
            theirs[name],
            rtol=1e-6,
            atol=1e-8,
            check_dtype=False,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def _values(g, shape, off):
    def randn(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    tokens = off.numel()
    return {
        "logits": randn(*shape, V).masked_fill(off[..., None], torch.nan),
        "hidden_states": randn(*shape, H),
        "additional_logits": [randn(*shape, V) for _ in range(min(2, shape[1] - 1))],
        "confidence_scores": torch.rand(*shape, 1, generator=g, dtype=torch.float64),
        "gate_logits": randn(tokens, E).masked_fill(off.reshape(-1, 1), torch.nan),
        "expert_indices": torch.randint(E, (tokens, 2), generator=g),
        "expert_outputs": [randn(tokens, H) for _ in range(E)],
    }


def _evaluate(function, given, unused):
    given = {name: copy.deepcopy(x) for name, x in given.items() if name not in unused}
    leaves = [given[n].requires_grad_() for n in ("logits", "confidence_scores", "gate_logits")]
    leaves += [x.requires_grad_() for x in given["additional_logits"]]
    total = function(given)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    # Where nothing of a row counts NaN times 0 is left in the loops' gradient.
    return {"total": total.detach()} | {f"grad {i}": x for i, x in enumerate(zeros)}


def unified_modules(c):
    """What the mask excludes changes no bit, in any dtype; the state neither."""
    case, shape = c.pick(MASKED), (c.pick((3, 1, 2)), c.pick((7, 1, 2, 4)))
    dtype, seed, kind = c.pick((torch.float32, torch.float64, torch.bfloat16)), c.byte(), c.poison()
    g, share = c.generator(), c.pick((0.7, 0.3, 1.0, 0.0))
    mask = torch.rand(shape, generator=g) < share
    if {"hidden_states", "additional_logits"} & set(case.masked):
        # A head predicts from masked positions, too, where the target further on counts.
        mask = mask.sort(-1, descending=True).values
    c.said |= {"case": case.name, "shape": shape, "dtype": dtype}
    module = case.make()
    if dtype == torch.float64:
        module = module.double()
    other = copy.deepcopy(module)
    clean = unified_cases.batch(*shape, dtype=dtype, seed=seed, mask=mask)
    bad = test_laws.poison(case, clean, poison_value(kind, dtype))
    results = []
    for one, entries in ((module, clean), (other, bad)):
        loss, grads, _ = test_laws.evaluate(case, entries, one)
        found = {"loss": loss.detach()} | dict(one.named_buffers())
        found |= {f"grad {i}": grad for i, grad in enumerate(grads) if grad is not None}
        results.append(found)
    assert_bits(results[1], results[0], "garbage")
    c.saw("cross_entropy_terms") if "logits" in case.masked else None
