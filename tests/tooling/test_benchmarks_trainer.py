# SPDX-License-Identifier: BSD-3-Clause
"""The step of the real Trainer: what is timed of it, and that a wrong loss is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
# benchmarks/ is never installed; at the end of the path, so that an installed library wins.
sys.path.append(str(ROOT))

pytest.importorskip("transformers", reason="the Trainer needs transformers")

from benchmarks import agreement, harness, logit_free, trainer_problem  # noqa: E402
from masked_loss_ext.integrations.transformers import causal_lm_loss  # noqa: E402

SIZES = (logit_free.QUICK_LENGTHS, 100, 16, 1)


@pytest.fixture(scope="module")
def problem():
    return trainer_problem.trainer_problem(*SIZES, "cpu")


def test_three_losses_give_the_loss_and_the_gradients_of_the_reference(problem):
    truth = agreement.truth_of(problem)
    found = {one.name: agreement.check(one, truth, problem) for one in problem.contenders}
    assert {name: one.refusal for name, one in found.items()} == {
        "ours": "", "own loss": "", "causal_lm_loss": ""
    }  # fmt: skip
    weights = len(problem.contenders[0].inputs[0]) - 3
    assert [tuple(one.shape) for one in truth[0]] == [(), (weights,)]


def test_a_loss_with_a_wrong_gradient_is_refused(problem):
    def wrong(outputs, labels, num_items_in_batch=None):
        loss = outputs.logits.square().mean()
        right = causal_lm_loss(outputs, labels, num_items_in_batch)
        return right + 0.01 * (loss - loss.detach())

    inputs = problem.contenders[0].inputs[0]
    model = logit_free.make_model(*SIZES[1:])
    one = trainer_problem.training("wrong", model, wrong, inputs)
    refusal = agreement.check(one, agreement.truth_of(problem), problem).refusal
    assert refusal.startswith("loss is off")  # of the results the largest error: the norms'


def test_the_first_step_and_the_start_are_not_timed(problem, monkeypatch):
    steps = []
    trainer = trainer_problem.watched_trainer()
    usual = trainer.training_step

    def counted(self, *others, **more):
        steps.append(self.mark)
        return usual(self, *others, **more)

    monkeypatch.setattr(trainer, "training_step", counted)
    one = problem.contenders[1]
    begin, middle, _ = harness.timed_call(one, harness.HostClock(), 0)
    assert len(steps) == 1 + trainer_problem.STEPS == 1 + one.steps
    assert steps[:2] == [None, None] and steps[2] == begin < middle


def test_the_norm_of_a_large_gradient_has_all_its_digits():
    gradient = torch.full((1 << 24,), 0.1)
    (norm,) = trainer_problem.norms_of([gradient])
    assert norm.item() == pytest.approx(gradient[0].item() * 4096, rel=1e-9)
