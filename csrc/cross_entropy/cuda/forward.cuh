// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, forward: one read of the rows that count, by
// cross_entropy_sums_kernel; what follows from their sums is done a thread per row, in double.
#pragma once

#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

// One thread's share of a row, in u. A class-weighted sum has terms of both signs: one double addition
// per pack hides behind its loads.
template <class A>
struct RowShare {
  RowSums<A> sums;
  double weighted = 0;
};

// Adds packs of one row. kFull: also what statistics and label smoothing need.
template <class T, bool kFull>
struct RowReader {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, kFull>;

  const T* row;     // [V]
  const A* weight;  // [V] or null
  int64_t label;
  bool statistics, smoothing;
  Unit<A> unit;
  Exponential<A> exponential;
  RowShare<A> share;

  __device__ RowReader(const CrossEntropyParams& q, int64_t row_index, int64_t label)
      : row(static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row_index)),
        weight(static_cast<const A*>(q.weight.data)),
        label(label),
        statistics(q.statistics),
        smoothing(q.options.label_smoothing > 0 && label >= 0),
        unit(q),
        exponential(scale_of<A>(q)) {}

  // The label's column is no part of the sums (see RowSums). Nobody looks at a column at a time: that a pack
  // holds it is found by one comparison.
  template <int kVector>
  __device__ __forceinline__ void leave_out_label(A* u, int64_t col) const {
    const uint64_t offset = static_cast<uint64_t>(label - col);
    if (offset >= kVector) return;
#pragma unroll
    for (int j = 0; j < kVector; ++j) u[j] = j == static_cast<int>(offset) ? -A(INFINITY) : u[j];
  }

  // The largest before the label tells whether the label is the first of equal ones.
  template <int kVector>
  __device__ __forceinline__ void note_before(const A* u, A largest, int64_t col) {
    A& before = share.sums.before;
    if (col + kVector <= label) {
      before = max(before, largest);
    } else if (col < label) {
      for (int j = 0; j < kVector; ++j) {
        if (col + j < label) before = max(before, u[j]);
      }
    }
  }

  // A class of weight 0 takes no part, also where its logit is -inf. Distances from the largest of the pack
  // keep digits that large logits have not.
  template <int kVector>
  __device__ __forceinline__ void add_weighted(const A* u, int64_t col) {
    A base = u[0], sum = 0, weights = 0;
    for (int j = 1; j < kVector; ++j) base = max(base, u[j]);
    base = finite_base(base);
    for (int j = 0; j < kVector; ++j) {
      const A w = weight != nullptr ? weight[col + j] : A(1);
      sum += w == 0 ? A(0) : w * (u[j] - base);
      weights += w;
    }
    share.weighted += double(sum) + double(base) * double(weights);
  }

  // Packs that are not there hold -inf. One rescaling for all of them.
  template <int kCount, int kVector>
  __device__ __forceinline__ void add(const A (&u)[kCount][kVector], int64_t col, int64_t step) {
    RowSums<A>& sums = share.sums;
    A largest = sums.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A in_pack = u[i][0];
#pragma unroll
      for (int j = 1; j < kVector; ++j) in_pack = max(in_pack, u[i][j]);
      largest = max(largest, in_pack);
      if (kFull && statistics) note_before<kVector>(u[i], in_pack, col + i * step);
    }
    if (largest > sums.max) {
      rescale(sums, largest, exponential(sums.max - largest));
      sums.max = largest;
    }
    const A base = finite_base(largest);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A sum = 0, distance = 0, ties = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const A below = u[i][j] - base, e = exponential(below);
        sum += kFull && below == 0 ? A(0) : e;
        if (kFull) ties += below == 0 ? A(1) : A(0);
        if (kFull) distance += e * max(below, A(-1e30f));  // e is 0 at -inf
      }
      sums.sum += sum;
      if (kFull) sums.ties += ties;
      if (kFull) sums.distance += distance;
    }
  }

  // Packs from `end` on are not there.
  template <bool kAll>
  __device__ __forceinline__ void add_packs(const Vector<T> (&packs)[kPacks], int64_t col, int64_t step,
                                            int64_t end) {
    constexpr int kVector = kVectorOf<T>;
    A u[kPacks][kVector];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const bool there = kAll || col + i * step < end;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        u[i][j] = there ? widen(packs[i].value[j]) : -A(INFINITY);
      }
      if (kFull && there) unit.apply(u[i]);
      if (kFull && smoothing && there) add_weighted<kVector>(u[i], col + i * step);
      leave_out_label<kVector>(u[i], col + i * step);
    }
    add(u, col, step);
  }

  __device__ __forceinline__ void add_single(A logit, int64_t col) {
    A u[1][1] = {{logit}};
    if (kFull) unit.apply(u[0]);
    if (kFull && smoothing) add_weighted<1>(u[0], col);
    leave_out_label<1>(u[0], col);
    add(u, col, 0);
  }

  __device__ __forceinline__ void read(const Stretch& s, int lane, int team) {
    // The first of the single ones is under way while the packs are added.
    const A early = lane < s.single_columns ? widen(row[s.single(lane)]) : A(0);
    for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      constexpr bool kAll = decltype(all)::value;
      Vector<T> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (kAll || col + i * step < s.end) packs[i] = load_pack(row + col + i * step);
      }
      add_packs<kAll>(packs, col, step, s.end);
    });
    for (int i = lane; i < s.single_columns; i += team) {
      add_single(i == lane ? early : widen(row[s.single(i)]), s.single(i));
    }
  }
};

// Over groups of `lanes` lanes; every lane gets it. All 32 lanes must call it.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> group_merge(RowShare<A> share, Exponential<A> exponential, int lanes) {
  RowSums<A>& sums = share.sums;
  const A largest = group_max(sums.max, lanes);
  rescale(sums, largest, exponential(sums.max - largest));
  sums.max = largest;
  sums.sum = group_sum(sums.sum, lanes);
  if (kFull) {
    sums.ties = group_sum(sums.ties, lanes);
    sums.distance = group_sum(sums.distance, lanes);
    sums.before = group_max(sums.before, lanes);
    share.weighted = group_sum(share.weighted, lanes);
  }
  return share;
}

// Over the block; valid in its first warp. Every thread calls it.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> block_merge(RowShare<A> share, Exponential<A> exponential) {
  __shared__ A warp_max[kMaxWarps], warp_sum[kMaxWarps], warp_distance[kMaxWarps];
  __shared__ A warp_before[kMaxWarps], warp_ties[kMaxWarps];
  __shared__ double warp_weighted[kMaxWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  share = group_merge<kFull>(share, exponential, kWarpSize);
  if (lane == 0) {
    warp_max[warp] = share.sums.max;
    warp_ties[warp] = share.sums.ties;
    warp_sum[warp] = share.sums.sum;
    warp_distance[warp] = share.sums.distance;
    warp_before[warp] = share.sums.before;
    warp_weighted[warp] = share.weighted;
  }
  __syncthreads();
  if (warp > 0) return share;
  RowShare<A> other;
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) {
    other.sums.max = warp_max[lane];
    other.sums.ties = warp_ties[lane];
    other.sums.sum = warp_sum[lane];
    other.sums.distance = warp_distance[lane];
    other.sums.before = warp_before[lane];
    other.weighted = warp_weighted[lane];
  }
  return group_merge<kFull>(other, exponential, kWarpSize);
}

// block: a multiple of q.team; as many blocks as q.parts of all rows need. Writes parts[row][part] of
// rows whose logits are needed, and nothing of others.
template <class T, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_sums_kernel(CrossEntropyParams q,
                              RowSums<double>* parts)  // [rows, q.parts], in u
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  const int64_t label = item.exists ? label_at(q, item.row) : kNotCounted;
  const bool read = label >= 0 || label == kNoLabel;
  if (q.team > kWarpSize && !read) return;  // the whole block
  RowShare<A> share;
  Exponential<A> exponential(scale_of<A>(q));
  if (read) {
    RowReader<T, kFull> reader(q, item.row, label);
    reader.read(stretch_of(q, reader.row, item.part), item.lane, q.team);
    share = reader.share;
  }
  share = q.team > kWarpSize ? block_merge<kFull>(share, exponential)
                             : group_merge<kFull>(share, exponential, q.team);
  if (!read || item.lane != 0) return;
  RowSums<double> out;
  out.max = share.sums.max;
  out.ties = share.sums.ties;
  out.sum = share.sums.sum;
  out.distance = share.sums.distance;
  out.weighted = share.weighted;
  out.before = share.sums.before;
  parts[item.row * q.parts + item.part] = out;
}

}  // namespace masked_loss_ext::cuda
