// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA, backward: one read of the rows that count and one write of every row of
// the gradient; the entries that get more are written after, a thread per row.
#pragma once

#include "cross_entropy_terms/cuda/rows.cuh"

namespace masked_loss_ext::cuda {

template <class T>
struct TermWriter {
  using A = accumulate_t<T>;
  static constexpr int kPacks = kPacksAtOnce<T, true>;

  const T* row;  // [V]
  T* out;        // [V]
  TermGradient<A> k;
  Exponential<A> exponential;

  __device__ TermWriter(const CrossEntropyParams& q, T* grad, const RowItem& item,
                        const TermGradient<A>& k)
      : row(row_of<T>(q, item.row)),
        out(grad + offset_at(q.layout, kGrad, item.row)),
        k(k),
        exponential(A(1)) {}

  // A banned class (-inf) has none. The branch is the same for a whole row.
  __device__ __forceinline__ A gradient_of(A logit) const {
    const A below = logit - k.base;
    A gradient = k.mean;
    if (k.both) gradient += k.scaled * exponential(below * k.scale - k.log_sum_scaled);
    const A log_p = (k.both ? below : below * k.scale) - k.log_sum, p = exponential(log_p);
    A share = k.plain;
    if (k.entropy_scale != 0) share -= k.entropy_scale * (max(log_p, A(-1e30f)) + k.entropy);
    gradient += share * p;
    return logit == -A(INFINITY) ? A(0) : gradient;
  }

  // Packs lie on 16-byte boundaries of `out`; those of `row` may differ.
  __device__ __forceinline__ Vector<T> load(int64_t col, bool aligned) const {
    if (aligned) return load_pack(row + col);
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = row[col + j];
    return pack;
  }

  template <bool kAll>
  __device__ __forceinline__ void write_packs(int64_t col, int64_t step, int64_t end, bool aligned) {
    Vector<T> packs[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (kAll || col + i * step < end) packs[i] = load(col + i * step, aligned);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const int64_t first = col + i * step;
      if (!kAll && first >= end) continue;
#pragma unroll
      for (int j = 0; j < kVectorOf<T>; ++j) {
        packs[i].value[j] = static_cast<T>(gradient_of(widen(packs[i].value[j])));
      }
      *reinterpret_cast<Vector<T>*>(out + first) = packs[i];
    }
  }

  __device__ __forceinline__ void write(const Stretch& s, int lane, int team) {
    const bool aligned = elements_off_boundary(row) == elements_off_boundary(out);
    for (int i = lane; i < s.single_columns; i += team) {
      const int64_t col = s.single(i);
      out[col] = static_cast<T>(gradient_of(widen(row[col])));
    }
    for_packs<kPacks, kVectorOf<T>>(s, lane, team, [&](int64_t col, int64_t step, auto all) {
      write_packs<decltype(all)::value>(col, step, s.end, aligned);
    });
  }

  __device__ __forceinline__ void fill(const Stretch& s, int lane, int team, T value) {
    for (int i = lane; i < s.single_columns; i += team) out[s.single(i)] = value;
    Vector<T> pack;
#pragma unroll
    for (int j = 0; j < kVectorOf<T>; ++j) pack.value[j] = value;
    const int64_t step = int64_t(team) * kVectorOf<T>;
    for (int64_t col = s.begin + int64_t(lane) * kVectorOf<T>; col < s.end; col += step) {
      *reinterpret_cast<Vector<T>*>(out + col) = pack;
    }
  }
};

// block: a multiple of q.team; as many blocks as q.parts of all rows need.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_gradient_kernel(CrossEntropyParams q,
                                        const TermGradient<accumulate_t<T>>* gradients,  // [rows]
                                        T* grad_logits)                                  // [rows, V]
{
  using A = accumulate_t<T>;
  const RowItem item = item_of(q);
  if (!item.exists) return;
  TermWriter<T> writer(q, grad_logits, item, gradients[item.row]);
  const Stretch s = stretch_of(q, writer.out, item.part);
  const int64_t label = writer.k.label;
  if (label >= 0) {
    writer.write(s, item.lane, q.team);
  } else {
    const A value = label == kBadLabel ? A(NAN) : A(0);
    writer.fill(s, item.lane, q.team, static_cast<T>(value));
  }
}

}  // namespace masked_loss_ext::cuda
