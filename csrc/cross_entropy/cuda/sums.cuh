// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CUDA, forward: one read of the rows that count. The thread that has the sums of a
// whole row makes what follows from them, in double; where a row was cut into parts, a thread per row does
// it in another kernel. Losses are added in a fixed order (no atomics).
#pragma once

#include "cross_entropy/cuda/totals.cuh"

namespace masked_loss_ext::cuda {

// One thread's share of a row, in u. Sums with class weights have terms of both signs: double additions
// per pack hide behind its loads.
template <class A>
struct RowShare {
  RowSums<A> sums;
  double weighted = 0, weights = 0;
  int64_t argmax = 0;  // see merged_argmax(); with statistics alone
};

// In z, as RowPart is on every device; the columns from class `first` on, `label` s at the label, if that is
// one of them.
template <class A>
__device__ __forceinline__ RowPart part_of(const RowShare<A>& share, double scale, int64_t first,
                                           double label) {
  RowPart part;
  part.label = label;
  part.highest = share.sums.max;
  part.sums.max = scale * share.sums.max;
  part.sums.ties = share.sums.ties;
  part.sums.sum = share.sums.sum;
  part.sums.distance = scale * share.sums.distance;
  part.sums.weighted = scale * share.weighted;
  part.weights = share.weights;
  if (share.argmax < 0 || share.sums.max > -INFINITY) part.argmax = share.argmax + first;
  return part;
}

// Adds packs of one row. kFull: also what statistics and label smoothing need.
template <class T, bool kFull>
struct RowReader {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, kFull>;

  const A* weight;  // [columns] or null
  int64_t own;      // the label's column
  bool statistics, smoothing;
  Unit<A> unit;
  Exponential<A> exponential;
  RowShare<A> share;

  __device__ RowReader(const CrossEntropyParams& q, int64_t label, Exponential<A> exponential)
      : weight(column_weights<A>(q)),
        own(label_column(q.counted, label)),
        statistics(q.statistics),
        smoothing(q.options.label_smoothing > 0 && label >= 0),
        unit(q),
        exponential(exponential) {}

  // The label's column is no part of the sums (see RowSums). Nobody looks at a column at a time: that a pack
  // holds it is found by one comparison.
  template <int kVector>
  __device__ __forceinline__ void leave_out_label(A* u, int64_t col) const {
    const uint64_t offset = static_cast<uint64_t>(own - col);
    if (offset >= kVector) return;
#pragma unroll
    for (int j = 0; j < kVector; ++j) u[j] = j == static_cast<int>(offset) ? -A(INFINITY) : u[j];
  }

  // The first column that f(u) is true of, where there is one.
  template <int kCount, int kVector, class F>
  __device__ __forceinline__ bool find(const A (&u)[kCount][kVector], int64_t col, int64_t step,
                                       int64_t& column, F f) const {
    int at = -1;
#pragma unroll
    for (int i = kCount * kVector - 1; i >= 0; --i) {
      if (f(u[i / kVector][i % kVector])) at = i;
    }
    column = col + at / kVector * step + at % kVector;
    return at >= 0;
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
    share.weights += double(weights);
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
    }
    int64_t column;
    if (largest > sums.max) {
      if (kFull && statistics && share.argmax >= 0 &&
          find(u, col, step, column, [=](A x) { return x == largest; })) {
        share.argmax = column;
      }
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
    if (kFull && statistics && sums.sum != sums.sum &&
        find(u, col, step, column, [](A x) { return x != x; })) {
      share.argmax = min(share.argmax, kNanColumn + column);
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
    // Not in the order of the columns: one of the head stands before equal ones.
    if (kFull && statistics && u[0][0] == share.sums.max) share.argmax = min(share.argmax, col);
    add(u, col, 0);
  }

  // keep(i, single) and keep(column, pack) see what was read.
  template <class Keep>
  __device__ __forceinline__ void read(const Stretch& s, int lane, int team, const RowMemory<T>& memory,
                                       const Keep& keep) {
    // The first of the single ones is under way while the packs are added.
    const T early = lane < s.single_columns ? memory.row[s.single(lane)] : T(0);
    for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      constexpr bool kAll = decltype(all)::value;
      Vector<T> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (kAll || col + i * step < s.end) packs[i] = memory.pack(col + i * step);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (kAll || col + i * step < s.end) keep.pack(col + i * step, packs[i]);
      }
      add_packs<kAll>(packs, col, step, s.end);
    });
    for (int i = lane; i < s.single_columns; i += team) {
      const T value = i == lane ? early : memory.row[s.single(i)];
      keep.single(i, value);
      add_single(widen(value), s.single(i));
    }
  }
};

struct KeepNothing {
  template <class T>
  __device__ __forceinline__ void single(int, T) const {}
  template <class T>
  __device__ __forceinline__ void pack(int64_t, const Vector<T>&) const {}
};

// Over groups of `lanes` lanes; every lane gets it. All 32 lanes must call it.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> group_merge(RowShare<A> share, Exponential<A> exponential, int lanes) {
  RowSums<A>& sums = share.sums;
  const A largest = group_max(sums.max, lanes);
  if (kFull) {
    const bool its = share.argmax < 0 || sums.max == largest;
    share.argmax = group_min(its ? share.argmax : INT64_MAX, lanes);
  }
  rescale(sums, largest, exponential(sums.max - largest));
  sums.max = largest;
  sums.sum = group_sum(sums.sum, lanes);
  if (kFull) {
    sums.ties = group_sum(sums.ties, lanes);
    sums.distance = group_sum(sums.distance, lanes);
    share.weighted = group_sum(share.weighted, lanes);
    share.weights = group_sum(share.weights, lanes);
  }
  return share;
}

// Over the block; valid in its first warp. Every thread calls it.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> block_merge(RowShare<A> share, Exponential<A> exponential) {
  __shared__ __align__(16) unsigned char storage[kMaxWarps * sizeof(RowShare<A>)];
  auto* warps = reinterpret_cast<RowShare<A>*>(storage);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  share = group_merge<kFull>(share, exponential, kWarpSize);
  if (lane == 0) warps[warp] = share;
  __syncthreads();
  if (warp > 0) return share;
  RowShare<A> other;
  if (lane < static_cast<int>(blockDim.x) / kWarpSize) other = warps[lane];
  return group_merge<kFull>(other, exponential, kWarpSize);
}

// Over the team of q.team threads. All threads of the block call it.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> team_merge(const RowShare<A>& share, Exponential<A> exponential,
                                                  int team) {
  return team > kWarpSize ? block_merge<kFull>(share, exponential)
                          : group_merge<kFull>(share, exponential, team);
}

// --- what follows from the sums over a row ------------------------------------------------------------

// All parts are scaled to the largest maximum at once, so that their exponentials do not wait for each
// other.
__device__ __forceinline__ RowPart merge_parts(const RowPart* parts, int64_t count) {
  double largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) largest = max(largest, parts[i].sums.max);
  RowPart total;
  total.sums.max = largest;
  for (int64_t i = 0; i < count; ++i) {
    RowPart part = parts[i];
    raise_max(part.sums, largest);
    merge(total, part);
  }
  return total;
}

// Writes the results of a row of which `part` has all the sums, and returns what it adds to the totals.
template <class A>
__device__ __forceinline__ Totals finish_row(const CrossEntropyParams& q, const RowPart& part, int64_t row,
                                             int64_t label) {
  RowResult r;
  if (label == kBadLabel) r = not_a_number();
  if (label >= 0 || label == kNoLabel) {
    r = finished<A, DeviceElements>(q, part, scale_of<double>(q, row), row, label);
  }
  put_row<A>(q, row, r);
  return totals_of(q, label, r.loss);
}

// The sum of the class weights, by one block, for the backward.
template <class A>
__device__ __forceinline__ void sum_class_weights(const CrossEntropyParams& q) {
  __shared__ double sums[kMaxWarps];
  double mine = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < q.counted.classes; i += blockDim.x) mine += entry<A>(q.weight, i);
  mine = block_sum(mine, sums);
  if (threadIdx.x == 0) static_cast<double*>(q.totals.data)[1] = mine;
}

// --- kernels ------------------------------------------------------------------------------------------

// block: a multiple of q.team. grid: `blocks`, as many as q.parts of all rows need, and one more where
// has_class_weights(). Without `parts` rows, of one part, are finished; else parts[row][part] is written where
// they are read, and nothing else.
template <class T, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_sums_kernel(CrossEntropyParams q, unsigned blocks,
                              RowPart* parts,      // [rows, q.parts]; or null, where rows have one part
                              double* row_losses,  // [rows], or null: then the totals are left
                              Totals* totals)      // [blocks]
{
  using A = accumulate_t<T>;
  if (blockIdx.x == blocks) return sum_class_weights<A>(q);
  const RowItem item = item_of(q);
  const int64_t place = item.exists ? place_of(q.counted, item.row) : -1, label = label_at(q, place);
  const bool read = label >= 0 || label == kNoLabel, block_per_part = q.team > kWarpSize;
  if (q.parts > 1 && !read) return;  // the whole block
  RowShare<A> share;
  const Exponential<A> exponential(read ? scale_of<A>(q, place) : A(1));
  double label_u = 0;
  if (read) {
    if (item.part == 0 && item.lane == 0) label_u = label_unit<A>(q, item.row, label);
    const T* row = static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, item.row);
    RowReader<T, kFull> reader(q, label, exponential);
    reader.read(stretch_of(q, row, item.part), item.lane, q.team, RowMemory<T>{row, true}, KeepNothing{});
    share = reader.share;
  }
  // The same branch for the whole block.
  if (read || !block_per_part) share = team_merge<kFull>(share, exponential, q.team);
  Totals mine = {0, 0, 0};
  if (item.exists && item.lane == 0) {
    const RowPart part = part_of(share, read ? scale_of<double>(q, place) : 1, q.counted.first, label_u);
    if (parts != nullptr) {
      parts[item.row * q.parts + item.part] = part;
    } else {
      mine = finish_row<A>(q, part, place, label);
      if (row_losses != nullptr) row_losses[item.row] = mine.loss;
    }
  }
  if (parts != nullptr || row_losses != nullptr) return;
  leave(q, block_per_part ? mine : block_totals(mine), totals, blocks, Totalled::kAll);
}

// What the rows' pieces came to.
struct Pieces {
  const RowPart* parts;  // [rows, q.parts]

  __device__ __forceinline__ RowPart merged(const CrossEntropyParams& q, int64_t row, int64_t) const {
    return merge_parts(parts + row * q.parts, q.parts);
  }
};

// A thread per row that was cut: parts.merged(q, row, place) is what its parts came to. block: kThreads.
template <class A, class Parts>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_rows_kernel(CrossEntropyParams q, Parts parts,
                              double* row_losses,  // [rows], or null: then the totals are left
                              Totals* totals)      // [blocks]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Totals mine = {0, 0, 0};
  if (row < q.counted.rows) {
    const int64_t place = place_of(q.counted, row), label = label_at(q, place);
    const bool read = label >= 0 || label == kNoLabel;
    mine = finish_row<A>(q, read ? parts.merged(q, row, place) : RowPart{}, place, label);
    if (row_losses != nullptr) row_losses[row] = mine.loss;
  }
  if (row_losses != nullptr) return;
  leave(q, block_totals(mine), totals, gridDim.x, Totalled::kAll);
}

}  // namespace masked_loss_ext::cuda
