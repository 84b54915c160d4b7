# SPDX-License-Identifier: BSD-3-Clause
"""Find, load or compile the native library, at the first import of the package.

MASKED_LOSS_EXT_JIT=1 ignores a built library; MASKED_LOSS_EXT_BUILD=aot refuses to compile one.
"""

import hashlib
import os
import platform
from pathlib import Path

import torch

from . import _build
from ._build import BuildError, say
from ._toolchain import cuda_home, find_toolchain, torch_about
from ._version import __version__


def load():
    """Register the operators; returns how: "preloaded", "aot" or "jit"."""
    try:
        return _load()
    except BuildError as error:
        # The text is the whole story; the frames that led here would bury it.
        raise ImportError(f"masked_loss_ext: {error}") from None


def _load():
    # A second copy in one process crashes it, so ask the dispatcher before touching any file.
    if hasattr(torch.ops.masked_loss_ext, "_version"):
        _check_version("the library that is already loaded in this process")
        return "preloaded"
    library = _build.PACKAGE / _build.LIBRARY
    if os.environ.get("MASKED_LOSS_EXT_JIT") != "1" and library.is_file() and _usable(library):
        torch.ops.load_library(str(library))
        _check_version(str(library))
        return "aot"
    library = compile_at_import()
    torch.ops.load_library(str(library))
    _check_version(str(library))
    return "jit"


def _check_version(what):
    found = torch.ops.masked_loss_ext._version()
    if found != __version__:
        raise BuildError(
            f"{what} is version {found}, this package is {__version__}; only one version can be "
            "loaded in a process, so remove one of the two and start Python again"
        )


def _usable(library):
    """False for a library that must not be used in silence: it is older than its sources."""
    info = _build.read_build_info(library)
    if info.get("version") != __version__:
        raise BuildError(
            f"{library} is of version {info.get('version', 'unknown')}, this package is "
            f"{__version__}; reinstall it"
        )
    # An installed package's sources cannot change; those of a source tree do.
    in_source_tree = not (_build.PACKAGE / "csrc").is_dir()
    if in_source_tree and info["sources"] != _build.source_fingerprint():
        say(f"{library.name} is older than csrc, so it is not used; `make build` renews it")
        return False
    wants_cuda = torch.version.cuda and os.environ.get("MASKED_LOSS_EXT_CUDA") != "0"
    if info["cuda"] == "none" and wants_cuda and _nvcc_is_here():
        say(
            "WARNING: the library has only CPU kernels, but PyTorch is built for CUDA "
            f"{torch.version.cuda} and nvcc is here; to use CUDA tensors build it again: "
            "pip install --no-build-isolation --no-deps --force-reinstall masked_loss_ext"
        )
    return True


def _nvcc_is_here():
    return cuda_home(torch_about()[0]) is not None


def cache_root():
    """Where torch's own extensions are cached too."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torch_extensions"


def compile_at_import():
    """Compile into the cache, or find it there; returns the library's path."""
    if os.environ.get("MASKED_LOSS_EXT_BUILD") == "aot":
        raise BuildError(
            "MASKED_LOSS_EXT_BUILD=aot, but there is no built library that fits; build one with: "
            "pip install --no-build-isolation ."
        )
    folder = cache_root() / f"masked_loss_ext-{_cache_key()}"
    library = folder / _build.LIBRARY
    if library.is_file():
        return library
    note = f", once (kept in {folder})"
    return _build.compile_library(find_toolchain(), folder, note)


def _cache_key():
    """Everything that could make another library; cheap, as every later import computes it."""
    names = ("CXX", "TORCH_CUDA_ARCH_LIST", "MASKED_LOSS_EXT_CUDA", "CUDA_HOME", "CUDA_PATH")
    parts = [_build.source_fingerprint(), torch.__version__, platform.machine()]
    parts += [str(os.environ.get(name)) for name in names]
    if torch.version.cuda:
        # Installing nvcc later must not leave the CPU-only library in use.
        parts.append(_nvcc_is_here())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
