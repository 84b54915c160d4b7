// SPDX-License-Identifier: BSD-3-Clause
// cross_entropy_terms on CUDA, forward: one read of the rows that count, by a kernel that walks as
// masked_cross_entropy does. One thread makes the terms of a row of its sums, in double.
#pragma once

#include "cross_entropy/cuda/items.cuh"
#include "cross_entropy_terms/formula.h"

namespace masked_loss_ext::cuda {

struct TermParams : CrossEntropyParams {
  TermRows terms;
};

// Whether the sums at T are taken besides those at 1, or alone. Nobody looks at a temperature on the device.
__host__ __device__ __forceinline__ bool sums_apart(const TermParams& q) {
  return !has_unscaled(q.terms) || q.temperature.data != nullptr;
}

template <class T>
__device__ __forceinline__ const T* row_of(const CrossEntropyParams& q, int64_t row) {
  return static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row);
}

// One row's memory, see cross_entropy_terms/formula.h.
template <class T>
struct DeviceTermAccess {
  using Reader = DeviceElements;
  using A = accumulate_t<T>;
  const T* row;  // [V]
  T* gradient;   // [V], where it is written

  __device__ __forceinline__ double logit(int64_t c) const { return double(widen(row[c])); }
  __device__ __forceinline__ double read(const Array& array, int64_t i) const {
    return array.data != nullptr ? double(static_cast<const A*>(array.data)[i]) : 0.0;
  }
  __device__ __forceinline__ void write(const Array& array, int64_t i, double value) const {
    if (array.data != nullptr) static_cast<A*>(array.data)[i] = A(value);
  }
  __device__ __forceinline__ bool writes(int64_t, int64_t) const { return true; }
  __device__ __forceinline__ void store(int64_t c, double value) const {
    gradient[c] = static_cast<T>(A(value));
  }
};

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
      : row(row_of<T>(q, row_index)),
        label(label),
        exponential(A(1)),
        scaled_exponential(scale_of<A>(q, row_index)) {}

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

  __device__ __forceinline__ TermPart part() const {
    const RowSums<A>& one = share.one;
    return {double(one.max),      double(one.ties),     double(one.sum),
            double(one.distance), double(share.scaled), share.plain};
  }

  __device__ __forceinline__ void set(const TermPart& part) {
    share.one.max = A(part.max);
    share.one.ties = A(part.ties);
    share.one.sum = A(part.sum);
    share.one.distance = A(part.distance);
    share.scaled = A(part.scaled);
    share.plain = part.plain;
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

// The terms of one row from its parts, which are scaled to the largest maximum at once.
template <class T>
__device__ __forceinline__ void finish_terms(const TermParams& q, int64_t row, int64_t label,
                                             const TermPart* parts, int64_t count) {
  const DeviceTermAccess<T> access{row_of<T>(q, row), nullptr};
  if (label < 0) return fill_terms(q.terms, row, label == kBadLabel ? double(NAN) : 0.0, access);
  const double scale = scale_of<double>(q, row), classes = double(q.counted.classes);
  double largest = -INFINITY, plain = 0;
  for (int64_t i = 0; i < count; ++i) largest = max(largest, parts[i].max);
  RowSums<double> one, at_scale;
  for (int64_t i = 0; i < count; ++i) {
    RowSums<double> part;
    part.max = parts[i].max;
    part.ties = parts[i].ties;
    part.sum = parts[i].sum;
    part.distance = parts[i].distance;
    const double below = parts[i].max - largest;
    rescale(part, largest, exp(below));
    one.ties += part.ties;
    one.sum += part.sum;
    one.distance += part.distance;
    at_scale.sum += below < 0 && below > -INFINITY ? parts[i].scaled * exp(below * scale) : parts[i].scaled;
    plain += parts[i].plain;
  }
  one.max = largest;
  at_scale.max = largest * scale;
  const TermSums r = term_sums_of(q.terms, one, at_scale, sums_apart(q), scale, access.logit(label));
  const double below = plain - classes * (r.max == -INFINITY ? 0.0 : r.max);
  put_terms(q.terms, row, label, r, below / classes, scale, access);
}

// block: a multiple of q.team; as many blocks as q.parts of all rows need. Writes parts[row][part] of
// rows that count, and nothing of others; without `parts` each row is one, and is finished.
template <class T, bool kOne, bool kScaled>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_sums_kernel(TermParams q,
                                    TermPart* parts)  // [rows, q.parts] or null
{
  __shared__ TermPart of_warps[kMaxWarps];
  const RowItem item = item_of(q);
  const int64_t label = item.exists ? label_at(q, item.row) : kNotCounted;
  const bool read = label >= 0;
  if (!read && item.exists && item.lane == 0 && parts == nullptr) {
    finish_terms<T>(q, item.row, label, nullptr, 0);
  }
  if (q.team > kWarpSize && !read) return;  // the whole block
  TermReader<T, kOne, kScaled> reader(q, read ? item.row : 0, label);
  if (read) reader.read(stretch_of(q, reader.row, item.part), item.lane, q.team);
  reader.merge(min(q.team, kWarpSize));
  if (q.team > kWarpSize) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    if (lane == 0) of_warps[warp] = reader.part();
    __syncthreads();
    if (warp > 0) return;
    reader.share = {};
    if (lane < static_cast<int>(blockDim.x) / kWarpSize) reader.set(of_warps[lane]);
    reader.merge(kWarpSize);
  }
  if (!read || item.lane != 0) return;
  const TermPart part = reader.part();
  if (parts != nullptr) {
    parts[item.row * q.parts + item.part] = part;
  } else {
    finish_terms<T>(q, item.row, label, &part, 1);
  }
}

// A thread per row. grid: ceil(rows / block); block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_rows_kernel(TermParams q,
                                    const TermPart* parts)  // [rows, q.parts]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  finish_terms<T>(q, row, label_at(q, row), parts + row * q.parts, q.parts);
}

}  // namespace masked_loss_ext::cuda
