# SPDX-License-Identifier: BSD-3-Clause
"""Find, load or compile the native library, at the first import of the package.

MASKED_LOSS_EXT_JIT=1 ignores a built library; MASKED_LOSS_EXT_BUILD=aot refuses to compile one.
"""

import contextlib
import hashlib
import os
import platform
import pwd
from pathlib import Path
from typing import NamedTuple

import torch

from .._version import __version__
from . import files, ninja, sources
from .toolchain import (
    BuildError,
    check_settings,
    cuda_home,
    cxx_identity,
    find_architectures,
    find_toolchain,
    identity,
    say,
    setting,
    wants_cuda,
)

TORCH_ROOT = Path(torch.__file__).parent
# What compilers read by themselves; CXX is looked at apart.
CUDA_VARIABLES = ("NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")


class Loaded(NamedTuple):
    kind: str  # as load() returns it
    library: Path | None  # None where the operators were there before


loaded: Loaded | None = None  # what the first load() of this process came to


class NotCompiled(BuildError):
    """There is no library yet, and the caller did not want to wait for one."""


def load(may_compile=True):
    """Register the operators; returns how: "preloaded", "aot" or "jit"."""
    global loaded
    try:
        found = _load(may_compile)
    except NotCompiled:
        raise
    except BuildError as error:
        # The text is the whole story; the frames that led here would bury it.
        raise ImportError(f"masked_loss_ext: {error}") from None
    except OSError as error:
        raise ImportError(f"masked_loss_ext: {files.sentence(error, sources.PACKAGE)}") from None
    loaded = loaded or found
    return found.kind


def _load(may_compile):
    check_settings()
    # A second copy in one process crashes it, so ask the dispatcher before touching any file.
    if hasattr(torch.ops.masked_loss_ext, "_version"):
        _check_version("the library that is already loaded in this process")
        return Loaded("preloaded", None)
    library = sources.PACKAGE / sources.LIBRARY
    if setting("MASKED_LOSS_EXT_JIT") == "0" and library.is_file() and _usable(library):
        _register(library, "reinstall masked_loss_ext")
        return Loaded("aot", library)
    library = compile_at_import(may_compile)
    _register(library, f"remove the folder {library.parent}, then it is compiled again")
    return Loaded("jit", library)


def _register(library, cure):
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise BuildError(f"{library} cannot be loaded ({why}); {cure}") from None
    _check_version(str(library))


def _check_version(what):
    found = torch.ops.masked_loss_ext._version()
    if found != __version__:
        raise BuildError(
            f"{what} is version {found}, this package is {__version__}; only one version can be "
            "loaded in a process, so remove one of the two and start Python again"
        )


def _usable(library):
    """False for a library that must not be used in silence: it is older than its sources."""
    if not files.is_whole(library):
        raise BuildError(f"{library} is damaged, it is no whole library; reinstall it")
    info = sources.read_build_info(library)
    if info.get("version") != __version__:
        raise BuildError(
            f"{library} is of version {info.get('version', 'unknown')}, this package is "
            f"{__version__}; reinstall it"
        )
    # An installed package's sources cannot change; those of a source tree do.
    in_source_tree = not (sources.PACKAGE / "csrc").is_dir()
    if in_source_tree and info["sources"] != sources.source_fingerprint():
        say(f"{library.name} is older than csrc, so it is not used; `make build` renews it")
        return False
    only_cpu = torch.version.cuda and info["cuda"] == "none"
    if only_cpu and wants_cuda(torch.version.cuda) and cuda_home(TORCH_ROOT):
        again = "pip install --no-build-isolation --no-deps --force-reinstall masked_loss_ext"
        say(
            "WARNING: the library has only CPU kernels, but PyTorch is built for CUDA "
            f"{torch.version.cuda} and nvcc is here; to use CUDA tensors build it again: "
            + ("make build" if in_source_tree else again)
        )
    return True


def cache_root():
    """Where torch's own extensions are cached too."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named:
        return Path(named).absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    home = os.environ.get("HOME")
    with contextlib.suppress(KeyError):  # a number without a name, as containers give them
        home = home or pwd.getpwuid(os.getuid()).pw_dir
    if not cache and not os.path.isabs(home or ""):
        raise BuildError(
            f"user {os.geteuid()} has no home folder to keep the compiled kernels in; set "
            "TORCH_EXTENSIONS_DIR to a folder that only you can write to"
        )
    return Path(cache or Path(home, ".cache")).absolute() / "torch_extensions"


def compile_at_import(may_compile=True):
    """Compile into the cache, or find it there; returns the library's path."""
    if setting("MASKED_LOSS_EXT_BUILD") == "aot":
        raise BuildError(
            "MASKED_LOSS_EXT_BUILD=aot, but there is no built library that fits; build one with: "
            "pip install --no-build-isolation ."
        )
    root = cache_root()
    advice = "set TORCH_EXTENSIONS_DIR to a folder with room that only you can write to"
    with files.told_in_a_sentence(root, advice):
        files.make_folder(root)
        _trust(files.distrust_around, root, advice)
        fingerprint = sources.source_fingerprint()
        folders = _cache_folders(root, fingerprint)
        for folder in filter(os.path.lexists, folders):
            _trust(files.distrust, folder, advice)
            library = folder / sources.LIBRARY
            if os.path.lexists(library):
                _trust(files.distrust, library, advice)
                if _is_sound(library, fingerprint):
                    return library
        if not may_compile:
            raise NotCompiled("not compiled yet: the first import of masked_loss_ext does it, once")
        tools, folder = find_toolchain(), folders[0]
        files.make_folder(folder)
        _trust(files.distrust, folder, advice)
        return ninja.compile_library(tools, folder, f", once (kept in {folder})", advice)


def _trust(look, path, advice):
    if distrusted := look(path):
        raise BuildError(f"{distrusted}, so no kernels are taken from it; remove it, or {advice}")


def _is_sound(library, fingerprint):
    info = sources.read_build_info(library) if files.is_whole(library) else {}
    if info.get("sources") == fingerprint:
        return True
    say(f"{library} is damaged or of another program, so it is compiled again")
    return False


def _cache_folders(root, fingerprint):
    """The folder for everything that could make another library; if the C++ compiler alone cannot
    be found, all that differ in it. Cheap, as every later import asks."""
    parts = [fingerprint, torch.__version__, platform.machine(), os.environ.get("CXX")]
    if wants_cuda(torch.version.cuda):
        # Installing nvcc later must not leave the CPU-only library in use, nor a node with other
        # GPUs and the same home a library without their code.
        home = cuda_home(TORCH_ROOT)
        parts += [setting("MASKED_LOSS_EXT_CUDA"), *map(os.environ.get, CUDA_VARIABLES)]
        parts.append(home and [identity(home / "bin/nvcc"), find_architectures()])
    name, compiler = f"masked_loss_ext-{_short_hash(parts)}", cxx_identity()
    if compiler:
        return [root / f"{name}-{_short_hash(compiler)}"]
    return sorted(root.glob(f"{name}-*"))


def _short_hash(parts):
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
