# SPDX-License-Identifier: BSD-3-Clause
"""``python rewritten.py SECONDS``: calls every operator for so long while a second thread writes
garbage into all its arguments and puts them right again. Prints how many calls each took, and how
many of them were refused; what reads beyond a tensor meets a closed page.
"""

import json
import sys
import threading
import time
from pathlib import Path

import torch

LIMIT = 200  # calls of one operator


def tensors_of(given):
    return [x for x in given.values() if isinstance(x, torch.Tensor) and x.numel() > 0]


class Rewriter(threading.Thread):
    """Writes garbage over the tensors and back, until told to stop; then they are right."""

    def __init__(self, tensors):
        super().__init__()
        self.tensors, self.stopped, self.rounds = tensors, False, 0
        self.right = [x.clone() for x in tensors]
        self.garbage = [self.bits_like(x) for x in tensors]

    @staticmethod
    def bits_like(x):
        if x.dtype == torch.bool:
            return torch.rand(x.shape) < 0.5
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        info = torch.iinfo(kind)
        return torch.randint(info.min, info.max, x.shape, dtype=kind).view(x.dtype)

    def run(self):
        while not self.stopped:
            for values in (self.garbage, self.right):
                for tensor, value in zip(self.tensors, values, strict=True):
                    tensor.copy_(value)
            self.rounds += 1


def call_while_rewritten(op, given, seconds):
    writer = Rewriter(tensors_of(given))
    writer.start()
    calls, refused, until = 0, 0, time.monotonic() + seconds
    while writer.rounds < 3 or (calls < LIMIT and time.monotonic() < until):
        try:
            op(**given)
        except (RuntimeError, ValueError, IndexError):
            refused += 1
        calls += 1
    writer.stopped = True
    writer.join()
    return {"calls": calls, "refused": refused, "rounds": writer.rounds}


def largest_cases():
    """Of each operator the call of most arguments; of those without a mask a good one."""
    from excluded_cases import FAMILIES, REASONS, full
    from operator_calls import RETURNING_STRINGS, arguments_of

    found = {}
    for family in FAMILIES:
        for case in family():
            best = found.get(case.operator, {})
            if len(tensors_of(case.given)) >= len(tensors_of(best)):
                found[case.operator] = case.given
    for name in set(REASONS) - RETURNING_STRINGS:
        found[name] = full(name, arguments_of(name))
    return found


def main(seconds):
    from closed_pages import all_closed
    from operator_calls import ops

    torch.manual_seed(0)
    found = {}
    for name, given in sorted(largest_cases().items()):
        with all_closed(given, {}, at_end=True) as (given, _):
            print(name, file=sys.stderr, flush=True)
            found[name] = call_while_rewritten(getattr(ops, name).default, given, seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here.parents[1]), str(here.parent)]
    main(float(sys.argv[1]))
