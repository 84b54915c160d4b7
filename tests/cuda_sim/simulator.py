# SPDX-License-Identifier: BSD-3-Clause
"""A simulated CUDA device as tests see it: its memory, its order of execution, its launches."""

import contextlib
import ctypes
import os
import weakref

import torch

# Taken together they bring out a missing barrier in either direction and in between.
ORDERS = ("ascending", "descending", "1", "2")


class Simulator:
    """The simulator inside one library that build() made; loads the library and its operators.

    Device memory belongs to the library. A launch alone can reach it: to torch an uploaded tensor
    is a CPU tensor, and reading its data on the host (printing it, say) ends the process with a
    message.
    """

    def __init__(self, library):
        torch.ops.load_library(library)
        self._c = ctypes.CDLL(str(library))
        self._order = os.environ.get("MASKED_LOSS_EXT_CUDA_SIM_ORDER", "ascending")
        for name in ("allocate", "skip", "release", "write", "read", "reset", "launches"):
            getattr(self._c, f"cuda_sim_{name}").restype = ctypes.c_char_p
        self._show_without_reading()

    def _show_without_reading(self):
        """pytest prints what a failing test was given, and whoever reads device memory ends the
        process."""
        shown = torch.Tensor.__repr__

        def show(tensor, *args, **kwargs):
            if type(tensor) is torch.Tensor and tensor.numel() > 0 and self.holds(tensor):
                return f"<{list(tensor.shape)} {tensor.dtype} in simulated device memory>"
            return shown(tensor, *args, **kwargs)

        torch.Tensor.__repr__ = show

    def _call(self, name, *args):
        error = getattr(self._c, f"cuda_sim_{name}")(*args)
        if error is not None:
            raise RuntimeError(error.decode())

    def upload(self, tensor, writable=False):
        """A copy in device memory, with the storage as it is: same offset and strides.

        A kernel's write to it ends the process unless it is writable.
        """
        storage = tensor.detach().untyped_storage()
        nbytes = storage.nbytes()
        if nbytes == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        data = ctypes.c_void_p()
        self._call("allocate", ctypes.c_size_t(nbytes), int(writable), ctypes.byref(data))
        self._call("write", data, ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(nbytes))
        memory = (ctypes.c_char * nbytes).from_address(data.value)
        weakref.finalize(memory, self._call, "release", data)
        device_storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        return _on_storage(device_storage, tensor)

    def upload_rows(self, rows, gap=0):
        """Equal rows as one tensor [n, ...], each in its own buffer, `gap` bytes or more apart.

        A kernel's access to a row that is None ends the process; the first row must be there. With
        a large gap, offsets that are cut to 32 bits do so too.
        """
        like = rows[0]
        uploaded = []
        for row in rows:
            self._call("skip", ctypes.c_size_t(gap if uploaded else 0))
            uploaded.append(self.upload((like if row is None else row).clone()))
        begin = uploaded[0].data_ptr()
        step = uploaded[1].data_ptr() - begin
        assert [row.data_ptr() - begin for row in uploaded] == [step * i for i in range(len(rows))]
        memory = (ctypes.c_char * (step * (len(rows) - 1) + like.nbytes)).from_address(begin)
        present = [u for u, row in zip(uploaded, rows, strict=True) if row is not None]
        weakref.finalize(memory, present.clear)  # the other rows go when this function ends
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        strides = (step // like.element_size(), *like.stride())
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, (len(rows), *like.shape), strides)

    def download(self, tensor):
        """An ordinary copy of a tensor in device memory, with its strides."""
        if tensor.numel() == 0:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        storage = tensor.untyped_storage()
        copy = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
        source, target = ctypes.c_void_p(storage.data_ptr()), ctypes.c_void_p(copy.data_ptr())
        self._call("read", target, source, ctypes.c_size_t(storage.nbytes()))
        return _on_storage(copy, tensor)

    def holds(self, tensor):
        """Whether the tensor's data lies in device memory."""
        return bool(self._c.cuda_sim_is_device_pointer(ctypes.c_void_p(tensor.data_ptr())))

    def reset(self):
        """Release all device memory and forget the launches; earlier tensors are of no use then."""
        self._call("reset")

    def set_order(self, order):
        """Order of threads and of blocks: "ascending", "descending" or the seed of a random one."""
        if not self._c.cuda_sim_set_order(str(order).encode()):
            raise ValueError(f"order must be ascending, descending or a seed, got {order!r}")
        self._order = order

    @contextlib.contextmanager
    def order(self, order):
        """set_order() for a block of code."""
        before = self._order
        self.set_order(order)
        try:
            yield self
        finally:
            self.set_order(before)

    @contextlib.contextmanager
    def clusters(self, blocks=8, launchable=8):
        """A device whose blocks may form clusters of so many, of which it can launch those of
        `launchable`, as a slice of a GPU may; without it there are none."""
        self._c.cuda_sim_set_cluster_limit(blocks, launchable)
        try:
            yield self
        finally:
            self._c.cuda_sim_set_cluster_limit(1, 8)

    @contextlib.contextmanager
    def capturing(self):
        """The stream is captured in a graph: whoever waits for it gets an error."""
        self._c.cuda_sim_set_capturing(1)
        try:
            yield self
        finally:
            self._c.cuda_sim_set_capturing(0)

    def launches(self):
        """Launches since reset(): "kernel grid (x,y,z) block (x,y,z) shared bytes" each, with
        "cluster blocks" behind where there are any. What else the stream was asked for is among
        them: "cudaMemsetAsync 8", "cudaMemcpyAsync 8", "cudaStreamSynchronize", and ATen's
        operators with the shapes of two tensors, "aten::mm [2, 3] [3, 4]"."""
        return self._c.cuda_sim_launches().decode().splitlines()

    @contextlib.contextmanager
    def counting(self):
        """accesses() tells of what happens within; for a library built with COUNTING_FLAGS."""
        self._c.cuda_sim_set_counting(1)
        yield self
        self._c.cuda_sim_set_counting(0)

    def accesses(self, tensor):
        """(reads, writes): how often each element of a contiguous tensor was, since counting()
        began. An element of which only a part was accessed counts as one that was.
        """
        assert tensor.is_contiguous()
        counts = [torch.zeros(tensor.nbytes, dtype=torch.int16) for _ in range(2)]
        pointers = [ctypes.c_void_p(one.data_ptr()) for one in counts]
        data = ctypes.c_void_p(tensor.data_ptr())
        self._c.cuda_sim_counts(data, ctypes.c_size_t(tensor.nbytes), *pointers)
        shape = (*tensor.shape, tensor.element_size())
        return tuple(one.view(shape).amax(-1) for one in counts)


def _on_storage(storage, like):
    tensor = torch.empty(0, dtype=like.dtype)
    return tensor.set_(storage, like.storage_offset(), like.shape, like.stride())


def mirror_schemas(source="masked_loss_ext", target="masked_loss_ext_sim"):
    """Define in `target` every schema that `source` has: the .cu registers its kernels there.

    Returns the torch.library.Library that holds the definitions: keep it.
    """
    library = torch.library.Library(target, "FRAGMENT")
    for schema in torch._C._jit_get_all_schemas():
        if schema.name.startswith(f"{source}::"):
            library.define(str(schema).removeprefix(f"{source}::"))
    return library
