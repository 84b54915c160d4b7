#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Two C++ programs without Python: one loads the library, one scores texts by an exported model.

Builds examples/cpp with the compiler that $CXX names in one word (g++). The model is a byte-level
language model, trained for a moment, then torch.export and AOTInductor, its loss per token in the
graph. What C++ says of source files is compared with Python, file by file.

python examples/cpp_programs.py          about a minute on two cores
python examples/cpp_programs.py --quick
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

import examples_common as common
import torch
from acts.language.data import source_files
from torch import Tensor, nn

import masked_loss_ext as mle

SOURCES = Path(__file__).parent / "cpp"
TORCH = Path(torch.__file__).parent
INCLUDES = ("include", "include/torch/csrc/api/include")
FILES, LEARNING_RATE = 5, 3e-3


class Scorer(nn.Module):
    """What each byte costs, in nats; 0 at padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(tokens)
        return mle.masked_cross_entropy(logits, tokens, mask, shift=1, reduction="none")


def library() -> str:
    """The one that this process has loaded."""
    found = [path for path in torch.ops.loaded_libraries if "masked_loss_ext" in path]
    if found:
        return found[0]
    raise SystemExit("cpp_programs: the operators were not loaded from a file")


def build(name: str, folder: Path) -> Path:
    program = folder / name
    where = [f"-isystem{TORCH / path}" for path in INCLUDES]
    where += [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}"]
    libraries = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-std=c++20", SOURCES / f"{name}.cpp", "-o", program, *where, *libraries]
    subprocess.run(command, check=True)
    return program


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"cpp_programs: {command[0]} failed\n{done.stdout}{done.stderr}")
    return done.stdout


def train(wanted) -> nn.Module:
    model = common.make_language_model(wanted.seed)
    learn, _ = common.texts(wanted.quick)
    sampler = common.sampler(learn, wanted.seed + 1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in common.progress(wanted.steps, "training"):
        batch = sampler.batch()
        target = (batch.tokens, batch.attention_mask)
        optimizer.zero_grad()
        mle.masked_cross_entropy(model(batch.tokens), *target, shift=1).backward()
        optimizer.step()
    return model.requires_grad_(False).eval()


def export(scorer: Scorer, path: Path) -> None:
    """For any number of rows and bytes."""
    rows, longest = torch.export.Dim("rows", min=2), torch.export.Dim("longest", max=common.LONGEST)
    example = (torch.zeros(3, 16, dtype=torch.int64), torch.ones(3, 16, dtype=torch.bool))
    program = torch.export.export(scorer, example, dynamic_shapes=({0: rows, 1: longest},) * 2)
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def by_python(scorer: Scorer, file: Path) -> float:
    text = file.read_bytes()[: common.LONGEST]
    tokens = torch.tensor([list(text)])
    nats = scorer(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return nats.sum().item() / (len(text) - 1) / math.log(2)


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=150, quick=3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begin = time.perf_counter()
        load, score = build("load", folder), build("score", folder)
        print(f"built in {time.perf_counter() - begin:.0f} s")
        print(run(load, library()), end="")
        scorer = Scorer(train(wanted))
        begin = time.perf_counter()
        export(scorer, folder / "model.pt2")
        print(f"exported and compiled in {time.perf_counter() - begin:.0f} s")
        chosen = source_files()[:FILES]
        lines = run(score, library(), folder / "model.pt2", common.LONGEST, *chosen)
        print(lines, end="")
    bits = [float(line.split()[0]) for line in lines.splitlines()]
    off = max(abs(b - by_python(scorer, f)) for b, f in zip(bits, chosen, strict=True))
    if not off < 1e-4:
        raise SystemExit(f"cpp_programs: C++ and Python differ by {off:.1e} bits per byte")
    mean = sum(bits) / len(bits)
    print(f"bits per byte of {len(bits)} files: {mean:.3f} in C++, Python within {off:.0e}; 8 raw")


if __name__ == "__main__":
    main()
