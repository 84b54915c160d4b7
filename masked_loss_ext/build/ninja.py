# SPDX-License-Identifier: BSD-3-Clause
"""Compile the library with ninja: what it will do is said before, how far it is meanwhile, and the
compiler's own words if it fails.

ninja is driven directly, not through torch.utils.cpp_extension, because that cannot build CUDA
kernels against a CPU-only torch and has no flags per source.
"""

import filecmp
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import sources
from .files import (
    copy_whole,
    is_whole,
    make_folder,
    told_in_a_sentence,
    workshop,
    write_if_changed,
)
from .toolchain import BuildError, Toolchain, answer_of, say, setting, show

LINKED = "linked.so"  # what ninja makes, and what becomes the library once it is found whole
# Rough, for what is said alone: of a core, and per architecture where it is nvcc's.
SECONDS_PER_CPU_SOURCE, SECONDS_PER_CUDA_SOURCE, LONGEST_CUDA_SOURCE = 3, 17, 45
SECONDS_BETWEEN_LINES = 30  # where no terminal shows one line that changes
CANNOT_WRITE = re.compile(
    "No space left on device|Disk quota exceeded|Read-only file system|"
    "File too large|File size limit exceeded"
)
# By the shell of a compiler that was killed, or by the compiler of a program of its own.
KILLED = re.compile("^Killed$|Killed signal terminated program", re.M)


def _shell(words):
    """A command line for a ninja file; $in, $out and $flags stay ninja's."""
    ours = ("$in", "$out", "$out.d", "$flags")
    quote = lambda word: shlex.quote(str(word)).replace("$", "$$")  # noqa: E731
    return " ".join(w if str(w) in ours else quote(w) for w in words)


def _path(path):
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_file(tools, output):
    root = sources.csrc_dir()
    common = [f"-D{define}" for define in sources.DEFINES]
    include = tools.torch_root / "include"
    common += [f"-I{root}", "-isystem", include]
    # The library names its sources as in an installed package, and no folder of this machine.
    unnamed = [f"-fmacro-prefix-map={root}/=csrc/", f"-fmacro-prefix-map={include}/="]
    files = ["-MF", "$out.d", "-c", "$in", "-o", "$out"]
    cxx = [*tools.cxx, *sources.CXX_FLAGS, "$flags", "-fPIC", *common, *unnamed, "-MMD", *files]
    libraries = [f"-L{tools.torch_root / 'lib'}", "-ltorch_cpu"]
    rules = {"cxx": _shell(cxx)}
    steps = [(unit.object, "cxx", root / unit.source, unit.flags) for unit in sources.units()]
    steps.append(("build_info.cpp.o", "cxx", "build_info.cpp", []))
    if tools.cuda_home:
        nvcc = [tools.cuda_home / "bin/nvcc", *sources.NVCC_FLAGS, *tools.cuda_flags, *common]
        nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-MD", *files]
        nvcc += [f"-Xcompiler={flag}" for flag in unnamed]
        # What it says is kept, and said.
        keep = " > $out.log 2>&1; status=$$?; cat $out.log; exit $$status"
        rules["nvcc"] = _shell(nvcc) + keep
        # First, because it takes longest.
        cuda = [(f"{name}.o", "nvcc", root / name, []) for name in sources.CUDA_SOURCES]
        hosts = [(f"{name}.o", "cxx", root / name, []) for name in sources.CUDA_HOST_SOURCES]
        steps = cuda + hosts + steps
        libraries += [f"-L{tools.cudart_dir}", *(f"-l{name}" for name in sources.CUDA_LIBRARIES)]
    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
    for made, rule, source, flags in steps:
        lines += [f"build {_path(made)}: {rule} {_path(source)}", f"  flags = {_shell(flags)}"]
    # Under a name of its own, the shell's number: a linker may outlive a builder that was killed.
    link = _shell([*tools.cxx, "-shared", *sources.LINK_FLAGS, "$in", *libraries, "-o"])
    partial = "$out.$$$$.part"
    lines += ["rule link", f"  command = {link} {partial} && mv {partial} $out"]
    objects = " ".join(_path(step[0]) for step in steps)
    lines += [f"build {_path(output)}: link {objects}", ""]
    return "\n".join(lines)


def compile_library(tools, folder, note="", advice="it must be a folder that can be written to"):
    """Bring folder/_C.abi3.so up to date (only what changed is compiled) and return its path.

    `note` follows the announcement, `advice` an error about the folder.
    """
    folder = Path(folder).absolute()
    library = folder / sources.LIBRARY
    with told_in_a_sentence(folder, advice):
        make_folder(folder)
        with workshop(folder) as (place, lock):
            info = sources.build_info(tools.architectures, tools.torch_version, tools.toolkit)
            write_if_changed(place / "build_info.cpp", sources.build_info_source(info))
            write_if_changed(place / "build.ninja", ninja_file(tools, LINKED))
            linked = _linked(Ninja(tools, place, lock, advice), info, note)
            if not library.is_file() or not filecmp.cmp(linked, library, shallow=False):
                copy_whole(linked, library)
    return library


def _linked(ninja, info, note):
    linked = ninja.folder / LINKED
    for _ in range(2):  # again where a crash or a full disk once cut short what is there
        ninja.bring_up_to_date(note)
        if is_whole(linked) and info.items() <= sources.read_build_info(linked).items():
            return linked
        linked.unlink()
    raise BuildError(f"the linker has made no whole library in {ninja.folder}; {ninja.advice}")


@dataclass
class Ninja:
    tools: Toolchain
    folder: Path
    lock: int | None  # inherited by all that ninja starts, see files.locked
    advice: str  # where the folder cannot be written to

    def bring_up_to_date(self, note):
        command = [self.tools.ninja, "-C", str(self.folder), *_jobs()]
        steps = answer_of([*command, "-n"]).stdout
        if "no work to do" in steps:
            return
        kinds = "the CPU kernels"
        if self.tools.cuda_home:
            kinds += f" and the CUDA kernels ({', '.join(self.tools.architectures)})"
        if self.tools.remark:
            say(self.tools.remark)
        seconds, torch = _estimate(steps, self.tools.architectures), self.tools.torch_version
        say(f"compiling {kinds} with PyTorch {torch}, takes about {seconds} s{note}")
        with Progress(seconds) as progress:
            self._run(command, progress)
        say(f"compiled in {progress.seconds():.0f} s")

    def _run(self, command, progress):
        verbose = setting("MASKED_LOSS_EXT_VERBOSE") == "1"
        # Errors in English, so that a full disk is known by its name.
        environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
        output = []
        with subprocess.Popen(
            [*command, *(["-v"] if verbose else [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            umask=0o022,
            pass_fds=[] if self.lock is None else [self.lock],
        ) as ninja:
            for line in ninja.stdout:
                output.append(line)
                if verbose:
                    show(line, end="")
                else:
                    progress.hear(line)
        if ninja.returncode:
            raise BuildError(self._trouble("".join(output)) or failure(output, self.folder))

    def _trouble(self, said):
        """What is not the sources' fault, in a sentence."""
        if KILLED.search(said):
            return (
                f"the compiler was killed in {self.folder}, as systems do that run out of memory; "
                "MAX_JOBS=1 compiles one file at a time"
            )
        found = CANNOT_WRITE.search(said)
        if found is None:
            return None
        scratch = os.environ.get("TMPDIR") or tempfile.gettempdir()
        return (
            f"the compiler could not write to {self.folder} or, for its own files, to {scratch}: "
            f"{found[0]}; {self.advice} (or TMPDIR)"
        )


def _jobs():
    wanted = os.environ.get("MAX_JOBS", "").strip()
    if not wanted:
        return []
    if not re.fullmatch("0*[1-9][0-9]{0,5}", wanted):
        raise BuildError(f"MAX_JOBS must be a whole number from 1 on, got {wanted!r}")
    return ["-j", wanted]


def _estimate(steps, architectures):
    """Seconds, roughly, for ninja's list of steps."""
    cuda = len(re.findall(r"^\[.*bin/nvcc ", steps, re.M))
    cpu = len(re.findall(r"^\[.* -c .*\.cpp ", steps, re.M))
    cores = len(os.sched_getaffinity(0))
    compiled = sum(name.startswith("sm_") for name in architectures)
    longest = LONGEST_CUDA_SOURCE * compiled if cuda else SECONDS_PER_CPU_SOURCE
    total = cuda * SECONDS_PER_CUDA_SOURCE * compiled + cpu * SECONDS_PER_CPU_SOURCE
    return max(total // cores, longest)


class Progress:
    """How far ninja is: on a terminal a line that counts steps and seconds, else a line now and
    then. The first steps may take a minute each, so it counts while none ends."""

    def __init__(self, expected):
        self._expected, self._started = expected, time.monotonic()
        self._step, self._said = "", self._started
        self._ended = threading.Event()
        self._thread = None

    def __enter__(self):
        if _is_terminal():
            self._thread = threading.Thread(target=self._count, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            show("\r\033[K", end="")

    def seconds(self):
        return time.monotonic() - self._started

    def hear(self, line):
        """A line that ninja has said."""
        step = re.match(r"\[\d+/\d+\]", line)
        if step is None:
            return
        self._step = f" {step[0]}"
        if self._thread is None and time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            say(self._text())

    def _count(self):
        while not self._ended.wait(1):
            show(f"\rmasked_loss_ext: {self._text()}\033[K", end="")

    def _text(self):
        return f"compiling{self._step} {self.seconds():.0f} s of about {self._expected} s"


def _is_terminal():
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


def failure(output, folder):
    """The first failed step in the compiler's own words, without the long command line."""
    start = next((i for i, line in enumerate(output) if line.startswith("FAILED:")), None)
    if start is None:
        return f"ninja failed in {folder}: " + "".join(output[-3:]).strip()
    step = re.sub(r"^FAILED:\s*(\[code=\d+\])?", "", output[start]).strip()
    words = itertools.takewhile(
        lambda line: not re.match(r"ninja:|FAILED:|\[\d+/\d+\]", line), output[start + 2 :]
    )
    return f"the compiler failed at {step}:\n" + "".join(itertools.islice(words, 30))
