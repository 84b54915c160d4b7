// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy and its gradient on CUDA in one sweep. A row that counts is read once, into shared
// memory, and its gradient is written once: 2 V s bytes for V logits of size s. Where no shared memory
// holds it (kKept false) it is read again: 3 V s. A row that does not count is zero-filled, V s.
#pragma once

#include "common/cuda/cluster.cuh"
#include "cross_entropy/cuda/backward.cuh"
#include "cross_entropy/cuda/forward.cuh"
#include "cross_entropy/cuda/rows.cuh"

namespace masked_loss_ext::cuda {

constexpr int kMostThreads = 512;  // of a block that fills a multiprocessor: 128 registers a thread

// What the row of a team takes of shared memory: coefficients, single columns, packs.
constexpr int64_t kCoefficientBytes = 64, kSingleBytes = 32;
static_assert(sizeof(RowGradient<double>) <= kCoefficientBytes);
static_assert(2 * (16 - sizeof(c10::Half)) <= kSingleBytes);

__host__ __device__ __forceinline__ int64_t slot_bytes(int64_t packs, bool kept) {
  return kCoefficientBytes + (kept ? kSingleBytes + 16 * packs : 0);
}

// Each thread finds here what it has put here itself, and the coefficients.
template <class T>
struct Slot {
  RowGradient<accumulate_t<T>>* gradient;
  T* singles;
  Vector<T>* packs;

  __device__ Slot(const CrossEntropyParams& q, bool kept) {
    const int64_t bytes = slot_bytes(q.packs_per_part, kept);
    unsigned char* begin =
        dynamic_shared<unsigned char>() + threadIdx.x / static_cast<unsigned>(q.team) * bytes;
    gradient = reinterpret_cast<RowGradient<accumulate_t<T>>*>(begin);
    singles = reinterpret_cast<T*>(begin + kCoefficientBytes);
    packs = reinterpret_cast<Vector<T>*>(begin + kCoefficientBytes + kSingleBytes);
  }
};

struct SweepInputs {
  const double* denominator;  // []
  const double* weight_sum;   // [], where there are class weights and label smoothing, or null
  double* row_losses;         // [rows], written where the row counts
};

// One thread's share of a row, read and kept, and its gradient, written.
template <class T, bool kFull, bool kKept>
struct RowSweep {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, kFull>, kVector = kVectorOf<T>;

  Stretch s;
  Slot<T> slot;
  int lane, team;
  bool aligned;

  __device__ RowSweep(const CrossEntropyParams& q, const RowItem& item, const T* row, const T* out)
      : s(stretch_of(q, out, item.part)),
        slot(q, kKept),
        lane(item.lane),
        team(q.team),
        aligned(elements_off_boundary(row) == elements_off_boundary(out)) {}

  __device__ __forceinline__ Vector<T>& kept(int64_t col) const {
    return slot.packs[(col - s.begin) / kVector];
  }

  __device__ __forceinline__ void read(RowReader<T, kFull>& reader) {
    for (int i = lane; i < s.single_columns; i += team) {
      const T value = reader.row[s.single(i)];
      if (kKept) slot.singles[i] = value;
      reader.add_single(widen(value), s.single(i));
    }
    for_packs<kPacks, kVector>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      constexpr bool kAll = decltype(all)::value;
      Vector<T> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (kAll || col + i * step < s.end) packs[i] = load(reader.row + col + i * step, aligned);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (kKept && (kAll || col + i * step < s.end)) kept(col + i * step) = packs[i];
      }
      reader.template add_packs<kAll>(packs, col, step, s.end);
    });
  }

  __device__ __forceinline__ void write(const GradientWriter<T, kFull>& writer) {
    for (int i = lane; i < s.single_columns; i += team) {
      const int64_t col = s.single(i);
      T value[1] = {kKept ? slot.singles[i] : writer.row[col]};
      writer.replace(value, col);
      writer.out[col] = value[0];
    }
    for_packs<kPacks, kVector>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      constexpr bool kAll = decltype(all)::value;
      Vector<T> packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t first = col + i * step;
        if (kAll || first < s.end) packs[i] = kKept ? kept(first) : load(writer.row + first, aligned);
      }
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        const int64_t first = col + i * step;
        if (!kAll && first >= s.end) continue;
        writer.replace(packs[i].value, first);
        *reinterpret_cast<Vector<T>*>(writer.out + first) = packs[i];
      }
    });
  }
};

// Of a whole row, by one thread: its loss, and what its gradient is made with. label_u: u at the label.
template <class A>
__device__ __forceinline__ RowGradient<A> finish_row(const CrossEntropyParams& q, const SweepInputs& in,
                                                     const RowShare<A>& share, const RowItem& item,
                                                     int64_t label, double label_u) {
  RowSums<double> sums;
  sums.max = share.sums.max;
  sums.ties = share.sums.ties;
  sums.sum = share.sums.sum;
  sums.distance = share.sums.distance;
  sums.weighted = share.weighted;
  const RowResult r =
      finish_sums(sums, scale_of<double>(q), true, label_u, sum_of_weights(q, in.weight_sum));
  if (item.part == 0) {
    in.row_losses[item.row] =
        token_weight_at(q, item.row) * row_loss(q.options, r, weight_at(q, label), q.rows.classes);
  }
  BackwardInputs<A> none = {};
  none.weight_sum = in.weight_sum;
  const double denominator = *in.denominator;
  return row_gradient_of(q, none, r, item.row, label, denominator == 0 ? 0 : 1 / denominator);
}

// Over the blocks of a cluster, in their order, from the first warp of each; valid in the first warp.
// Every thread calls it, and later Cluster::wait(), before which no block may be gone.
template <bool kFull, class A>
__device__ __forceinline__ RowShare<A> cluster_merge(const RowShare<A>& share,
                                                     Exponential<A> exponential) {
  __shared__ __align__(16) unsigned char storage[sizeof(RowShare<A>)];
  auto* mine = reinterpret_cast<RowShare<A>*>(storage);
  if (threadIdx.x == 0) *mine = share;
  Cluster::arrive();
  Cluster::wait();
  RowShare<A> other;
  if (threadIdx.x < kWarpSize) {
    if (static_cast<int>(threadIdx.x) < Cluster::blocks()) {
      other = *Cluster::of_block(mine, static_cast<int>(threadIdx.x));
    }
    other = group_merge<kFull>(other, exponential, kWarpSize);
  }
  Cluster::arrive();
  return other;
}

// block: a multiple of q.team; as many blocks as q.parts of all rows need, the parts of a row in one
// cluster. Shared memory: a slot for each team. The gradient may lie over the logits: nobody writes before
// the coefficients are there, and by then all of the row and the label's logit have been read.
template <class T, bool kFull, bool kKept>
__global__ void __launch_bounds__(kMostThreads, 1)
    cross_entropy_sweep_kernel(CrossEntropyParams q, SweepInputs in,
                               T* grad_logits)  // [rows, V]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  const int64_t label = item.exists ? label_at(q, item.row) : kNotCounted;
  const bool counts = label >= 0, block_per_part = q.team > kWarpSize;
  const int64_t row = item.exists ? item.row : 0;
  const T* logits = static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row);
  RowSweep<T, kFull, kKept> sweep(q, item, logits, grad_logits + offset_at(q.layout, kGrad, row));
  if (counts || !block_per_part) {  // the whole block, the whole cluster
    RowShare<A> share;
    const Exponential<A> exponential(scale_of<A>(q));
    double label_u = 0;
    if (counts) {
      if (item.lane == 0) label_u = unit_at<A>(q, row, label);
      RowReader<T, kFull> reader(q, row, label);
      sweep.read(reader);
      share = reader.share;
    }
    share = block_per_part ? block_merge<kFull>(share, exponential)
                           : group_merge<kFull>(share, exponential, q.team);
    if (q.parts > 1) share = cluster_merge<kFull>(share, exponential);
    if (counts && item.lane == 0) {
      *sweep.slot.gradient = finish_row(q, in, share, item, label, label_u);
    }
    if (block_per_part) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  if (!item.exists) return;
  RowGradient<A> gradient = {};
  if (counts) gradient = *sweep.slot.gradient;
  GradientWriter<T, kFull> writer(q, grad_logits, item, gradient);
  if (counts) {
    sweep.write(writer);
  } else {
    const A value = label == kBadLabel ? A(NAN) : A(0);
    writer.fill(sweep.s, item.lane, q.team, static_cast<T>(value));
  }
  if (q.parts > 1 && counts) Cluster::wait();
}

// Denominator (out.loss null) or loss. grid: ceil(rows / block), at least 1; block: kThreads.
template <class A>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_totals_kernel(CrossEntropyParams q, RowOutputs<A> out,
                                const double* row_losses,  // [rows] or null
                                Totals* totals)            // [blocks]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  Totals mine = {0, 0, 0};
  if (row < q.rows.rows) {
    const int64_t label = label_at(q, row);
    mine = totals_of(q, label, row_losses != nullptr && label >= 0 ? row_losses[row] : 0);
  }
  leave(out, mine, totals);
}

// grad_logits *= *factor, where that is not 1: nothing is read then. Blocks take part after part, so that
// few have to be launched for nothing. A gradient of 0 stays 0: no factor, be it infinite, reaches a row
// that does not count. block: a multiple of q.team.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_scale_kernel(CrossEntropyParams q, T* grad_logits,
                               const accumulate_t<T>* factor)  // []
{
  using A = accumulate_t<T>;
  const A by = *factor;
  if (by == 1) return;
  const auto scaled = [by](T x) { return widen(x) == 0 ? x : static_cast<T>(widen(x) * by); };
  const int64_t teams = blockDim.x / static_cast<unsigned>(q.team), items = q.rows.rows * q.parts;
  for (int64_t index = blockIdx.x * teams + threadIdx.x / static_cast<unsigned>(q.team); index < items;
       index += gridDim.x * teams) {
    const RowItem item = item_at(q, index);
    T* out = grad_logits + offset_at(q.layout, kGrad, item.row);
    const Stretch s = stretch_of(q, out, item.part);
    for (int i = item.lane; i < s.single_columns; i += q.team) out[s.single(i)] = scaled(out[s.single(i)]);
    for_packs<4, kVectorOf<T>>(s, item.lane, q.team, [&](int64_t col, int64_t step, auto all) {
      constexpr bool kAll = decltype(all)::value;
      Vector<T> packs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kAll || col + i * step < s.end) packs[i] = load_pack(out + col + i * step);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!kAll && col + i * step >= s.end) continue;
        for (T& value : packs[i].value) value = scaled(value);
        *reinterpret_cast<Vector<T>*>(out + col + i * step) = packs[i];
      }
    });
  }
}

}  // namespace masked_loss_ext::cuda
