# SPDX-License-Identifier: BSD-3-Clause
"""The facts as text, a line each."""

from collections.abc import Iterator
from typing import Any

Line = tuple[str, str]


def rendered(facts: dict[str, Any]) -> str:
    lines = [f"masked_loss_ext {facts['masked_loss_ext']}"]
    lines += [f"  {name:<13} {text}" for name, text in _lines(facts)]
    if facts["operators"]:
        lines += ["operators, each with its derivative", *_operators(facts["operators"])]
        lines.append(f"  plain PyTorch on any device: {facts['plain_pytorch']}")
    return "\n".join(lines)


def _lines(facts: dict[str, Any]) -> Iterator[Line]:
    yield from _library(facts["library"])
    yield "python", facts["python"]
    torch = facts["torch"]
    yield "pytorch", f"{torch['version']}, CUDA {torch['cuda'] or 'none'}" if torch else "not found"
    yield "system", f"{facts['system']}, {facts['libc']}"
    for name, text in facts["tools"].items():
        yield name, text
    cpu = facts["cpu"]
    yield "processor", cpu["processor"]
    if "level" in cpu:
        yield "instructions", f"{cpu['level']}: {cpu['level_because']}"
        halves = " and ".join(cpu["half_products"]) or "neither bfloat16 nor float16"
        yield "", f"products of {halves} as they are"
    if "threads" in facts:
        yield "threads", "{torch} of PyTorch, {cores} cores".format(**facts["threads"])
    yield "huge pages", cpu["huge_pages"]
    yield from _cuda(facts["cuda"])
    for name, value in facts["settings"].items():
        yield "setting", f"{name}={value}"


def _library(library: dict[str, Any]) -> Iterator[Line]:
    yield "package", library["package"]
    yield "library", ", ".join(filter(None, (library["how"], library["path"]))) or "not loaded"
    if library["problem"]:
        yield "PROBLEM", library["problem"]
    built = library["built"]
    if built:
        yield "built with", f"PyTorch {built['torch']}, {built.get('compiler', 'unknown')}"
        yield "sources", built["sources"]


def _cuda(cuda: dict[str, Any]) -> Iterator[Line]:
    if cuda["architectures"]:
        yield "CUDA kernels", " ".join(cuda["architectures"])
        yield "CUDA runtime", f"{cuda['runtime']}; driver {cuda['oldest_driver']} or newer"
    else:
        yield "CUDA kernels", "none"
    remark = f": older than {cuda['oldest_driver']}, so the kernels do not run"
    yield "driver", (cuda["driver"] or "none found") + (remark if cuda["driver_too_old"] else "")
    for gpu in cuda["gpus"]:
        yield "GPU", "{name}, {capability}, {gigabytes} GiB: runs {runs}".format(**gpu)


def _operators(operators: dict[str, dict[str, str]]) -> Iterator[str]:
    """A line each; what all do on CUDA is said once."""
    width = max(map(len, operators))
    on_cuda = {way["cuda"] for way in operators.values()}
    for name, way in operators.items():
        yield f"  {name:<{width}}  {way['cpu']}" + (f"; {way['cuda']}" if len(on_cuda) > 1 else "")
    if len(on_cuda) == 1:
        yield f"  each on CUDA: {on_cuda.pop()}"
