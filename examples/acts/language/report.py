# SPDX-License-Identifier: BSD-3-Clause
"""What the act prints."""

from __future__ import annotations

from collections.abc import Sequence

from ..common.cost import OURS, Cost
from ..common.tables import print_table
from .data import Batch
from .head import PLAIN_LOGITS, HeadRun
from .measure import SHIFTED, SLICED, FormOnBatch, StepCost
from .training import AHEAD, History

HEADS = [f"t+{k}" for k in range(1, AHEAD + 1)]


def print_data(train: Sequence[bytes], held_out: Sequence[bytes], files: tuple[int, int]) -> None:
    lengths = sorted(map(len, (*train, *held_out)))
    low, median, high = (lengths[int(q * (len(lengths) - 1))] for q in (0.1, 0.5, 0.9))
    print(
        f"{len(train)} functions of {files[0]} modules to train on, {len(held_out)} of "
        f"{files[1]} others held out;\nbytes: 10 % below {low}, half below {median}, "
        f"10 % above {high}"
    )


def print_training(
    masked: History, counted: History, start: Sequence[float], held_out: Sequence[Batch]
) -> None:
    real = sum(batch.real_bytes() for batch in held_out)
    print(
        f"\n{len(masked.train)} steps twice from the same weights on the same batches, "
        f"{masked.padding:.0%} of them padding: {masked.seconds:.1f} s\nand "
        f'{counted.seconds:.1f} s. Held-out bits per byte. "says": the next byte\'s loss as the '
        f"run itself measures it;\nt+1 ... t+{AHEAD}: the true ones of each head, on the {real} "
        "real bytes alone. Both start from\ncounts of what follows each byte\n"
    )
    runs = {"padding masked": masked, "padding counted": counted}
    rows = [("counts alone", "", *(f"{bits:.3f}" for bits in start))]
    for name, run in runs.items():
        rows.append((name, f"{run.reported:.3f}", *(f"{bits:.3f}" for bits in run.heads)))
    print_table(("trained with", "says", *HEADS), rows)
    says, truth = counted.reported, counted.heads[0]
    print(
        f"\nThe run that counts padding says {says:.2f} bits where the truth is {truth:.2f}: "
        f"{abs(1 - says / truth):.0%} too {'little' if says < truth else 'much'}.\n"
        f"Its model is {describe(truth / masked.heads[0] - 1)} than the one trained with the mask."
    )


def describe(change: float) -> str:
    """A relative change of a loss, in words."""
    if abs(change) < 5e-4:
        return "no better and no worse"
    return f"{abs(change):.1%} {'worse' if change > 0 else 'better'}"


def print_step_costs(
    steps: dict[str, StepCost], forms: dict[str, FormOnBatch], cost: Cost, batch: Batch
) -> None:
    rows, longest = batch.tokens.shape
    print(
        f"\nA training step of {rows} x {longest} bytes, {batch.padding():.0%} padding, by the "
        "loss it uses: real bytes per\nsecond, time in forward and backward of the loss, the "
        "loss's peak memory. Garbage: NaN logits\nand labels of 99999 in the padding\n"
    )
    header = ("loss", "off by", "bytes/s", "step", "in the loss", "share", "peak memory")
    table = []
    for name, step in steps.items():
        table.append(
            (
                name,
                f"{round(forms[name].off_by, 6) + 0.0:+.2%}",  # + 0.0: no "-0.00%"
                f"{batch.real_bytes() / step.step_us * 1e6:.0f}",
                f"{step.step_us / 1000:.1f} ms",
                f"{step.loss_us / 1000:.2f} ms",
                f"{step.loss_us / step.step_us:.1%}",
                cost.peak(name),
                forms[name].loss_with_garbage,
                forms[name].gradient_with_garbage,
            )
        )
    print_table((*header, "garbage: loss", "gradient"), table)
    print(honest_words(steps))


def honest_words(steps: dict[str, StepCost]) -> str:
    """What the loss makes of the whole step; all else in it is the same for every loss."""
    best = min((SLICED, SHIFTED), key=lambda name: steps[name].loss_us)
    gain = (steps[best].loss_us - steps[OURS].loss_us) / steps[OURS].step_us
    share, other = (steps[name].loss_us / steps[name].step_us for name in (OURS, best))
    return (
        f"\nWith 256 classes the loss is a small part of the step, {share:.1%} with {OURS} and "
        f"{other:.1%}\nwith the better of the others: it makes the step {abs(gain):.1%} "
        f"{'shorter' if gain > 0 else 'longer'}, and what the mask buys here\nis the right number. "
        "Speed and memory matter where there are many classes:"
    )


def print_large_vocabulary(cost: Cost) -> None:
    rows, longest, classes = cost.shape
    logits = AHEAD * rows * longest * classes * 4 / 2**20
    print(
        f"\nThe loss alone, not this model's: random logits of {rows} x {longest} tokens and "
        f"{classes} classes for {AHEAD} heads\n({logits:.0f} MiB), 45 % padding; forward + "
        f"backward, median of {cost.rounds} interleaved rounds, and peak memory with\nthe "
        "gradients, in a process of its own\n"
    )
    table = [
        (name, cost.milliseconds(name), cost.times_ours(name), cost.peak(name))
        for name in cost.step_us
    ]
    print_table(("loss", "time", "x ours", "peak memory"), table)


def print_heads(run: HeadRun) -> None:
    rows, longest, classes = run.cost.shape
    share = run.cost.step_us[OURS] / run.cost.step_us[PLAIN_LOGITS]
    print(
        f"\nA model of words with a head of {classes} classes, {run.words} of them words of the "
        f"functions, trained three times\nfrom the same weights for {run.cost.rounds} steps of "
        f"{rows} functions of up to {longest} words, {run.padding:.0%} padding. With\n"
        f"masked_linear_cross_entropy its logits ({rows * longest * classes * 4 / 2**20:.0f} MiB) "
        "are never made, and of padding no product is\ntaken: median step, and peak memory of "
        "forward and backward with all gradients, in a process of its own\n"
    )
    table = [
        (
            "without logits" if name == OURS else name,
            f"{run.losses[name][-1]:.4f}",
            run.cost.milliseconds(name),
            run.cost.times_ours(name),
            run.cost.peak(name),
        )
        for name in run.cost.step_us
    ]
    print_table(("loss", "nats/word at the end", "step", "x ours", "peak memory"), table)
    print(f"\nThe step takes {share:.0%} of the time that it takes with {PLAIN_LOGITS}.")


def print_sample(texts: Sequence[str]) -> None:
    print("\nWhat the model trained with the mask writes (temperature 0.7):")
    for text in texts:
        print("\n" + "\n".join(f"    {line}" for line in text.expandtabs(4).splitlines()))
    print()
