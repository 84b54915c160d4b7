# SPDX-License-Identifier: BSD-3-Clause
"""Functions of the Python standard library, of very different length, as padded batches of bytes.

A text is the source of one function, decorators included, moved to the left margin, and an end
mark. Batches are filled on the right with the end mark's byte, as is usual, and are not sorted by
length: what is padding, only the mask knows. Letters: B texts, S bytes of the longest.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

END = 0  # marks the end of a text and fills the batch; no source file has this byte
HELD_OUT_EVERY = 8  # of the files, in order of their names
SHORTEST = 24  # bytes; below that a function says little


@dataclass
class Batch:
    tokens: Tensor  # [B, S] int64, bytes, END in the padding
    attention_mask: Tensor  # [B, S] bool, True = a byte of the text or its end mark

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.attention_mask.to(device))

    def real_bytes(self) -> int:
        return int(self.attention_mask.sum())

    def padding(self) -> float:
        """Share of the batch."""
        return 1.0 - self.real_bytes() / self.attention_mask.numel()


def source_files() -> list[Path]:
    """The modules of the standard library that are a single file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if len(files) < 2 * HELD_OUT_EVERY:
        raise SystemExit("demo: this Python comes without the sources of its standard library")
    return files


def split_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """(to train on, held out)."""
    held_out = files[::HELD_OUT_EVERY]
    return [file for file in files if file not in held_out], list(held_out)


def functions(files: Sequence[Path]) -> list[bytes]:
    return [text for file in files for text in functions_of(file) if len(text) >= SHORTEST]


def functions_of(file: Path) -> Iterator[bytes]:
    """Each outermost function, those of classes included."""
    source = file.read_text(encoding="utf-8")
    lines = source.splitlines()
    open_bodies: list[ast.AST] = [ast.parse(source)]
    while open_bodies:
        for node in open_bodies.pop().body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                text = "\n".join(lines[first - 1 : node.end_lineno])
                yield textwrap.dedent(text).encode()
            elif isinstance(node, ast.ClassDef):
                open_bodies.append(node)


def collate(texts: Sequence[bytes], longest: int) -> Batch:
    """A text that is cut off at ``longest`` bytes has no end mark."""
    rows = [torch.tensor([*text, END][:longest]) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=END)
    return Batch(tokens, torch.arange(tokens.shape[1]) < lengths[:, None])


class BatchSampler:
    """Draws batches; the same seed gives the same ones."""

    def __init__(self, texts: Sequence[bytes], seed: int, size: int, longest: int) -> None:
        self.texts, self.size, self.longest = texts, size, longest
        self.rng = torch.Generator().manual_seed(seed)

    def batch(self) -> Batch:
        chosen = torch.randint(len(self.texts), (self.size,), generator=self.rng)
        return collate([self.texts[i] for i in chosen.tolist()], self.longest)
