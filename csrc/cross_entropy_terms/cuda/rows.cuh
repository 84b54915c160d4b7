// SPDX-License-Identifier: BSD-3-Clause
// What cross_entropy_terms on CUDA does a thread per row, in double: the terms from the sums; in the
// backward the coefficients of a row before it is written, and its single entries after.
#pragma once

#include "cross_entropy_terms/formula.h"
#include "cross_entropy_terms/cuda/forward.cuh"

namespace masked_loss_ext::cuda {

struct TermParams {
  TermRows rows;
  TermArrays terms;  // results, or their gradients
  double* sums;      // [rows, kTermSums]
  bool unscaled;     // the terms at temperature 1 are asked for
};

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
  __device__ __forceinline__ void store(int64_t c, double value) const {
    gradient[c] = static_cast<T>(A(value));
  }
};

template <class T>
__device__ __forceinline__ const T* row_of(const CrossEntropyParams& q, int64_t row) {
  return static_cast<const T*>(q.logits.data) + offset_at(q.layout, kPrediction, row);
}

// Of one row. All parts are scaled to the largest maximum at once; then comes the label, s_y. Returns the
// sum of s - max.
__device__ __forceinline__ double merge_term_parts(const TermPart* parts, int64_t count, double scale,
                                                   double classes, double s_y, const TermParams& p,
                                                   bool scaled, TermSums& r) {
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
  with_label(one, s_y);
  with_label(at_scale, s_y * scale);
  r.max = one.max;
  if (p.unscaled) {
    r.log_sum = log_sum_of(one);
    r.entropy = entropy_of(one, r.log_sum);
  }
  r.log_sum_scaled = scaled ? log_sum_of(at_scale) : r.log_sum;
  if (r.max == INFINITY) r.log_sum = r.log_sum_scaled = NAN;
  return plain - classes * (r.max == -INFINITY ? 0.0 : r.max);
}

// grid: ceil(rows / block); block: kThreads. scaled: the parts hold sums at T apart from those at 1.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_rows_kernel(CrossEntropyParams q, TermParams p,
                                    const TermPart* parts,  // [rows, q.parts]
                                    bool scaled) {
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t label = label_at(q, row);
  const DeviceTermAccess<T> access{row_of<T>(q, row), nullptr};
  TermSums r;
  if (label >= 0) {
    const double scale = scale_of<double>(q), classes = double(q.counted.classes);
    const double below = merge_term_parts(parts + row * q.parts, q.parts, scale, classes,
                                          access.logit(label), p, scaled, r);
    put_terms(p.rows, p.terms, row, label, r, below / classes, scale, access);
  } else {
    fill_terms(p.rows, p.terms, row, label == kBadLabel ? double(NAN) : 0.0, access);
  }
  put_term_sums(p.sums, row, r);
}

// Coefficients of a row in the type of the loop; see TermLoop of the CPU. both: two exponentials.
template <class A>
struct TermGradient {
  A scaled, plain, entropy_scale, entropy, mean, base, scale, log_sum_scaled, log_sum;
  int64_t label;
  bool both;
};

template <class A>
__device__ __forceinline__ TermGradient<A> gradient_of(const TermRow& r) {
  double scaled = r.k.scaled, plain = r.k.plain, log_sum = r.sums.log_sum, scale = r.scale;
  const bool entropy = r.k.entropy_scale != 0;
  const bool both = scale != 1 && scaled != 0 && (plain != 0 || entropy);
  if (scale == 1) {
    plain += scaled;
    log_sum = r.sums.log_sum_scaled;
  } else if (!both && scaled != 0) {
    plain = scaled;
    log_sum = r.sums.log_sum_scaled;
  } else if (!both) {
    scale = 1;
  }
  return {A(scaled),     A(plain), A(r.k.entropy_scale),     A(r.k.entropy), A(r.k.mean),
          A(r.sums.max), A(scale), A(r.sums.log_sum_scaled), A(log_sum),     r.label,
          both};
}

__device__ __forceinline__ TermRow term_row(const CrossEntropyParams& q, const TermParams& p,
                                            int64_t row, int64_t label) {
  TermRow r;
  r.row = row;
  r.label = label;
  r.scale = scale_of<double>(q);
  r.sums = term_sums_at(p.sums, row);
  return r;
}

// grid: ceil(rows / block); block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_coefficients_kernel(CrossEntropyParams q, TermParams p,
                                            TermGradient<accumulate_t<T>>* gradients)  // [rows]
{
  using A = accumulate_t<T>;
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t label = label_at(q, row);
  TermGradient<A> gradient = {};
  gradient.label = label;
  if (label >= 0) {
    TermRow r = term_row(q, p, row, label);
    const DeviceTermAccess<T> access{row_of<T>(q, row), nullptr};
    set_coefficients(p.rows, p.terms, r, access);
    gradient = gradient_of<A>(r);
    // Nothing but -inf: there is no gradient.
    if (all_banned(r.sums)) gradient.label = kNotCounted;
  }
  gradients[row] = gradient;
}

// After the rows are written. grid: ceil(rows / block); block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtLeast)
    cross_entropy_terms_cells_kernel(CrossEntropyParams q, TermParams p,
                                     T* grad_logits)  // [rows, V]
{
  const int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= q.counted.rows) return;
  const int64_t label = label_at(q, row);
  if (label < 0) return;
  TermRow r = term_row(q, p, row, label);
  if (all_banned(r.sums)) return;
  const DeviceTermAccess<T> access{row_of<T>(q, row), grad_logits + offset_at(q.layout, kGrad, row)};
  set_coefficients(p.rows, p.terms, r, access);
  store_cells(p.rows, p.terms, r, access);
}

}  // namespace masked_loss_ext::cuda
