# SPDX-License-Identifier: BSD-3-Clause
"""The library as another compiler makes it: one with further flags, that sanitizers and coverage
need. Everything that asks for CXX gets it, the library at its first import and the simulator of the
tests too, so that nothing is said twice; the library that is shipped is left alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .kernels import ROOT, ninja, sources, toolchain

# Counts accesses by calls of its own (tests/cuda_sim/accesses.cpp), which no other flag goes with.
COUNTS_ACCESSES = "-fsanitize=thread"
LOADED = "import torch, masked_loss_ext; print(*torch.ops.loaded_libraries)"


@dataclass(frozen=True)
class Instrument:
    """``flags`` come behind those of the build, ``runtime`` before all else in a Python process."""

    name: str
    flags: Sequence[str]
    compiler: str = ""  # else the one that CXX names
    runtime: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return ROOT / "build" / "instrumented" / self.name

    def command(self) -> str:
        """The program that compiles with the flags; written where it is not there."""
        own = self.compiler or os.environ.get("CXX") or "g++"
        skipped = "" if COUNTS_ACCESSES in self.flags else (
            f'for word; do [ "$word" = {COUNTS_ACCESSES} ] && exec {own} "$@"; done\n'
        )  # fmt: skip
        program = self.folder / "c++"
        program.parent.mkdir(parents=True, exist_ok=True)
        # The compiler itself is not to run under what is preloaded.
        text = f'#!/bin/sh\nunset LD_PRELOAD\n{skipped}exec {own} "$@" {" ".join(self.flags)}\n'
        ninja.write_if_changed(program, text)
        program.chmod(0o755)
        return str(program)

    def environment(self) -> dict[str, str]:
        """Of a Python process that has everything compiled so, itself and by its children."""
        paths = [ROOT, ROOT / "tests" / "common", os.environ.get("PYTHONPATH", "")]
        found = {
            "CXX": self.command(),
            "MASKED_LOSS_EXT_JIT": "1",
            "TORCH_EXTENSIONS_DIR": str(self.folder / "extensions"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            **self.settings,
        }
        if self.runtime:
            found["LD_PRELOAD"] = " ".join(map(self._runtime_library, self.runtime))
        return {**os.environ, **found}

    def _runtime_library(self, name: str) -> str:
        asked = subprocess.run([self.command(), f"-print-file-name={name}"], capture_output=True)
        path = asked.stdout.decode().strip()
        if not os.path.isabs(path):  # the bare name comes back where there is none
            sys.exit(f"{name} is missing: the compiler must be gcc with its sanitizers")
        return path

    def imported_library(self) -> Path:
        """The one that Python processes load; compiled by the first."""
        line = [sys.executable, "-c", LOADED]
        asked = subprocess.run(line, env=self.environment(), stdout=subprocess.PIPE, text=True)
        if asked.returncode:
            sys.exit(f"the library for {self.name} cannot be compiled or loaded")
        return Path(asked.stdout.split()[-1])

    def library(self) -> Path:
        """One for programs that are not Python."""
        before = os.environ.get("CXX")
        os.environ["CXX"] = self.command()
        try:
            tools = toolchain.find_toolchain()
        finally:
            os.environ.pop("CXX")
            if before is not None:
                os.environ["CXX"] = before
        tools.cuda_home = None  # what runs on the host is looked at
        return ninja.compile_library(tools, self.folder / f"library-{self.digest()}")

    def digest(self, *more: object) -> str:
        """A name for what depends on the flags, which ninja does not see, and on more."""
        parts = [Path(self.command()).read_text(), *map(str, more)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def program(self, name: str, files: Sequence[Path], flags: Sequence[str | Path]) -> Path:
        """An executable, of sources that may include csrc's and PyTorch's headers."""
        folder = toolchain.torch_about()[0]
        includes = [f"-I{ROOT / 'csrc'}", "-isystem", folder / "include"]
        words = [*includes, *files, *flags, "-ldl", "-pthread"]
        headers = [path for file in files for path in sorted(file.parent.glob("*.h"))]
        texts = [path.read_text() for path in (*files, *headers)]
        made = self.folder / f"{name}-{self.digest(sources.source_fingerprint(), *words, *texts)}"
        if not made.is_file():
            partial = made.with_suffix(f".{os.getpid()}.part")
            command = [self.command(), "-std=c++17", *map(str, words), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} cannot be compiled for {self.name}:\n{done.stderr}")
            partial.replace(made)
        return made
