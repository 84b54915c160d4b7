# SPDX-License-Identifier: BSD-3-Clause
"""What the act prints."""

from __future__ import annotations

from collections.abc import Mapping

from ..common.tables import print_table
from .generation import Texts
from .training import IMMEDIATE_WEIGHT, NGRAM, NGRAM_WEIGHT, PENALISED, PLAIN, History

RUNS = (PLAIN, PENALISED)
SIZES = (4, 8, 16, 32)  # of the n-grams that are counted
TELLING = 16  # the one that says most
REAL = "held-out functions"
Written = Mapping[tuple[str, float], Texts]


def decoding(temperature: float) -> str:
    return f"T = {temperature:g}" if temperature else "greedy"


def print_losses(histories: Mapping[str, History]) -> None:
    plain, penalised = (histories[name] for name in RUNS)
    seconds = ", ".join(f"{history.seconds:.1f} s" for history in histories.values())
    print(
        f"\n{len(plain.train)} steps twice from the same weights on the same batches: {seconds}. "
        f"Penalty: {NGRAM_WEIGHT:g} x\nmean -log(1 - p) of bytes that would complete an earlier "
        f"{NGRAM}-gram of the text and are wrong, {IMMEDIATE_WEIGHT:g} x the same\nof the byte "
        "before. Held-out bits per byte, of the cross entropy alone; penalty of the last "
        "tenth of\nthe steps, nats\n"
    )
    rows = []
    for name, history in histories.items():
        last = history.penalties[-max(1, len(history.penalties) // 10) :]
        bits = (f"{history.held_out[0][1]:.3f}", f"{history.held_out[-1][1]:.3f}")
        rows.append((name, *bits, f"{sum(last) / len(last):.3f}" if name == PENALISED else "-"))
    print_table(("trained with", "before", "bits per byte", "penalty"), rows)
    change = penalised.held_out[-1][1] / plain.held_out[-1][1] - 1
    print(f"\nHeld-out loss with the penalty: {change:+.1%}.")


def print_repetition(real: Texts, written: Written) -> None:
    number, size = real.tokens.shape
    print(
        f"\n{number} texts of {size - real.prompt} bytes after the first {real.prompt} bytes of "
        "held-out functions. Share of n-grams that stood\nin the same text before, by n; longest "
        "run of one byte, mean; texts that came to an end\n"
    )
    header = ("text", *(f"{n} bytes" for n in SIZES), "longest run", "ended")
    every = {f"{name}, {decoding(t)}": texts for (name, t), texts in written.items()}
    rows = [
        (
            name,
            *(f"{texts.repeated(n):.1%}" for n in SIZES),
            f"{texts.longest_run():.1f}",
            f"{texts.finished():.0%}",
        )
        for name, texts in {REAL: real, **every}.items()
    ]
    print_table(header, rows)
    print(verdict(real, written))


def verdict(real: Texts, written: Written) -> str:
    lines = [
        "\nPeople repeat bytes as well: an indentation is a run of spaces, and short names come "
        f"again. So\n{SIZES[0]} bytes say little; {TELLING} are more than an indentation and a "
        f"name, and the yardstick is what\npeople wrote, {real.repeated(TELLING):.1%}:"
    ]
    for temperature in dict.fromkeys(temperature for _, temperature in written):
        shares = [written[name, temperature].repeated(TELLING) for name in RUNS]
        change = shares[1] - shares[0]
        what = "no difference" if abs(change) < 5e-4 else f"{change * 100:+.1f} points"
        lines.append(
            f"  {decoding(temperature)}: {shares[0]:.1%} without the penalty, {shares[1]:.1%} with "
            f"it ({what})"
        )
    return "\n".join(lines)


def shown(line: str) -> str:
    """With spaces at its end told, as they cannot be seen."""
    text = line.rstrip(" ")
    return text if text == line else f"{text} [{len(line) - len(text)} spaces]"


def print_samples(real: Texts, written: Written) -> None:
    """The greedy texts of which the plain model's repeats most more than the other."""
    greedy = {name: written[name, 0.0] for name in RUNS}
    counts = {name: texts.counts(TELLING) for name, texts in greedy.items()}
    repeated = {name: one.windows - one.distinct for name, one in counts.items()}
    row = int((repeated[PLAIN] - repeated[PENALISED]).argmax())
    print(f"\nGreedy, where the two differ most; the first {real.prompt} bytes are given:")
    for name, texts in greedy.items():
        lines = texts.text(row).expandtabs(4).splitlines()
        print(f"\n  {name}:\n" + "\n".join(f"    {shown(line)}" for line in lines))
    print()
