# SPDX-License-Identifier: BSD-3-Clause
"""A small image tokenizer: patches -> registers -> patches, by attention inside each crop."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import masked_loss_ext as mle

from ..common.transformer import Block
from .data import REGISTERS, Batch

INPUT_SCALE = 6.0  # makes the patches about as large as the embedding of their places
FREQUENCIES = 6  # half waves per crop side that positions are told apart by


class PackedBlock(Block):
    """The transformer block on a packed sequence: who sees whom is the layout's business."""

    def forward(self, x: Tensor, layout: mle.PackedLayout, mode: str) -> Tensor:
        """x [1, S, dim]."""
        tokens, dim = x.shape[1:]
        qkv = self.qkv(self.norm_attention(x)).view(1, tokens, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = mle.packed_attention(query, key, value, layout, mode)
        x = x + self.out(mixed.transpose(1, 2).reshape(1, tokens, dim))
        return x + self.mlp(self.norm_mlp(x))


def place_features(places: Tensor) -> Tensor:
    """[P, 4] -> [P, F]: cosines along both sides and their products, and the crop's size."""
    half_waves = math.pi * torch.arange(FREQUENCIES, device=places.device)
    rows, columns = (torch.cos(places[:, i, None] * half_waves) for i in (0, 1))
    grid = rows[:, :, None] * columns[:, None, :]
    return torch.cat([grid.flatten(1), places[:, 2:]], dim=1)


class Tokenizer(nn.Module):
    """Crops -> registers of ``code`` values each -> crops.

    In the encoder the registers see all patches and, of each other, those before them
    ("causal_last"), so a register is the same however many follow it. In the decoder patches that
    know their place, and nothing else, see the kept registers and each other. Which registers are
    kept is the layout's business alone; with ``layout.compact().layout`` the dropped ones are not
    even computed.
    """

    def __init__(
        self, spectrum: Tensor, dim: int = 128, depth: int = 2, heads: int = 4, code: int = 16
    ) -> None:
        super().__init__()
        self.register_buffer("spectrum", spectrum)  # [C]
        channels, features = spectrum.numel(), FREQUENCIES**2 + 2
        self.code = code
        self.embed = nn.Linear(channels, dim)
        self.place = nn.Linear(features, dim)
        self.registers = nn.Parameter(torch.randn(REGISTERS, dim))
        self.encoder = nn.ModuleList(PackedBlock(dim, heads) for _ in range(depth))
        self.to_code = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, code))
        self.from_code = nn.Linear(code, dim)
        self.register_place = nn.Parameter(0.5 * torch.randn(REGISTERS, dim))
        self.query = nn.Linear(features, dim)
        self.decoder = nn.ModuleList(PackedBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, channels)
        nn.init.zeros_(self.head.weight)

    def forward(self, batch: Batch, layout: mle.PackedLayout) -> Tensor:
        """[1, S, C] estimates of the patches, meaningless where the layout has registers."""
        return self.decode(batch, self.encode(batch, layout), layout)

    def encode(self, batch: Batch, layout: mle.PackedLayout) -> list[Tensor]:
        """Of each crop [registers, code]; 0 where they are dropped."""
        places = place_features(batch.places)
        # Halfway to white: white, the few coefficients that say most would drown among the others.
        scaled = INPUT_SCALE * batch.patches / (self.spectrum * self.spectrum.max()).sqrt()
        patches = self.embed(scaled) + self.place(places)
        x = self.pack(patches, [self.registers] * len(batch.shapes), layout)
        for block in self.encoder:
            x = block(x, layout, "causal_last")
        return [registers for _, registers in layout.unpack(self.to_code(x)[0])]

    def decode(self, batch: Batch, codes: list[Tensor], layout: mle.PackedLayout) -> Tensor:
        queries = self.query(place_features(batch.places))
        registers = [self.from_code(c) + self.register_place[: len(c)] for c in codes]
        x = self.pack(queries, registers, layout)
        for block in self.decoder:
            x = block(x, layout, "full")
        return self.spectrum * self.head(self.norm(x))

    @staticmethod
    def pack(patches: Tensor, registers: list[Tensor], layout: mle.PackedLayout) -> Tensor:
        lengths = layout.segment_lengths
        rows = patches.split([n for n, _ in lengths])
        samples = zip(rows, registers, lengths, strict=True)
        return layout.pack([[p, r[:k]] for p, r, (_, k) in samples])[None]


def patch_mask(layout: mle.PackedLayout) -> Tensor:
    """[1, S] True where a patch stands."""
    return (layout.segment_ids == 0)[None]


def pack_targets(batch: Batch, layout: mle.PackedLayout) -> Tensor:
    """[1, S, C] the patches where they stand in the layout, 0 elsewhere."""
    mask = patch_mask(layout)
    target = torch.zeros(*mask.shape, batch.patches.shape[1], device=mask.device)
    target[mask] = batch.patches
    return target


def reconstruction_loss(model: Tokenizer, batch: Batch, layout: mle.PackedLayout) -> Tensor:
    """Mean squared error of the patches; what stands at registers and padding is not read."""
    return mle.masked_mse(model(batch, layout), pack_targets(batch, layout), patch_mask(layout))
