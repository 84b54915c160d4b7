# SPDX-License-Identifier: BSD-3-Clause
"""Every operator on a GPU gives what it gives on the CPU."""

import pytest
import torch
from cases import FLOATING
from device_calls import CALLS, SIZES, on_device
from gpu_device import GpuDevice, missing, need_gpu

import masked_loss_ext as mle
from masked_loss_ext.build.sources import CUDA_HOST_SOURCES, csrc_dir

every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
every_size = pytest.mark.parametrize("size", SIZES)


def assert_alike(actual, expected, what):
    """Integers exactly; losses and gradients to what two orders of summing may differ by."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    tolerance = {torch.bfloat16: (2**-7, 1e-7), torch.float32: (2e-5, 1e-7)}
    rtol, atol = tolerance.get(expected.dtype, (0, 0))
    scale = expected.abs().max().item() if expected.is_floating_point() and atol else 0
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=max(atol, 2e-6 * scale), msg=lambda m: f"{what}: {m}"
    )


@every_call
@every_size
def test_same_as_on_the_cpu(call, size):
    need_gpu()
    inputs = call.make(size)
    expected = call.run(*inputs)
    results = call.run(*on_device(inputs, "cuda"))
    for place, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        assert actual.is_cuda
        assert_alike(actual.cpu(), wanted, f"{call.name} {size}, result {place}")


@every_call
@every_size
def test_a_call_is_a_function_of_its_tensors(call, size):
    # what the tests on a GPU rely on, on any machine
    inputs = call.make(size)
    before = [one.clone() for one in inputs]
    first, second = call.run(*inputs), call.run(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(not one.requires_grad and one.isfinite().all() for one in first)
    other = call.run(*call.make(size))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), "constant"


def test_every_operator_with_a_cuda_kernel_is_called():
    sources = [csrc_dir() / source for source in CUDA_HOST_SOURCES]
    texts = [path.read_text() for path in (*sources, *csrc_dir().rglob("call.h"))]
    called = {name for call in CALLS for name in call.operators}
    missing_ones = []
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("masked_loss_ext::")
        if (
            schema.name != name
            and any(f'"{name}"' in text for text in texts)
            and name not in called
        ):
            missing_ones.append(name)
    assert not missing_ones, f"no call in device_calls.py: {missing_ones}"


def test_two_devices_are_refused():
    need_gpu()
    logits, target, mask = CALLS[3].make("small")
    with pytest.raises((ValueError, RuntimeError), match="device|cuda"):
        mle.masked_cross_entropy(logits.cuda(), target, mask)


def test_why_there_is_no_gpu_is_said():
    if torch.cuda.is_available():
        assert missing() in ("", "the library was built without its CUDA kernels")
    else:
        assert missing() in ("this PyTorch has no CUDA", "PyTorch finds no CUDA device here")


@pytest.mark.parametrize("layout", ["whole", "turned", "part", "expanded"])
def test_a_copy_on_the_device_keeps_its_storage(layout):
    whole = torch.randn(4, 6)
    tensor = {"whole": whole, "turned": whole.T, "part": whole[1:, 2:5], "expanded": whole[:1]}[
        layout
    ]
    tensor = tensor.expand(4, 6) if layout == "expanded" else tensor
    device = GpuDevice("cpu")
    copy = device.download(device.upload(tensor))
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()
    assert copy.storage_offset() == tensor.storage_offset()
    assert copy.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("gap", [0, 1, 5000])
def test_rows_on_the_device_lie_between_nans(dtype, gap):
    rows = torch.randn(3, 7).to(dtype)
    uploaded = GpuDevice("cpu").upload_rows([rows[0], None, rows[2]], gap)
    step = uploaded.stride(0) * dtype.itemsize
    assert step % 512 == 0 and gap + 7 * dtype.itemsize <= step < gap + 7 * dtype.itemsize + 512
    assert torch.equal(uploaded[::2], rows[::2]) and uploaded[1].isnan().all()
    whole = torch.empty(0, dtype=dtype).set_(uploaded.untyped_storage())
    assert whole.isnan().sum() == len(whole) - 14
