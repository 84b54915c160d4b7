# SPDX-License-Identifier: BSD-3-Clause
"""Driver and GPUs, as the driver's management library tells them.

nvidia-smi, which asks the same, takes a second on some machines, and torch.cuda would initialise
CUDA, which forbids a later fork.
"""

import ctypes
import functools
from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    capability: tuple  # (9, 0)
    gigabytes: int


class Driver(NamedTuple):
    version: str  # 580.65.06
    gpus: tuple


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@functools.cache
def driver():
    """What is here, or None: no driver, or one of a kind that does not tell."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None
        try:
            count = ctypes.c_uint()
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            gpus = (_gpu(nvml, index) for index in range(count.value))
            return Driver(_text(nvml.nvmlSystemGetDriverVersion), tuple(filter(None, gpus)))
        finally:
            nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None


def _gpu(nvml, index):
    """None for one that is lost."""
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    about = (device, ctypes.byref(major), ctypes.byref(minor))
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(*about) != 0:
        return None
    memory = _Memory()
    nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    name = _text(nvml.nvmlDeviceGetName, device)
    return Gpu(name, (major.value, minor.value), round(memory.total / 2**30))


def _text(function, *arguments):
    buffer = ctypes.create_string_buffer(96)
    function(*arguments, buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode("ascii", "replace") or "unknown"


def capabilities():
    """Those of the GPUs here, as TORCH_CUDA_ARCH_LIST has them; "" without any."""
    found = driver()
    kinds = sorted({gpu.capability for gpu in found.gpus}) if found else []
    return ";".join(f"{major}.{minor}" for major, minor in kinds)
