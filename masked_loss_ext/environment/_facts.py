# SPDX-License-Identifier: BSD-3-Clause
"""The facts of the report, as JSON has them."""

import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .._version import __version__
from ..build import gpus, sources, toolchain
from ..build.toolchain import BuildError
from ._privacy import PACKAGE, shown

HOW = {
    "preloaded": "registered before the package was imported",
    "aot": "built ahead of time",
    "jit": "compiled at the first import",
}
LEVEL = "MASKED_LOSS_EXT_CPU_CAPABILITY"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# The first that runs what a toolkit of that major version has linked in (NVIDIA's table of
# minor-version compatibility).
OLDEST_DRIVER = {"11": "450", "12": "525", "13": "580"}
# What no kernel of ours does, on any device.
PLAIN_PYTORCH = "second and forward-mode derivatives, vmap, gradients in batches"


def collect(may_compile: bool = False) -> dict[str, Any]:
    """may_compile: where there is no library yet, make it, as the first import would."""
    facts: dict[str, Any] = {
        "masked_loss_ext": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": " ".join((platform.system(), platform.release(), platform.machine())),
        "libc": " ".join(platform.libc_ver()),
        "settings": {name: _setting(name) for name in toolchain.SETTINGS if os.environ.get(name)},
        "torch": None,
        "operators": {},
    }
    facts["library"], loaded = _library(may_compile)
    facts["tools"] = _tools()
    facts["cpu"] = {"processor": _processor(), "huge_pages": _huge_pages()}
    facts["cuda"] = _cuda(facts["library"])
    if facts["library"]["torch_found"]:
        facts["torch"] = _torch()
        facts["threads"] = _threads()
    if loaded:
        from ._operators import ways

        facts["cpu"] |= _level()
        facts["operators"] = ways(facts["cpu"], facts["cuda"])
        facts["plain_pytorch"] = PLAIN_PYTORCH
    return facts


def _setting(name: str) -> str:
    known = toolchain.SETTINGS[name]
    return os.environ[name] if os.environ[name] in known else "not one of " + ", ".join(known)


def _said(ask: Callable[[], str]) -> str:
    """What it says, or in its words why it cannot."""
    try:
        return ask()
    except BuildError as error:
        return shown(str(error))


# --- the library ---------------------------------------------------------------------------------


def _library(may_compile: bool) -> tuple[dict[str, Any], bool]:
    """What is known of it, and whether it is there to be asked."""
    about: dict[str, Any] = {
        "package": shown(str(PACKAGE)).removeprefix(f"{PACKAGE.parent}/"),
        "kind": None,
        "how": None,
        "path": None,
        "problem": None,
        "built": {},
        "torch_found": False,
    }
    try:
        from ..build import loading

        about["torch_found"] = True
        if loading.loaded is None:
            loading.load(may_compile=may_compile)
    except BuildError as error:  # not compiled yet; would it be?
        about["how"] = str(error)
        about["problem"] = _said(lambda: toolchain.find_toolchain() and "") or None
    except (ImportError, OSError) as error:
        about["problem"] = _sentence(error)
    else:
        assert loading.loaded is not None
        about["kind"], library = loading.loaded
        about["how"] = HOW[about["kind"]]
        if library:
            about["path"] = shown(str(library))
            about["built"] = sources.read_build_info(library)
    return about, about["kind"] is not None


def _sentence(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return "PyTorch is missing; get it with: pip install torch"
    return shown(" ".join(str(error).split()).removeprefix("masked_loss_ext: "))


def _tools() -> dict[str, str]:
    return {
        "compiler": _said(lambda: _first_line([*toolchain.find_cxx(), "--version"])),
        "ninja": _said(lambda: _first_line([toolchain.find_ninja(), "--version"])),
        "nvcc": _said(_nvcc),
    }


def _first_line(command: list[str]) -> str:
    done = toolchain.answer_of(command, timeout=20)
    return shown((done.stdout or done.stderr).strip().partition("\n")[0])


def _nvcc() -> str:
    home = toolchain.cuda_home(toolchain.torch_about()[0])
    return toolchain.toolkit_version(home) if home else "none found"


# --- PyTorch and the machine ---------------------------------------------------------------------


def _torch() -> dict[str, Any]:
    import torch

    return {"version": torch.__version__, "cuda": torch.version.cuda}


def _threads() -> dict[str, int]:
    import torch

    return {"torch": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def _huge_pages() -> str:
    """always, madvise (our large outputs ask for them) or never."""
    words = HUGE_PAGES.read_text() if HUGE_PAGES.is_file() else ""
    found = re.search(r"\[(\w+)\]", words)
    return found[1] if found else "unknown"


def _level() -> dict[str, Any]:
    import torch

    ops = torch.ops.masked_loss_ext
    level, asked = ops.cpu_capability(), os.environ.get(LEVEL)
    if platform.machine() != "x86_64":
        why = "the only one on this kind of processor"
    elif not asked:
        why = "the best of this processor"
    elif asked == level:
        why = f"{LEVEL} asks for it"
    else:
        why = f"{LEVEL} asks for {asked}, this processor has no more"
    return {"level": level, "level_because": why, "half_products": ops._half_products().split()}


def _cuda(library: dict[str, Any]) -> dict[str, Any]:
    built, driver = library["built"], gpus.driver()
    names = built.get("cuda", "none").split()
    architectures = [] if names == ["none"] else names
    toolkit = built.get("toolkit", "none")
    oldest = OLDEST_DRIVER.get(toolkit.partition(".")[0], "unknown")
    too_old = bool(driver and oldest.isdigit() and int(driver.version.split(".")[0]) < int(oldest))
    return {
        "architectures": architectures,
        "runtime": None if toolkit == "none" else f"{toolkit}, linked in",
        "oldest_driver": None if toolkit == "none" else oldest,
        "driver": driver.version if driver else None,
        "driver_too_old": too_old,
        "gpus": [_gpu(gpu, architectures) for gpu in driver.gpus] if driver else [],
    }


def _gpu(gpu: gpus.Gpu, architectures: list[str]) -> dict[str, Any]:
    major, minor = gpu.capability
    return {
        "name": gpu.name,
        "capability": f"sm_{major}{minor}",
        "gigabytes": gpu.gigabytes,
        "runs": code_for(gpu.capability, architectures),
    }


def code_for(capability: tuple[int, int], architectures: list[str]) -> str:
    """Which of the library's code a GPU runs."""
    if not architectures:
        return "nothing: the library was built without CUDA kernels"
    fitting = [name for name in architectures if _fits(capability, name)]
    if machine_code := [name for name in fitting if name.startswith("sm_")]:
        return machine_code[-1]
    if fitting:
        return f"{fitting[-1]}, which the driver compiles at its first use"
    how = "build it with TORCH_CUDA_ARCH_LIST={}.{}".format(*capability)
    return f"nothing: the library has no code for it; {how}"


def _fits(capability: tuple[int, int], name: str) -> bool:
    """sm_XY runs on X.Z from Y on, compute_XY on all newer, those with an "a" on X.Y alone."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    assert found is not None
    kind, suffix, code = found[1], found[4], (int(found[2]), int(found[3]))
    if code >= capability or suffix == "a":
        return code == capability
    return code[0] == capability[0] or (kind == "compute" and not suffix)
