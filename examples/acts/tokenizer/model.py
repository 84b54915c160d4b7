# SPDX-License-Identifier: BSD-3-Clause
"""A small image tokenizer: patches -> registers -> patches, by attention inside each crop."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import masked_loss_ext as mle

from .data import REGISTERS, Batch
from .places import FEATURES, PATTERNS, SOURCE, features, patterns, register_patterns

SHARPNESS = 40.0  # of attention by place, before training: logits from -3 to 13
PREFER_SOURCES = 20.0  # added to the logit of a source: the others hold nothing yet
CONTENT_IN_LOGITS = 0.1  # before training place decides
PLACE_IN_CONTENT = 0.1


class PackedBlock(nn.Module):
    """A transformer block on a packed sequence: who sees whom is the layout's business.

    Queries and keys read content and place, values content alone. Before training the first block
    of a stack copies what is near, and the others do nothing, so that there is an image to improve
    from the first step on; a random start has to find the way from patch to register to patch
    first, which took longer than this act runs.
    """

    def __init__(self, dim: int, heads: int, *, copies: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.query_key = nn.Linear(dim, 2 * dim)
        self.value = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.start(copies)

    @torch.no_grad()
    def start(self, copies: bool) -> None:
        dim = self.out.in_features
        width = dim // self.heads
        if width < FEATURES:
            raise ValueError(f"a head must be at least {FEATURES} wide, got {width}")
        gain = math.sqrt(SHARPNESS / PATTERNS * math.sqrt(width))
        self.query_key.weight.copy_(gain * torch.eye(width, dim).repeat(2 * self.heads, 1))
        nn.init.zeros_(self.query_key.bias)
        if copies:
            bias = PREFER_SOURCES * math.sqrt(width) / gain
            self.query_key.bias[:dim].view(self.heads, width)[:, SOURCE] = bias
        self.norm_attention.weight.fill_(CONTENT_IN_LOGITS)
        nn.init.eye_(self.value.weight)
        nn.init.eye_(self.out.weight) if copies else nn.init.zeros_(self.out.weight)
        for x in (self.out.bias, self.mlp[2].weight, self.mlp[2].bias):
            nn.init.zeros_(x)

    def forward(self, x: Tensor, place: Tensor, layout: mle.PackedLayout, mode: str) -> Tensor:
        """x and place [1, S, dim]."""
        tokens, dim = x.shape[1:]
        query_key = self.query_key(self.norm_attention(x) + place)
        query, key = query_key.view(1, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        value = self.value(x).view(1, tokens, self.heads, -1).transpose(1, 2)
        mixed = mle.packed_attention(query, key, value, layout, mode)
        x = x + self.out(mixed.transpose(1, 2).reshape(1, tokens, dim))
        return x + self.mlp(self.norm_mlp(x))


class Stack(nn.Module):
    """Blocks, what the sequence is told of places, and how it is packed."""

    def __init__(self, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.place = linear(FEATURES, dim, torch.eye(dim, FEATURES))
        self.place.weight.data[:, PATTERNS:SOURCE] = 0  # sides: learnt
        self.blocks = nn.ModuleList(PackedBlock(dim, heads, copies=i == 0) for i in range(depth))
        self.register_buffer("register_patterns", register_patterns(REGISTERS))

    def forward(
        self,
        patches: Tensor,
        registers: list[Tensor],
        places: Tensor,
        layout: mle.PackedLayout,
        mode: str,
    ) -> Tensor:
        """[1, S, dim]. Sources are the patches in "causal_last", the registers in "full"."""
        from_patches = mode == "causal_last"
        at_patches = self.place(features(patterns(places[:, :2]), places[:, 2:], from_patches))
        sides = torch.zeros_like(self.register_patterns[:, :2])
        at_registers = self.place(features(self.register_patterns, sides, not from_patches))
        x = pack(patches, registers, layout)
        place = pack(at_patches, [at_registers] * len(registers), layout)
        for block in self.blocks:
            x = block(x, place, layout, mode)
        return x


class Tokenizer(nn.Module):
    """Crops -> registers of ``code`` values each -> crops.

    In the encoder the registers see all patches and, of each other, those before them
    ("causal_last"), so a register is the same however many follow it. In the decoder patches that
    know their place, and nothing else, see the kept registers and each other. Which registers are
    kept is the layout's business alone; with ``layout.compact().layout`` the dropped ones are not
    even computed. Before training a register holds the strongest coefficients of the patches near
    its place.
    """

    def __init__(
        self, spectrum: Tensor, dim: int = 96, depth: int = 2, heads: int = 2, code: int = 16
    ) -> None:
        super().__init__()
        # Halfway to white: white, the few coefficients that say most would drown among the others.
        self.register_buffer("unit", (spectrum * spectrum.max()).sqrt())  # [C]
        channels = spectrum.numel()
        strongest = torch.eye(channels)[spectrum.argsort(descending=True)[:dim]]
        self.code = code
        self.embed = linear(channels, dim, strongest)
        self.where_in = nn.Linear(FEATURES, dim)
        self.registers = nn.Parameter(0.1 * torch.randn(REGISTERS, dim))
        self.encoder = Stack(dim, depth, heads)
        self.to_code = linear(dim, code, torch.eye(code, dim))
        self.from_code = linear(code, dim, torch.eye(dim, code))
        self.where_out = nn.Linear(FEATURES, dim)
        self.decoder = Stack(dim, depth, heads)
        self.head = linear(dim, channels, strongest.T)

    def forward(self, batch: Batch, layout: mle.PackedLayout) -> Tensor:
        """[1, S, C] estimates of the patches, meaningless where the layout has registers."""
        return self.decode(batch, self.encode(batch, layout), layout)

    def encode(self, batch: Batch, layout: mle.PackedLayout) -> list[Tensor]:
        """Of each crop [registers, code]; 0 where they are dropped."""
        patches = self.embed(batch.patches / self.unit) + PLACE_IN_CONTENT * self.where_in(
            where(batch)
        )
        registers = [self.registers] * len(batch.shapes)
        x = self.encoder(patches, registers, batch.places, layout, "causal_last")
        return [codes for _, codes in layout.unpack(self.to_code(x)[0])]

    def decode(self, batch: Batch, codes: list[Tensor], layout: mle.PackedLayout) -> Tensor:
        registers = [self.from_code(c) for c in codes]
        queries = PLACE_IN_CONTENT * self.where_out(where(batch))
        return self.unit * self.head(self.decoder(queries, registers, batch.places, layout, "full"))


def linear(inputs: int, outputs: int, weight: Tensor) -> nn.Linear:
    """Begins as ``weight``, without a bias; both are learnt."""
    layer = nn.Linear(inputs, outputs)
    layer.weight.data.copy_(weight)
    nn.init.zeros_(layer.bias)
    return layer


def where(batch: Batch) -> Tensor:
    """[P, FEATURES] of the patches, as content."""
    return features(patterns(batch.places[:, :2]), batch.places[:, 2:], False)


def pack(patches: Tensor, registers: list[Tensor], layout: mle.PackedLayout) -> Tensor:
    """[1, S, dim]; of each crop's registers as many as the layout has room for."""
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
