# SPDX-License-Identifier: BSD-3-Clause
"""The same numbers in every test, whatever ran before it."""

import atexit
import os
import shutil
import tempfile

# Idle threads sleep instead of spinning: several test processes may share two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

WORKER = "PYTEST_XDIST_WORKER" in os.environ  # one of several processes, see `make test`
if WORKER:  # inductor's own processes, each of which imports torch, would only stand in the way
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A cache of its own: inductor's common one would hand out graphs that were compiled for operators
# of another version, which it knows by name alone.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="masked_loss_ext_inductor_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_report_header(config):
    from gpu_device import missing

    reason = missing()
    return f"CUDA: kernels run under the simulator alone, {reason}" if reason else "CUDA: a GPU"


def pytest_configure(config):
    if WORKER:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Of several workers each takes file after file: those that take long come first."""
    if WORKER:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True)
def same_start():
    """Seed the generator and put the number of threads back."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
