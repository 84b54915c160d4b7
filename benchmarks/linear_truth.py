# SPDX-License-Identifier: BSD-3-Clause
"""Loss and gradients of a large head in float64, some classes at a time.

The reference makes a float64 copy of the head and, of its gradient, several: five times the head's
own memory twice over. Here only the gradient that is compared is as large as the head, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cross_entropy_problems import IGNORED

CLASSES = 8192  # of a block


def head_truth(
    hidden: Tensor, weight: Tensor, target: Tensor, classes: int = CLASSES
) -> tuple[list[Tensor], list[Tensor]]:
    """([mean over the rows that count], [gradients of hidden states and head])."""
    kept = (target != IGNORED).nonzero()[:, 0]
    rows, labels = hidden.detach()[kept].double(), target[kept]
    blocks = list(zip(range(0, len(weight), classes), weight.detach().split(classes), strict=True))
    places = [(labels >= start) & (labels < start + len(block)) for start, block in blocks]

    lse, own = rows.new_full((len(kept),), -torch.inf), rows.new_zeros(len(kept))
    for (start, block), here in zip(blocks, places, strict=True):
        logits = rows @ block.double().t()
        lse = torch.logaddexp(lse, torch.logsumexp(logits, -1))
        own[here] = logits[here, labels[here] - start]

    to_rows = torch.zeros_like(rows)
    to_head = torch.empty_like(weight, dtype=torch.float32, requires_grad=False)
    for (start, block), here in zip(blocks, places, strict=True):
        wide = block.double()
        flow = (rows @ wide.t()).sub_(lse[:, None]).exp_()
        flow[here, labels[here] - start] -= 1
        flow /= len(kept)
        to_rows += flow @ wide
        to_head[start : start + len(block)] = flow.t() @ rows
    gradient = torch.zeros_like(hidden, dtype=torch.float64, requires_grad=False)
    gradient[kept] = to_rows
    return [(lse - own).mean()], [gradient, to_head]
