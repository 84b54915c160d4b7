# SPDX-License-Identifier: BSD-3-Clause
"""Wrong lines of the CUDA kernels, which run under the simulator of tests/cuda_sim."""

from .mutant import Mutant

MUTANTS = [
    Mutant(
        "csrc/common/cuda/reduce.cuh",
        "elementwise, simulated",
        "a block's sums are added before all warps have written theirs",
        "  if (lane == 0) scratch[warp] = value;\n  __syncthreads();\n  const int warps",
        "  if (lane == 0) scratch[warp] = value;\n  const int warps",
    ),
    Mutant(
        "csrc/elementwise/cuda/kernels.cuh",
        "elementwise, simulated",
        "the last columns of a row that fill no pack are not read",
        "for (int64_t col = whole + lane; col < item.end; col += q.lanes) {",
        "for (int64_t col = whole + lane; col < whole; col += q.lanes) {",
    ),
    Mutant(
        "csrc/elementwise/cuda/kernels.cuh",
        "elementwise, simulated",
        "an element mask is asked once a pack",
        "is_on(q.mask, item.offset[kMask] + (col + i) * stride[kMask]));",
        "is_on(q.mask, item.offset[kMask] + col * stride[kMask]));",
    ),
    Mutant(
        "csrc/elementwise/cuda/kernels.cuh",
        "elementwise, simulated",
        "the row's loss is that of its first lane's share",
        "    sum = group_sum(sum, q.lanes);\n"
        "    if (item.exists && lane == 0) loss[item.offset[kLoss]]",
        "    if (item.exists && lane == 0) loss[item.offset[kLoss]]",
    ),
    Mutant(
        "csrc/elementwise/cuda/kernels.cuh",
        "elementwise, simulated",
        "the gradient of excluded rows is not written",
        "for_elements<Reader, Tail>(q, item, lane, true, [&]",
        "for_elements<Reader, Tail>(q, item, lane, false, [&]",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/items.cuh",
        "cross entropy, simulated",
        "columns before a row's first 16-byte boundary are read by each of its parts",
        "s.head_columns = part == 0 ? static_cast<int>(head) : 0;",
        "s.head_columns = static_cast<int>(head);",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/items.cuh",
        "cross entropy, simulated",
        "a row is read by packs of 16 bytes where it does not lie on their boundary",
        "if (aligned) return load_pack(row + col);",
        "return load_pack(row + col);",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/sums.cuh",
        "cross entropy, simulated",
        "packs that are not there count as logits of 0",
        "u[i][j] = there ? widen(packs[i].value[j]) : -A(INFINITY);",
        "u[i][j] = there ? widen(packs[i].value[j]) : A(0);",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/sums.cuh",
        "cross entropy, simulated",
        "lanes' sums are added without being scaled to the largest maximum",
        "  rescale(sums, largest, exponential(sums.max - largest));\n"
        "  sums.max = largest;\n  sums.sum = group_sum",
        "  sums.max = largest;\n  sums.sum = group_sum",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/totals.cuh",
        "cross entropy, simulated",
        "with a normalizer the batch's own count divides",
        "denominator = q.normalizer.data != nullptr ? load<double>(q.normalizer, 0) : "
        "all.denominator;",
        "denominator = all.denominator;",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/gradient.cuh",
        "cross entropy, simulated",
        "the softcap's slope is missing",
        "    if (kFull && unit.capped()) gradient *= 1 - u * u;\n",
        "",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/sweep.cuh",
        "sweep, simulated",
        "a block writes over the row before its coefficients are there",
        "    if (block_per_part) {\n      __syncthreads();\n    } else {\n"
        "      __syncwarp();\n    }\n",
        "",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/sweep.cuh",
        "sweep, simulated",
        "a block of a cluster leaves while others read its shared memory",
        "  if (q.parts > 1) Cluster::wait();\n",
        "",
    ),
    Mutant(
        "csrc/cross_entropy/cuda/vocab_parallel.cuh",
        "shards, simulated",
        "rows go where they stand in the chunk, not where they stand in the message",
        "pack(format, part, message + place * numbers_of(format));",
        "pack(format, part, message + row * numbers_of(format));",
    ),
    Mutant(
        "csrc/cross_entropy_terms/cuda/forward.cuh",
        "terms, simulated",
        "parts' sums at T are scaled as those at 1",
        "parts[i].scaled * exp(below * scale) : parts[i].scaled;",
        "parts[i].scaled * exp(below) : parts[i].scaled;",
    ),
    Mutant(
        "csrc/linear_cross_entropy/cuda/kernels.cuh",
        "linear, simulated",
        "counts of a tile of rows are written while the last one's are read",
        "    before += in_tile;\n    __syncthreads();  // the scratch serves the next tile\n",
        "    before += in_tile;\n",
        why="the simulator runs a block's threads in one order, where nobody overtakes; racecheck"
        " of make gpu looks for it, on a GPU",
    ),
    Mutant(
        "csrc/linear_cross_entropy/cuda/kernels.cuh",
        "linear, simulated",
        "a hidden state of a row that does not count is read at a place before the first",
        "  if (place < 0) {\n    for (int64_t i",
        "  if (place < -1) {\n    for (int64_t i",
    ),
    Mutant(
        "csrc/repetition/cuda/kernels.cuh",
        "repetition, simulated",
        "a name is the first position to come, not the smallest",
        "if (i < holder) atomicMin(s.slots + slot, i);",
        "if (i > holder) atomicMin(s.slots + slot, i);",
    ),
    Mutant(
        "csrc/block_mask/cuda/kernels.cuh",
        "block mask, simulated",
        "a second tile of blocks begins with the differences of the first",
        "touched[j] = covered[j] = 0;",
        "touched[j] = covered[j] = first == 0 ? 0 : covered[j];",
    ),
]
