// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy and its gradient on CUDA in one sweep. A row that counts is read once, into shared
// memory, and its gradient is written once: 2 V s bytes for V logits of size s. Where no shared memory
// holds it (kKept false) it is read again: 3 V s. A row that does not count is zero-filled, V s.
#pragma once

#include "common/cuda/cluster.cuh"
#include "cross_entropy/cuda/gradient.cuh"
#include "cross_entropy/cuda/sums.cuh"

namespace masked_loss_ext::cuda {

constexpr int kMostThreads = 512;  // of a block that fills a multiprocessor: 128 registers a thread

// What the row of a team takes of shared memory: coefficients, single columns, packs.
constexpr int64_t kCoefficientBytes = 64, kSingleBytes = 32;
static_assert(sizeof(RowGradient<double>) <= kCoefficientBytes);
static_assert(2 * (16 - sizeof(c10::Half)) <= kSingleBytes);

__host__ __device__ __forceinline__ int64_t slot_bytes(int64_t packs, bool kept) {
  return kCoefficientBytes + (kept ? kSingleBytes + 16 * packs : 0);
}

// A part of a row, in the shared memory of its team: the coefficients, and what each thread has put here
// itself and finds again. As a reader's Keep and a writer's Source.
template <class T>
struct Slot {
  RowGradient<accumulate_t<T>>* gradient;
  T* singles;
  Vector<T>* packs;
  int64_t begin;  // first column of the packs

  __device__ Slot(const CrossEntropyParams& q, const Stretch& s, bool kept) : begin(s.begin) {
    const int64_t bytes = slot_bytes(q.packs_per_part, kept);
    unsigned char* memory =
        dynamic_shared<unsigned char>() + threadIdx.x / static_cast<unsigned>(q.team) * bytes;
    gradient = reinterpret_cast<RowGradient<accumulate_t<T>>*>(memory);
    singles = reinterpret_cast<T*>(memory + kCoefficientBytes);
    packs = reinterpret_cast<Vector<T>*>(memory + kCoefficientBytes + kSingleBytes);
  }

  __device__ __forceinline__ Vector<T>& place(int64_t col) const {
    return packs[(col - begin) / kVectorOf<T>];
  }
  __device__ __forceinline__ void single(int i, T value) const { singles[i] = value; }
  __device__ __forceinline__ void pack(int64_t col, const Vector<T>& pack) const { place(col) = pack; }
  __device__ __forceinline__ T single(int i, int64_t) const { return singles[i]; }
  __device__ __forceinline__ Vector<T> pack(int64_t col) const { return place(col); }
};

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
    cross_entropy_sweep_kernel(CrossEntropyParams q,
                               double* row_losses,  // [rows], written where the row counts
                               T* grad_logits)      // [rows, V]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  const int64_t row = item.exists ? item.row : 0, place = place_of(q.counted, row);
  const int64_t label = item.exists ? label_at(q, place) : kNotCounted;
  const bool counts = label >= 0, block_per_part = q.team > kWarpSize;
  const T* logits = static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row);
  T* out = grad_logits + offset_at(q.layout, kGrad, row);
  const Stretch s = stretch_of(q, out, item.part);
  const RowMemory<T> memory = {logits, same_boundaries<T>(logits, out)};
  const Slot<T> slot(q, s, kKept);
  if (counts || !block_per_part) {  // the whole block, the whole cluster
    RowShare<A> share;
    const Exponential<A> exponential(counts ? scale_of<A>(q, place) : A(1));
    double label_u = 0;
    if (counts) {
      if (item.lane == 0) label_u = label_unit<A>(q, row, label);
      RowReader<T, kFull> reader(q, label, exponential);
      if constexpr (kKept) {
        reader.read(s, item.lane, q.team, memory, slot);
      } else {
        reader.read(s, item.lane, q.team, memory, KeepNothing{});
      }
      share = reader.share;
    }
    share = team_merge<kFull>(share, exponential, q.team);
    if (q.parts > 1) share = cluster_merge<kFull>(share, exponential);
    if (counts && item.lane == 0) {
      const double scale = scale_of<double>(q, place);
      const RowPart part = part_of(share, scale, 0, label_u);
      const RowResult r = finished<A, DeviceElements>(q, part, scale, place, label);
      const double denominator = *static_cast<const double*>(q.totals.data);
      const double loss_gradient = denominator == 0 ? 0 : 1 / denominator;
      if (item.part == 0) row_losses[row] = r.loss;
      *slot.gradient = row_gradient_of<A>(q, r, place, label, part.weights, loss_gradient);
      if (item.part == 0 && q.grad_token_weight.data != nullptr) {
        put_token_gradient<A>(q, place, loss_gradient *
                                            row_loss(q.options, r, class_weight<A>(q, label),
                                                     q.counted.classes));
      }
    }
    if (block_per_part) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  if (!item.exists) return;
  if (!counts) return fill(s, item.lane, q.team, out, constant_gradient<T>(label));
  const GradientWriter<T, kFull> writer(q, place, *slot.gradient);
  if constexpr (kKept) {
    writer.write(s, item.lane, q.team, slot, out);
  } else {
    writer.write(s, item.lane, q.team, memory, out);
  }
  if (q.parts > 1) Cluster::wait();
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
  const int64_t teams = blockDim.x / static_cast<unsigned>(q.team), items = q.counted.rows * q.parts;
  for (int64_t index = blockIdx.x * teams + threadIdx.x / static_cast<unsigned>(q.team); index < items;
       index += gridDim.x * teams) {
    const RowItem item = item_at(q, index);
    T* out = grad_logits + offset_at(q.layout, kGrad, item.row);
    const Stretch s = stretch_of(q, out, item.part);
    rewrite<4>(s, item.lane, q.team, RowMemory<T>{out, true}, out, [&](auto& values, int64_t) {
      for (T& value : values) value = scaled(value);
    });
  }
}

}  // namespace masked_loss_ext::cuda
