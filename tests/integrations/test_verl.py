# SPDX-License-Identifier: BSD-3-Clause
"""The policy loss that verl finds by its name, in verl's own ppo_loss, against sums by hand."""

import pytest
import torch
from places import place

pytestmark = pytest.mark.slow
place("verl", "ray", "tensordict")

from tensordict import TensorDict  # noqa: E402
from verl.trainer.ppo.core_algos import get_policy_loss_fn  # noqa: E402
from verl.utils.import_utils import import_external_libs  # noqa: E402
from verl.workers.config import ActorConfig, PolicyLossConfig  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402

import_external_libs("masked_loss_ext.integrations.verl")  # as external_lib of a configuration
from masked_loss_ext.integrations.verl import policy_loss  # noqa: E402

MODES = [
    "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]  # fmt: skip
B, S = 4, 6
LENGTHS = (6, 2, 4, 1)


def config_of(mode, name="masked_loss_ext", **options):
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_mini_batch_size=B, ppo_micro_batch_size_per_gpu=B,
        clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=2.0, loss_agg_mode=mode,
        policy_loss=PolicyLossConfig(loss_mode=name), **options,
    )  # fmt: skip
    config.global_batch_info.update({})
    return config


def numbers(nan=False):
    """Ratios on both sides of both limits, advantages of both signs, weights of the rollout."""
    g = torch.Generator().manual_seed(7)
    draw = {
        name: torch.randn(B, S, generator=g, dtype=torch.float64)
        for name in ("old_log_prob", "log_prob", "advantages")
    }
    mask = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    weights = torch.rand(B, S, generator=g, dtype=torch.float64)
    if nan:
        for name in draw:
            draw[name][~mask] = torch.nan
    draw["log_prob"].requires_grad_()
    return draw | {"response_mask": mask, "rollout_is_weights": weights}


def by_hand(x, mode, ranks=1, tokens=None, sequences=None, scale=None):
    """Token by token."""
    rows = []
    for i, length in enumerate(LENGTHS):
        row = []
        for t in range(length):
            ratio, a = (x["log_prob"][i, t] - x["old_log_prob"][i, t]).exp(), x["advantages"][i, t]
            loss = -torch.minimum(ratio * a, ratio.clamp(0.9, 1.3) * a)
            if a < 0:
                loss = torch.minimum(loss, -2.0 * a)
            row.append(loss * x["rollout_is_weights"][i, t])
        rows.append(torch.stack(row))
    tokens, sequences = tokens or sum(LENGTHS), sequences or B
    total = {
        "token-mean": sum(r.sum() for r in rows) / tokens,
        "token-sum": sum(r.sum() for r in rows),
        "seq-mean-token-mean": sum(r.mean() for r in rows) / sequences,
        "seq-mean-token-sum": sum(r.sum() for r in rows) / sequences,
        "seq-mean-token-sum-norm": sum(r.sum() for r in rows) / sequences / (scale or S),
    }[mode]
    return total * ranks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nan", [False, True])
def test_by_hand(mode, nan):
    """Loss and gradient, whatever stands beside the mask."""
    x = numbers()
    expected = by_hand(x, mode)
    gradient = torch.autograd.grad(expected, x["log_prob"])[0]
    x = numbers(nan)
    loss, metrics = get_policy_loss_fn("masked_loss_ext")(
        **x, loss_agg_mode=mode, config=config_of(mode)
    )
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(loss, x["log_prob"])[0], gradient)
    own = get_policy_loss_fn("vanilla")(
        **numbers(), loss_agg_mode=mode, config=config_of(mode, "vanilla")
    )[1]
    assert metrics.keys() == own.keys()
    for name, value in own.items():
        assert metrics[name] == pytest.approx(value, rel=1e-6), name


def test_verls_own_is_nan_there():
    """What the test before would see of the loss that verl takes without it."""
    mode = "seq-mean-token-mean"
    config = config_of(mode, "vanilla")
    loss, _ = get_policy_loss_fn("vanilla")(**numbers(nan=True), loss_agg_mode=mode, config=config)
    assert loss.isnan()


@pytest.mark.parametrize("mode", MODES)
def test_a_part_of_a_batch_over_ranks(mode):
    """Two micro-batches of one of two ranks add up to what the whole batch says."""
    x, config = numbers(), config_of(mode)
    info = dict(dp_size=2, batch_num_tokens=31, global_batch_size=11, loss_scale_factor=5)
    config.global_batch_info.update(info)
    expected = by_hand(x, mode, 2, 31, 11, 5)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        mine = {name: value[part] for name, value in x.items()}
        parts.append(policy_loss(**mine, loss_agg_mode=mode, config=config)[0])
    torch.testing.assert_close(sum(parts), expected)


def test_in_verls_ppo_loss():
    """verl's own entry point, with its nested batch, its entropy bonus and its divergence."""
    results = []
    for name in ("vanilla", "masked_loss_ext"):
        x = {k: v.detach().float() for k, v in numbers().items()}
        mask = x.pop("response_mask").bool()
        config = config_of("token-mean", name, use_kl_loss=True, kl_loss_coef=0.5)
        log_prob = x["log_prob"].requires_grad_()
        lengths = mask.sum(1)

        def nested(value, lengths=lengths):
            rows = [row[: int(n)] for row, n in zip(value, lengths, strict=True)]
            return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

        prompts = [torch.zeros(1, dtype=torch.int64)] * B
        prompts = torch.nested.as_nested_tensor(prompts, layout=torch.jagged)
        data = TensorDict(
            {
                "response_mask": nested(mask), "old_log_probs": nested(x["old_log_prob"]),
                "advantages": nested(x["advantages"]), "ref_log_prob": nested(x["old_log_prob"]),
                "rollout_is_weights": nested(x["rollout_is_weights"]), "prompts": prompts,
                "responses": nested(mask.long()), "input_ids": nested(mask.long()),
            },
            batch_size=B,
        )  # fmt: skip
        for key, value in dict(dp_size=1, batch_num_tokens=13, global_batch_size=B).items():
            data.set_non_tensor(key, value)
        output = {"log_probs": whole_rows(log_prob, mask)}
        loss, metrics = ppo_loss(config, output, data)
        results.append((loss.item(), torch.autograd.grad(loss, log_prob)[0], set(metrics)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    torch.testing.assert_close(results[1][1], results[0][1])
    assert results[1][2] == results[0][2]


def whole_rows(log_prob, mask):
    """Of prompt and response together: what stands at t says how likely token t + 1 is."""
    rows = [torch.cat([row[on], row.new_zeros(1)]) for row, on in zip(log_prob, mask, strict=True)]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def test_refusals():
    x = numbers()
    with pytest.raises(ValueError, match="loss_agg_mode must be one of token-mean, .*, got words"):
        policy_loss(**x, loss_agg_mode="words", config=config_of("token-mean"))
    with pytest.raises(ValueError, match="config must be that of verl's actor, got None"):
        policy_loss(**x)
    config = config_of("token-mean")
    config.global_batch_info.update(dp_size=2)
    with pytest.raises(ValueError, match="global_batch_info must say how much"):
        policy_loss(**x, config=config)
