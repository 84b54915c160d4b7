# SPDX-License-Identifier: BSD-3-Clause
"""Messages and bytes of real processes are those of tools/scale, by which docs/scale.md is made."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from scale_ways import (
    COUNTERS,
    D,
    N,
    V,
    counted,
    head_and_loss,
    make_rows,
    of_hidden,
    of_logits,
    own,
    place,
    run,
    statistics,
    whole_logits,
)
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import (
    global_token_count,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
)
from tools.scale import messages as formulas
from tools.scale.tables import COUNTED, NOT_COUNTED

SIZES = [2, 4]


def expected(way, size, **sizes):
    return [tuple(message) for message in formulas.messages(way, R=size, **COUNTED | sizes)]


def test_everything_in_the_document_is_counted_or_says_that_it_is_not():
    assert {*COUNTERS, *NOT_COUNTED} == {*formulas.WAYS} == {*formulas.NAMES}
    assert not {*COUNTERS} & {*NOT_COUNTED}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", COUNTERS)
def test_a_way_sends_what_its_formula_says(ranks, way, size):
    for found in ranks(size).run(run, way):
        assert found == expected(way, size)


def test_by_hand(ranks):
    """10 rows: 10 times 4 numbers of 8 bytes and 6 of the header."""
    assert ranks(2).run(run, formulas.LOGITS) == [[("all_gather", 320 + 48)]] * 2


# --- our own, with what changes them -------------------------------------------------------------

LOGITS_OPTIONS = [
    ({}, {}),
    ({"return_stats": True}, {"s": 1}),
    ({"label_smoothing": 0.1}, {"e": 1}),
    ({"return_stats": True, "label_smoothing": 0.1}, {"s": 1, "e": 1}),
    ({"z_loss": 0.1, "focal_gamma": 2.0, "softcap": 9.0, "reduction": "none"}, {}),
    ({"weight": torch.ones(V), "token_weight": torch.ones(N), "temperature": 0.7}, {}),
]


def with_options(options):
    linear = {"class_weight" if name == "weight" else name: x for name, x in options.items()}
    return (
        counted(lambda: of_logits(**options).sum()),
        counted(lambda: of_hidden(**linear).sum()),
        counted(lambda: of_hidden(torch.bfloat16, **linear).sum()),
        counted(lambda: of_hidden(needs=False, **linear).sum()),
    )


@pytest.mark.parametrize("options, sizes", LOGITS_OPTIONS, ids=lambda o: "_".join(o) or "plain")
def test_options(ranks, options, sizes):
    rows = expected(formulas.LOGITS, 2, **sizes)
    found = ranks(2).run(with_options, options)
    for logits, hidden, halves, frozen in found:
        assert logits == rows and frozen == rows
        assert hidden == expected(formulas.LINEAR, 2, **sizes)
        assert halves == expected(formulas.LINEAR, 2, b=2, **sizes)


def linear_statistics():
    hidden, weight, target = make_rows()
    vocab_parallel_linear_row_statistics(hidden, own(weight), target, **place())


def both_statistics():
    return counted(statistics), counted(linear_statistics)


def test_statistics_of_both_forms(ranks):
    assert ranks(2).run(both_statistics) == [(expected(formulas.STATISTICS, 2),) * 2] * 2


def both_forms():
    return sorted(head_and_loss()), sorted(counted(of_hidden))


def test_both_forms_send_the_same_with_the_head(ranks):
    """The gradient of the head's input goes round anyway: by the head or by the loss."""
    for logits, linear in ranks(4).run(both_forms):
        assert logits == linear == sorted(expected(formulas.LINEAR, 4))


def alone():
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    hidden, weight, target = make_rows()
    return [
        *counted(lambda: global_token_count(target, group=group)),
        *counted(lambda: vocab_parallel_cross_entropy(*whole_logits(), group=group)),
        *counted(
            lambda: vocab_parallel_linear_cross_entropy(
                hidden.requires_grad_(), weight, target, group=group
            )
        ),
    ]


def test_a_group_of_one_sends_nothing(ranks):
    assert ranks(2).run(alone) == [[], []] == [expected(formulas.LINEAR, 1)] * 2


# --- training ------------------------------------------------------------------------------------


def unified(logits, labels, mask, count):
    return mle.UnifiedLoss(V, D)(logits, labels, mask)


def causal(logits, labels, mask, count):
    from masked_loss_ext.integrations.transformers import causal_lm_loss

    return causal_lm_loss({"logits": logits}, labels.masked_fill(mask == 0, -100), count)


def cross_entropy(logits, labels, mask, count):
    return mle.masked_cross_entropy(logits, labels, mask, shift=1, normalizer=count)


def squared_error(logits, labels, mask, count):
    return mle.masked_sse(logits, logits.detach().cos(), mask) / count


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed: pip install .[hf]",
)
LOSSES = [unified, cross_entropy, squared_error, pytest.param(causal, marks=needs_transformers)]


def steps_of_ddp(loss_of):
    """Of three steps, each a window of three micro-batches."""
    model = DistributedDataParallel(nn.Linear(D, V, bias=False))
    found = []
    for _ in range(3):
        window = [torch.randn(2, 7, D) for _ in range(3)]
        mask = torch.arange(7) < torch.tensor([[7], [3]])
        labels = torch.randint(V, (2, 7))

        def step(window=window, mask=mask, labels=labels):
            count = global_token_count([mask] * 3, shift=1)
            with model.no_sync():
                for x in window[:-1]:
                    loss_of(model(x), labels, mask, count).backward()
            return loss_of(model(window[-1]), labels, mask, count)

        found.append(counted(step))
    return found


@pytest.mark.parametrize("loss_of", LOSSES)
def test_a_window_sends_the_count_and_the_gradients_once(ranks, loss_of):
    step = expected(formulas.COUNT, 2) + expected(formulas.DDP, 2, P=D * V)
    for first, _, third in ranks(2).run(steps_of_ddp, loss_of):
        assert first == third == step  # in the second DDP also tells the order of its buckets


def step_of_fsdp():
    """A window of three micro-batches, of which the last one's gradients go round."""
    model = fully_shard(nn.Linear(D, V, bias=False), reshard_after_forward=True)
    mask, labels = torch.ones(2, 7), torch.randint(V, (2, 7))

    def step():
        count = global_token_count([mask] * 3, shift=1)
        for i in range(3):
            model.set_requires_gradient_sync(i == 2)
            cross_entropy(model(torch.randn(2, 7, D)), labels, mask, count).backward()

    return counted(step)


def test_fsdp_gathers_weights_for_each_micro_batch(ranks):
    *gathers, scatter = expected(formulas.FSDP, 2, P=D * V)
    for found in ranks(2).run(step_of_fsdp):
        assert found == [*expected(formulas.COUNT, 2), *gathers * 3, scatter]


def step_of_a_sequence():
    """Of 16 tokens each rank has its part."""
    model = DistributedDataParallel(nn.Linear(D, V, bias=False))
    labels = mle.shift_labels(torch.arange(32).view(2, 16))
    labels = labels.chunk(dist.get_world_size(), 1)[dist.get_rank()]
    logits = model(torch.randn(*labels.shape, D))

    def loss():
        return mle.masked_cross_entropy(
            logits, labels, normalizer=global_token_count(labels=labels)
        )

    return counted(loss)


@pytest.mark.parametrize("size", SIZES)
def test_a_sequence_that_is_cut_sends_no_more(ranks, size):
    step = expected(formulas.COUNT, size) + expected(formulas.DDP, size, P=D * V)
    assert ranks(size).run(step_of_a_sequence) == [step] * size
