# SPDX-License-Identifier: BSD-3-Clause
"""Processes of one gloo group, started once per test file and number of ranks.

``ranks(2).run(function, *args)`` runs a function of a module on every rank, inside the group, and
returns what each rank returned. A rank that raises or dies fails the test, with its traceback, and
the next run gets fresh processes. Nothing waits for ever: a collective for at most GROUP_TIMEOUT,
a run for its ``timeout``, and the others GRACE once a rank has failed.
"""

import datetime
import importlib
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

GROUP_TIMEOUT = datetime.timedelta(seconds=60)
RUN_TIMEOUT, GRACE = 150, 10  # seconds
# Each process is a fork of one that has imported these and nothing else: 0.15 instead of 3 s.
PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "masked_loss_ext"]


@dataclass
class Outcome:
    """Of one rank: what it returned, or why it did not."""

    value: Any = None
    error: str | None = None


class RankError(AssertionError):
    """Says of each rank that failed how."""


class Ranks:
    """``size`` processes of one group; they are started by the first run."""

    def __init__(self, size):
        self.size = size
        self._processes = []

    def run(self, function, *args, timeout=RUN_TIMEOUT):
        """[what function(*args) returns on rank 0, on rank 1, ...]; plain pickle carries both."""
        __tracebackhide__ = True
        outcomes = self.outcomes(function, *args, timeout=timeout)
        failed = [f"rank {r} of {self.size}: {o.error}" for r, o in enumerate(outcomes) if o.error]
        if failed:
            raise RankError(f"{function.__name__} failed\n" + "\n".join(failed))
        return [outcome.value for outcome in outcomes]

    def outcomes(self, function, *args, timeout=RUN_TIMEOUT, grace=GRACE):
        """As run, with failures returned instead of raised: for tests of failures."""
        if not self._processes:
            self._start()
        module = sys.modules[function.__module__]
        job = (module.__name__, module.__file__, function.__qualname__, pickle.dumps(args))
        for connection in self._connections:
            connection.send(job)
        found = self._collect(timeout, grace)
        if any(outcome.error for outcome in found):
            self.close()  # what a failure leaves of a group is no start for the next test
        return found

    def close(self):
        """End the processes; a later run starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for connection in self._connections if self._processes else ():
            connection.close()
        self._processes = []

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._logs = tempfile.TemporaryDirectory(prefix="masked_loss_ext_ranks_")
        self._connections = []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            log = str(Path(self._logs.name, str(rank)))
            args = (rank, self.size, self._store.port, theirs, log)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def _collect(self, timeout, grace):
        """The outcome of each rank."""
        found = {}
        end = time.monotonic() + timeout
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        while waiting:
            left = end - time.monotonic()
            ready = multiprocessing.connection.wait(list(waiting), max(left, 0))
            for connection in ready:
                rank = waiting.pop(connection)
                found[rank] = self._received(connection, rank)
                if found[rank].error:
                    end = min(end, time.monotonic() + grace)
            if not ready:
                for rank in waiting.values():
                    found[rank] = Outcome(error=f"still running, killed{self._printed(rank)}")
                break
        return [found[rank] for rank in range(self.size)]

    def _received(self, connection, rank):
        try:
            value, error = pickle.loads(connection.recv_bytes())
        except EOFError:
            self._processes[rank].join(10)
            died = f"died with exit code {self._processes[rank].exitcode}"
            return Outcome(error=died + self._printed(rank))
        return Outcome(value, error)

    def _printed(self, rank):
        path = Path(self._logs.name, str(rank))
        text = path.read_text(errors="replace")[-2000:] if path.exists() else ""
        return f"; it printed\n{text}" if text else ""


def _serve(rank, size, port, connection, log):
    """The life of one rank."""
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(  # accelerate reads them
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=GROUP_TIMEOUT)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):  # no more tests
            os._exit(0)
        connection.send_bytes(_answer(*job))


def _answer(module, file, name, args):
    torch.manual_seed(0)
    try:
        function = _module(module, file)
        for part in name.split("."):
            function = getattr(function, part)
        return pickle.dumps((function(*pickle.loads(args)), None))
    except BaseException:  # SystemExit too; the parent says what it was
        return pickle.dumps((None, "raised\n" + traceback.format_exc()))


def _module(name, file):
    """By the name that it has in pytest, under which it may not be found."""
    if name in sys.modules:
        return sys.modules[name]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.fixture(scope="module")
def ranks():
    """ranks(size) -> Ranks, the same one for all tests of the file."""
    made = {}
    yield lambda size: made.setdefault(size, Ranks(size))
    for group in made.values():
        group.close()
