# SPDX-License-Identifier: BSD-3-Clause
"""A GPU in the place of the simulator, so that its tests run on both.

Where there is no GPU the tests that need one are skipped with the reason, and those that run on
both run under the simulator alone; with REQUIRE_CUDA=1 that is an error. REQUIRE_CUDA=only also
leaves out the simulator and the CPU, of the tests that run there as well.
"""

import contextlib
import functools
import os

import pytest
import torch

WANTED = os.environ.get("REQUIRE_CUDA", "")
REQUIRED = WANTED in ("1", "only")
BOUNDARY = 512  # bytes: what torch's allocator, and an uploaded row, begins on


def missing():
    """Why there is no GPU to test on, or nothing."""
    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device here"
    import masked_loss_ext  # noqa: F401  its operators

    operator = "masked_loss_ext::masked_squared_error"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
        return "the library was built without its CUDA kernels"
    return ""


def need_gpu():
    """For a test, or at the head of a file of tests, that cannot do without."""
    if (reason := missing()) and REQUIRED:
        pytest.fail(f"REQUIRE_CUDA={WANTED}, but {reason}")
    if reason:
        pytest.skip(f"{reason} (REQUIRE_CUDA=1 makes this an error)")


def with_gpu(host, gpu):
    """What a test that runs on both is run on here."""
    if WANTED == "only":
        return [gpu]
    return [host, gpu] if REQUIRED or not missing() else [host]


# For fixtures: params=DEVICES, and device_named(request.param) is what an operator's class takes.
DEVICES = with_gpu("simulator", "gpu")


def device_named(name):
    if name == "simulator":
        return None
    need_gpu()
    return gpu_device()


# For public functions: those of `at(place, function)` take and give CPU tensors.
PLACES = with_gpu("cpu", "cuda")


def moved(value, device):
    """Tensors, and those in tuples and dictionaries, on the device; derivatives pass."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: moved(one, device) for name, one in value.items()}
    if isinstance(value, tuple):
        parts = [moved(one, device) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def at(place, function):
    """The function, working on copies of its tensors at ``place``."""
    if place == "cpu":
        return function
    if place.startswith("cuda"):
        need_gpu()

    def call(*args, **options):
        return moved(function(*moved(args, place), **moved(options, place)), "cpu")

    return call


@functools.cache
def gpu_device(device="cuda"):
    return GpuDevice(device)


class GpuDevice:
    """What Uploader asks of the simulator, of torch's device. Outputs start as NaN there too."""

    def __init__(self, device="cuda"):
        import masked_loss_ext  # noqa: F401  its operators

        self.device = torch.device(device)
        self.ops = torch.ops.masked_loss_ext

    def upload(self, tensor, writable=True):
        """A copy on the device, with the storage as it is: same offset and strides."""
        return _with_storage(tensor.detach(), self.device)

    def upload_rows(self, rows, gap=0):
        """Equal rows as one tensor [n, ...], `gap` bytes or more apart. What is between them, and
        a row that is None, reads as NaN: here is no memory that ends the process."""
        like = rows[0]
        step = -(-(like.nbytes + gap) // BOUNDARY) * BOUNDARY
        nbytes = step * (len(rows) - 1) + like.nbytes
        memory = torch.full((nbytes,), 255, dtype=torch.uint8, device=self.device)
        strides = (step // like.element_size(), *like.stride())
        uploaded = memory.view(like.dtype).as_strided((len(rows), *like.shape), strides)
        for place, row in zip(uploaded, rows, strict=True):
            if row is not None:
                place.copy_(row)
        return uploaded

    def download(self, tensor):
        return _with_storage(tensor.detach(), "cpu")

    def holds(self, tensor):
        return self.device.type != "cpu" and tensor.device.type == self.device.type

    @contextlib.contextmanager
    def order(self, order):
        """Threads and blocks take their own; memory that nobody has written holds NaN."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield self
        finally:
            torch.use_deterministic_algorithms(before)

    def reset(self):
        pass

    def launches(self):
        pytest.skip("only the simulator tells of its launches")


def _with_storage(tensor, device):
    storage = tensor.untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    whole = whole.set_(storage, 0, (storage.nbytes(),), (1,)).to(device, copy=True)
    empty = torch.empty(0, dtype=tensor.dtype, device=device)
    place = tensor.storage_offset()
    return empty.set_(whole.untyped_storage(), place, tensor.shape, tensor.stride())
