// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA, forward: one read of the rows that count, by
// cross_entropy_terms_sums_kernel, which walks as masked_cross_entropy does. A thread per row makes the
// terms of the sums.
#pragma once

#include "cross_entropy/cuda/items.cuh"

namespace masked_loss_ext::cuda {

// One thread's share of a row, then that of a part. s are the logits, m its largest.
template <class A>
struct TermShare {
  RowSums<A> one;    // at temperature 1
  A scaled = 0;      // sum of e^((s - m) / T), but for the label's
  double plain = 0;  // sum of s: one addition per pack of their distances from m, which keep their digits
};

// What a part of a row comes to.
struct TermPart {
  double max, ties, sum, distance, scaled, plain;
};

// kOne: the sums at temperature 1, kScaled: those at T.
template <class T, bool kOne, bool kScaled>
struct TermReader {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, true>;

  const T* row;  // [V]
  int64_t label;
  Exponential<A> exponential, scaled_exponential;
  TermShare<A> share;

  __device__ TermReader(const CrossEntropyParams& q, int64_t row_index, int64_t label)
      : row(static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row_index)),
        label(label),
        exponential(A(1)),
        scaled_exponential(scale_of<A>(q)) {}

  __device__ __forceinline__ void raise_max(A largest) {
    RowSums<A>& one = share.one;
    if (kScaled && one.max != -A(INFINITY)) share.scaled *= scaled_exponential(one.max - largest);
    rescale(one, largest, kOne ? exponential(one.max - largest) : A(0));
    one.max = largest;
  }

  // A pack that holds the label's column gives `plain` by itself, and the label is no part of the rest.
  template <int kVector>
  __device__ __forceinline__ bool leave_out_label(A* s, int64_t col) {
    const uint64_t offset = static_cast<uint64_t>(label - col);
    if (offset >= kVector) return false;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      share.plain += double(s[j]);
      s[j] = j == static_cast<int>(offset) ? -A(INFINITY) : s[j];
    }
    return true;
  }

  // The packs that are not there hold -inf. One rescaling for all of them. plain_of: which of them, `count`
  // in number, are added to `plain`.
  template <int kCount, int kVector>
  __device__ __forceinline__ void add(const A (&s)[kCount][kVector], unsigned plain_of, int count) {
    A largest = share.one.max;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) largest = max(largest, s[i][j]);
    }
    if (largest > share.one.max) raise_max(largest);
    const A base = finite_base(largest);
    A distances = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      A sum = 0, distance = 0, scaled = 0, plain = 0, ties = 0;
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const A below = s[i][j] - base;
        plain += below;
        if (kScaled) scaled += scaled_exponential(below);
        if (!kOne) continue;
        const A e = exponential(below);
        sum += below == 0 ? A(0) : e;
        ties += below == 0 ? A(1) : A(0);
        distance += e * max(below, A(-1e30f));  // e is 0 at -inf
      }
      share.one.ties += ties;
      share.one.sum += sum;
      share.one.distance += distance;
      share.scaled += scaled;
      if (plain_of >> i & 1) distances += plain;
    }
    share.plain += double(distances) + double(count * kVector) * double(base);
  }

  template <bool kAll>
  __device__ __forceinline__ void add_packs(int64_t col, int64_t step, int64_t end) {
    constexpr int kVector = kVectorOf<T>;
    Vector<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (kAll || col + i * step < end) packs[i] = load_pack(row + col + i * step);
    }
    A s[kPacks][kVector];
    unsigned plain_of = 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const bool is_there = kAll || col + i * step < end;
#pragma unroll
      for (int j = 0; j < kVector; ++j) s[i][j] = is_there ? widen(packs[i].value[j]) : -A(INFINITY);
      if (!is_there || leave_out_label<kVector>(s[i], col + i * step)) continue;
      plain_of |= 1u << i;
      ++count;
    }
    add(s, plain_of, count);
  }

  __device__ __forceinline__ void add_single(A logit, int64_t col) {
    A s[1][1] = {{logit}};
    const bool is_label = leave_out_label<1>(s[0], col);
    add(s, is_label ? 0 : 1, is_label ? 0 : 1);
  }

  __device__ __forceinline__ void read(const Stretch& s, int lane, int team) {
    // The first of the single ones is under way while the packs are added.
    const A early = lane < s.single_columns ? widen(row[s.single(lane)]) : A(0);
    for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      add_packs<decltype(all)::value>(col, step, s.end);
    });
    for (int i = lane; i < s.single_columns; i += team) {
      add_single(i == lane ? early : widen(row[s.single(i)]), s.single(i));
    }
  }

  // Over groups of `lanes` lanes; every lane gets it. All 32 lanes must call it.
  __device__ __forceinline__ void merge(int lanes) {
    raise_max(group_max(share.one.max, lanes));
    share.one.ties = group_sum(share.one.ties, lanes);
    share.one.sum = group_sum(share.one.sum, lanes);
    share.one.distance = group_sum(share.one.distance, lanes);
    share.scaled = group_sum(share.scaled, lanes);
    share.plain = group_sum(share.plain, lanes);
  }
};

// block: a multiple of q.team; as many blocks as q.parts of all rows need. Writes parts[row][part] of
// rows that count, and nothing of others.
template <class T, bool kOne, bool kScaled>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_sums_kernel(CrossEntropyParams q,
                                    TermPart* parts)  // [rows, q.parts]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  const int64_t label = item.exists ? label_at(q, item.row) : kNotCounted;
  const bool read = label >= 0;
  if (q.team > kWarpSize && !read) return;  // the whole block
  TermReader<T, kOne, kScaled> reader(q, read ? item.row : 0, label);
  if (read) reader.read(stretch_of(q, reader.row, item.part), item.lane, q.team);
  reader.merge(min(q.team, kWarpSize));
  if (q.team > kWarpSize) {
    __shared__ A warp_max[kMaxWarps], warp_sum[kMaxWarps], warp_distance[kMaxWarps];
    __shared__ A warp_scaled[kMaxWarps], warp_ties[kMaxWarps];
    __shared__ double warp_plain[kMaxWarps];
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (lane == 0) {
      warp_max[warp] = reader.share.one.max;
      warp_ties[warp] = reader.share.one.ties;
      warp_sum[warp] = reader.share.one.sum;
      warp_distance[warp] = reader.share.one.distance;
      warp_scaled[warp] = reader.share.scaled;
      warp_plain[warp] = reader.share.plain;
    }
    __syncthreads();
    if (warp > 0) return;
    reader.share = {};
    if (lane < static_cast<int>(blockDim.x) / kWarpSize) {
      reader.share.one.max = warp_max[lane];
      reader.share.one.ties = warp_ties[lane];
      reader.share.one.sum = warp_sum[lane];
      reader.share.one.distance = warp_distance[lane];
      reader.share.scaled = warp_scaled[lane];
      reader.share.plain = warp_plain[lane];
    }
    reader.merge(kWarpSize);
  }
  if (!read || item.lane != 0) return;
  const TermShare<A>& share = reader.share;
  parts[item.row * q.parts + item.part] = {double(share.one.max),      double(share.one.ties),
                                           double(share.one.sum),      double(share.one.distance),
                                           double(share.scaled),       share.plain};
}

}  // namespace masked_loss_ext::cuda
