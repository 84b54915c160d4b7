# SPDX-License-Identifier: BSD-3-Clause
"""What each operator would take on a device, and why."""

from typing import Any

import torch

NAMESPACE = "masked_loss_ext::"
ABOUT_THE_LIBRARY = ("cpu_capability",)
NO_CUDA = "CUDA tensors are refused: the library was built without CUDA kernels"
NO_TORCH_CUDA = "; this PyTorch has no CUDA to give it tensors"


def operators() -> list[str]:
    """Of the dispatcher, those that a caller may know; each has its backward beside it."""
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith(NAMESPACE))
    plain = {name.removeprefix(NAMESPACE).partition(".")[0] for name in names}
    return sorted(name for name in plain if name[0] != "_" and name not in ABOUT_THE_LIBRARY)


def ways(cpu: dict[str, Any], cuda: dict[str, Any]) -> dict[str, dict[str, str]]:
    """operator -> {"cpu": ..., "cuda": ...}, of what the report says of processor and CUDA."""
    return {name: {"cpu": _on_cpu(name, cpu), "cuda": _on_cuda(name, cuda)} for name in operators()}


def _on_cpu(name: str, cpu: dict[str, Any]) -> str:
    if "cross_entropy" not in name and "squared_error" not in name:
        return "integers: one kernel for every processor"
    rows = f"{cpu['level']} kernels"
    if "linear" not in name:
        return rows
    halves = [kind for kind in ("bfloat16", "float16") if kind not in cpu["half_products"]]
    wide = f", {' and '.join(halves)} in float32" if halves else ""
    return f"{rows}, products by PyTorch{wide}"


def _on_cuda(name: str, cuda: dict[str, Any]) -> str:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(NAMESPACE + name, "CUDA"):
        return NO_CUDA
    way = f"CUDA kernels ({' '.join(cuda['architectures']) or 'architectures unknown'})"
    way += ", products by PyTorch" if "linear" in name else ""
    return way + ("" if torch.version.cuda else NO_TORCH_CUDA)
