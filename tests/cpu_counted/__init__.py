# SPDX-License-Identifier: BSD-3-Clause
"""The CPU library, built so that it counts how often each byte is read and written.

It takes the product's place in a process that loads it before masked_loss_ext is imported, and has
one instruction-set level, "default": what masks of wide registers leave out would not be counted.
"""

import contextlib
import ctypes
from pathlib import Path

import torch
from cuda_sim.build import COUNTING_FLAGS, ROOT, link

HERE = Path(__file__).resolve().parent
# Every copy is a call, which is counted; calls that gcc would expand are not.
COPIES = ["-mmemcpy-strategy=libcall:-1:noalign", "-mmemset-strategy=libcall:-1:noalign"]
WRAPPED = [f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset")]


def build(sources):
    """The library's path; sources: masked_loss_ext.build.sources, which need not be imported."""
    flags = [*sources.CXX_FLAGS, "-fPIC", *(f"-D{define}" for define in sources.DEFINES)]
    counted = [*flags, *COUNTING_FLAGS, *COPIES]
    level = sources.LEVELS["default"]
    units = [(ROOT / "csrc" / name, [*counted, *level]) for name in sources.LEVEL_SOURCES]
    units += [(ROOT / "csrc" / name, counted) for name in sources.CPU_SOURCES]
    units += [(HERE / name, flags) for name in ("levels.cpp", "accesses.cpp")]
    return link("counted_cpu", units, WRAPPED)


class Counter:
    def __init__(self, library):
        torch.ops.load_library(library)
        self._c = ctypes.CDLL(str(library))

    @contextlib.contextmanager
    def counting(self):
        """accesses() tells of what happens within, by one thread."""
        self._c.cpu_counted_start()
        yield self
        self._c.cpu_counted_stop()

    def accesses(self, tensor):
        """(reads, writes), uint8: how often each byte of the tensor was, [*shape, element size]."""
        storage = tensor.untyped_storage()
        counts = [torch.zeros(storage.nbytes(), dtype=torch.uint8) for _ in range(2)]
        pointers = [ctypes.c_void_p(one.data_ptr()) for one in counts]
        data = ctypes.c_void_p(storage.data_ptr())
        self._c.cpu_counted_counts(data, ctypes.c_size_t(storage.nbytes()), *pointers)
        width = tensor.element_size()
        shape, strides = (*tensor.shape, width), (*(s * width for s in tensor.stride()), 1)
        offset = tensor.storage_offset() * width
        return tuple(one.as_strided(shape, strides, offset) for one in counts)
