# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.fuzz``: until Ctrl-C, or as long as told; exit 1 where something is wrong."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "common")]

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.fuzz.engine import LENGTH, Mismatch, run_code, run_seed  # noqa: E402
from tests.fuzz.properties import BY_NAME, PROPERTIES  # noqa: E402
from tools.fuzz import counts  # noqa: E402

BATCH = 500  # cases of one seed; hypothesis remembers them all
SAVED_EVERY = 60.0  # seconds


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(BY_NAME), metavar="NAME", help="these properties alone")
    add("--seconds", type=float, help="stop after so many")
    add("--cases", type=int, help="stop when every operator of every property has so many")
    add("--problems", type=int, default=BATCH, help=f"of one seed, at most {BATCH}")
    add("--seed", type=int, help="the first seed, which is otherwise drawn and printed")
    add("--code", help="one case again, as printed with a mismatch; with --only NAME")
    add("--record", action="store_true", help="add what was counted to docs/trust/fuzz.csv")
    add("--list", action="store_true", help="the properties and their operators")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    chosen = [BY_NAME[name] for name in options.only] if options.only else list(PROPERTIES)
    if options.list:
        for prop in chosen:
            print(f"{prop.name:24}{' '.join(prop.operators)}")
        return 0
    torch.set_num_threads(1)
    if options.code is not None:
        return again(chosen, options.code)
    faulthandler.enable(sys.__stderr__)
    gc.freeze()
    first = secrets.randbelow(10**9) if options.seed is None else options.seed
    print(f"seeds from {first} on; {len(chosen)} properties; Ctrl-C ends it")
    found = counts.Counts(first, chosen)
    failures = run(chosen, found, first, options)
    found.show()
    for failure in failures:
        print(f"\n{failure}")
    return 1 if failures else 0


def again(chosen, code: str) -> int:
    """A case that was printed; what it raises is shown whole."""
    for prop in chosen:
        try:
            run_code(prop, bytes.fromhex(code).ljust(LENGTH, b"\0"))
        except Mismatch as error:
            raise error.__cause__ from None
        print(f"{prop.name}: right")
    return 0


def run(chosen, found, first, options) -> list[str]:
    """One seed after another, until Ctrl-C or as far as told; what went wrong, in words."""
    failures: list[str] = []
    begin = saved = time.monotonic()
    unsaved = counts.Counts(first, chosen)
    wanted = options.cases and int(sum(wanted_of(prop, options) for prop in chosen))
    with tqdm(total=wanted, unit=" cases", smoothing=0.05) as bar:
        try:
            number = first
            while time.monotonic() - begin < (options.seconds or float("inf")):
                prop = furthest_behind(chosen, found)
                if prop is None or found.done[prop.name] >= wanted_of(prop, options):
                    break
                bar.set_description(f"{prop.name}, seed {number}")
                examples = int(min(max(BATCH * prop.share, 1), options.problems))
                outcome = run_seed(prop, number, examples)
                found.add(prop, outcome)
                unsaved.add(prop, outcome)
                bar.update(counts.done(prop, outcome) if options.cases else outcome.cases)
                if outcome.failure:
                    failures.append(outcome.failure)
                    seed = f"--seed {number} --cases 1 --problems {examples}"
                    again = f"python -m tools.fuzz --only {prop.name} {seed}"
                    bar.write(f"{outcome.failure}\n  all of this seed: {again}\n")
                if options.record and time.monotonic() - saved > SAVED_EVERY:
                    counts.add(unsaved)
                    unsaved, saved = counts.Counts(first, chosen), time.monotonic()
                number += 1
        except KeyboardInterrupt:
            bar.write("stopped")
    if options.record:
        counts.add(unsaved)
    return failures


def wanted_of(prop, options) -> float:
    """How many cases of a property end a run: its share, where a case takes long."""
    return float("inf") if options.cases is None else max(options.cases * prop.share, 1)


def furthest_behind(chosen, found):
    """Of those in which nothing was wrong: one mismatch of a property is enough."""
    right = [prop for prop in chosen if not found.wrong["property", prop.name]]
    return min(right, key=lambda prop: found.done[prop.name] / prop.share, default=None)


if __name__ == "__main__":
    sys.exit(main())
