# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks compaction``: what masking dropped tokens saves, and what removing them.

Counts, not times: blocks of 128 x 128 that FlexAttention computes (full and partial ones), mean
over seeded draws of keep_k, so that every machine prints the same table.

  documents  nothing dropped;            masked   PackedLayout(lengths, keep_k)
  compact    layout.compact();           aligned  layout.compact(align=128, bucket=128)

The cost of a whole layer, forward: 24 d^2 for the linear maps of each token (4 d^2 attention and
8 d^2 MLP weights, two operations each), 4 d for each pair of each block. "varlen" is ``compact``
with a kernel that takes cu_seqlens and tiles each sample from its own beginning: the kept tokens,
and the blocks of aligned samples. There is none for causal_last.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import masked_loss_ext as mle

from .report import aligned, as_text
from .tables import RESULTS

BLOCK, DRAWS, SEED = 128, 100, 4
PATH = RESULTS / "compaction.csv"
# patches, registers, samples, keep_k, mode, block, width of the network
PLANS = (
    (1024, 256, 8, "uniform", "full", BLOCK, 1792),
    (1024, 256, 8, "uniform", "full", 64, 1792),
    (1024, 256, 8, "pow2", "full", BLOCK, 1792),
    (256, 256, 8, "uniform", "full", BLOCK, 1792),
    (256, 256, 8, "uniform", "full", BLOCK, 768),
    (0, 256, 16, "uniform", "full", BLOCK, 768),
    (1024, 256, 8, "uniform", "causal_last", BLOCK, 1792),
    (1000, 250, 8, "uniform", "full", BLOCK, 1792),
)
FORMS = ("masked", "compact", "aligned")
COLUMNS = (
    "layout", "keep_k", "mode", "block", "draws", "pairs_saved",
    "documents_blocks", *(f"{form}_{what}" for form in FORMS for what in ("blocks", "partial")),
    *(f"{form}_blocks_saved" for form in FORMS), "compact_tokens_saved", "aligned_tokens_saved",
    "width", "attention_share", *(f"{form}_layer_saved" for form in (*FORMS, "varlen")),
)  # fmt: skip


def blocks_of(layout: mle.PackedLayout, mode: str, block: int) -> tuple[int, int, int]:
    """Blocks that are computed, how many of them partial, and allowed pairs."""
    stats = layout.intervals(mode).stats(block)
    return stats.full_blocks + stats.partial_blocks, stats.partial_blocks, stats.pairs


def layer_cost(tokens: float, blocks: float, block: int, width: int) -> float:
    return 24 * width**2 * tokens + 4 * width * blocks * block**2


def draw_counts(lengths: list, keep_k: list[int], mode: str, block: int) -> dict[str, int]:
    layout = mle.PackedLayout(lengths, keep_k)
    compact, spaced = layout.compact(), layout.compact(align=BLOCK, bucket=BLOCK)
    found = {}
    for form, one in zip(FORMS, (layout, compact.layout, spaced.layout), strict=True):
        found[f"{form}_blocks"], found[f"{form}_partial"], found[f"{form}_pairs"] = blocks_of(
            one, mode, block
        )
    pairs = {found.pop(f"{form}_pairs") for form in FORMS}
    if len(pairs) != 1:  # the same attention in three forms, or the table means nothing
        raise AssertionError(f"{lengths}, {keep_k}, {mode}: allowed pairs differ, {sorted(pairs)}")
    tokens = {
        "compact_tokens": compact.layout.total_len,
        "aligned_tokens": spaced.layout.padded_len,
    }
    return {**found, **tokens, "pairs": pairs.pop()}


def mean_counts(lengths: list, registers: int, how: str, mode: str, block: int, draws: int) -> dict:
    generator = torch.Generator().manual_seed(SEED)
    every = [
        draw_counts(
            lengths,
            mle.sample_keep_k(registers, len(lengths), how, generator=generator).tolist(),
            mode,
            block,
        )
        for _ in range(draws)
    ]
    return {name: sum(one[name] for one in every) / draws for name in every[0]}


def plan_row(plan: Sequence, draws: int = DRAWS) -> dict[str, object]:
    patches, registers, samples, how, mode, block, width = plan
    # Without patches a sample is one segment, that of the registers.
    lengths = [[patches, registers] if patches else [registers]] * samples
    documents, _, pairs = blocks_of(mle.PackedLayout(lengths), mode, block)
    mean = mean_counts(lengths, registers, how, mode, block, draws)
    total = samples * (patches + registers)
    tokens = {"masked": total, "compact": mean["compact_tokens"], "aligned": mean["aligned_tokens"]}
    whole = layer_cost(total, documents, block, width)
    cost = {f: layer_cost(tokens[f], mean[f"{f}_blocks"], block, width) for f in FORMS}
    if mode != "causal_last":
        cost["varlen"] = layer_cost(tokens["compact"], mean["aligned_blocks"], block, width)
    row = {"layout": f"{patches}+{registers} x{samples}", "keep_k": how, "mode": mode}
    row |= {"block": block, "draws": draws, "pairs_saved": 1 - mean["pairs"] / pairs}
    row |= {"documents_blocks": documents}
    row |= {name: mean[name] for name in COLUMNS if name in mean}
    row |= {f"{form}_blocks_saved": 1 - mean[f"{form}_blocks"] / documents for form in FORMS}
    row |= {f"{form}_tokens_saved": 1 - tokens[form] / total for form in FORMS[1:]}
    row |= {"width": width, "attention_share": 1 - layer_cost(total, 0, block, width) / whole}
    return row | {f"{form}_layer_saved": 1 - one / whole for form, one in cost.items()}


def percent(*shares: object) -> str:
    return " / ".join("-" if share is None else f"{share:.1%}" for share in shares)


HEAD = ("layout, keep_k", "mode", "block", "documents", "masked", "compact", "aligned",
        "blocks saved: mask / compact / aligned", "pairs saved",
        "tokens: compact / aligned")  # fmt: skip
LAYER_HEAD = ("layout, keep_k", "mode", "block", "width", "attention share",
              "layer saved: mask / compact / aligned / varlen")  # fmt: skip


def tables(rows: Iterable[Mapping]) -> str:
    blocks, layers = [HEAD], [LAYER_HEAD]
    for row in rows:
        about = (f"{row['layout']} {row['keep_k']}", row["mode"], str(row["block"]))
        counts = [f"{row[f'{f}_blocks']:.0f} ({row[f'{f}_partial']:.0f})" for f in FORMS]
        saved = percent(*(row[f"{form}_blocks_saved"] for form in FORMS))
        tokens = percent(row["compact_tokens_saved"], row["aligned_tokens_saved"])
        blocks.append(
            (
                *about,
                str(row["documents_blocks"]),
                *counts,
                saved,
                percent(row["pairs_saved"]),
                tokens,
            )
        )
        layer = percent(*(row.get(f"{form}_layer_saved") for form in (*FORMS, "varlen")))
        layers.append((*about, str(row["width"]), percent(row["attention_share"]), layer))
    return "\n".join([*aligned(blocks), "", *aligned(layers)])


def run(path: Path = PATH) -> None:
    rows = [plan_row(plan) for plan in PLANS]
    print(f"Blocks computed (of them partial), mean over {DRAWS} draws of keep_k\n")
    print(tables(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: as_text(row.get(name)) for name in COLUMNS} for row in rows)
    print(f"\nwritten: {path}")
