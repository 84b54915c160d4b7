# SPDX-License-Identifier: BSD-3-Clause
"""Ways to run the same calls again, each of which gives name -> the results of every run.

``python bit_conditions.py FILE PREFIX`` saves the results of the calls whose names begin so, as a
process of another level does.
"""

import contextlib
import itertools
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import torch
from bit_calls import table

THREADS = (1, 2, 3, 8)
LEVELS = ("default", "avx2", "avx512")
ROOT = Path(__file__).resolve().parents[2]


def differing_bits(a, b):
    """How many bits of two lists of tensors; shapes and dtypes must be the same."""
    assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
    total = 0
    for x, y in zip(a, b, strict=True):
        if x.numel() == 0:
            continue
        pair = [one.contiguous().view(-1).view(torch.uint8) for one in (x, y)]
        changed = pair[0] ^ pair[1]
        total += sum(int((changed >> i & 1).sum()) for i in range(8)) if changed.any() else 0
    return total


def largest_difference(a, b):
    """Relative to the largest number of each tensor, in float64; of floating tensors alone."""
    found = 0.0
    for x, y in zip(a, b, strict=True):
        if x.is_floating_point() and x.numel() and not torch.equal(x, y):
            x, y = x.double().nan_to_num(), y.double().nan_to_num()
            found = max(found, ((x - y).abs().max() / x.abs().max()).item())
    return found


def threads(calls, counts=THREADS):
    before, found = torch.get_num_threads(), {name: [] for name in calls}
    for count in counts:
        torch.set_num_threads(count)
        for name, call in calls.items():
            found[name].append(call())
    torch.set_num_threads(before)
    return found


def repeats(calls, times):
    return {name: [call() for _ in range(times)] for name, call in calls.items()}


def deterministic(calls, warn_only):
    """Under use_deterministic_algorithms, which also fills fresh memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        return repeats(calls, 1)
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def forked(calls):
    """In a fork of a process that has used its threads."""
    repeats(dict(itertools.islice(calls.items(), 3)), 1)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), os.fdopen(writing, "wb") as pipe:
            torch.set_num_threads(1)
            pickle.dump({n: [[x.numpy() for x in as_integers(f[0])]]
                         for n, f in repeats(calls, 1).items()}, pipe)  # fmt: skip
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found = pickle.load(pipe)
    os.waitpid(child, 0)
    return {n: [[torch.from_numpy(x) for x in runs[0]]] for n, runs in found.items()}


def as_integers(tensors):
    """Their bits, which numpy has a type for."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [x.contiguous().view(kinds[x.element_size()]) for x in tensors]


class Calls(torch.utils.data.Dataset):
    def __init__(self, calls):
        self.calls = list(calls.values())

    def __len__(self):
        return len(self.calls)

    def __getitem__(self, i):
        return [x.numpy() for x in as_integers(self.calls[i]())]


def loader_workers(calls, workers=2):
    loader = torch.utils.data.DataLoader(
        Calls(calls), batch_size=None, num_workers=workers, collate_fn=lambda x: x
    )
    return {n: [[torch.as_tensor(x) for x in f]] for n, f in zip(calls, loader, strict=True)}


def python_threads(calls, same, count=4):
    """In several threads at once: the same call on the same tensors, or each another one."""
    made = {}
    for name, call in calls.items():
        torch.manual_seed(0)
        made[name] = call.make()
    found, errors = {name: [None] * count for name in calls}, []
    barrier = threading.Barrier(count)

    def work(i):
        names = list(calls)
        shift = 0 if same else i * len(names) // count
        try:
            for name in names[shift:] + names[:shift]:
                if same:
                    barrier.wait(60)
                found[name][i] = calls[name].run(made[name])
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    if errors:
        raise errors[0]
    return found


def at_level(level, file, prefix="operator"):
    """The results of calls in a process of that level, and the level that it found."""
    environment = {**os.environ, "MASKED_LOSS_EXT_CPU_CAPABILITY": level}
    command = [sys.executable, __file__, str(file), prefix]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(file)


def main(file, prefix):
    torch.set_num_threads(1)
    found = {name: call() for name, call in table().items() if name.startswith(prefix)}
    found["level"] = torch.ops.masked_loss_ext.cpu_capability()
    torch.save(found, file)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main(*sys.argv[1:])
