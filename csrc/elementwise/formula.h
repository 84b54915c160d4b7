// SPDX-License-Identifier: BSD-3-Clause
// The arithmetic of masked_squared_error, shared by CPU and CUDA: the losses of one element, its weights,
// and what a kernel is handed.
//
//   term_i = a_i * w_i * omega_i * loss(p_i - t_i)      w_i = fg * m_i + bg * (1 - m_i)
//   S = sum_i term_i, n = #{i : a_i on};  mean = S / n, sum = S, batch_mean = S / size(0),
//   token_sum = S / size(-1), token = (sum over the last dimension) / size(-1), none = term_i
//
//   d term / d p = w * omega * slope(p - t);   d term / d t = its negative
//   d term / d omega = w * loss(p - t)
//
// a_i selects: where it is off nothing that depends on p, t, m or omega is kept, so that a NaN stored
// there goes nowhere. Callers read each selected element of p and t once (forward) and once more
// (backward); the backward writes every element of the gradient once.
#pragma once

#include <math.h>

#include "common/array.h"
#include "common/layout.h"

#if defined(__CUDACC__)
#define MASKED_LOSS_EXT_KERNEL_INLINE static __device__ __forceinline__
#else
#define MASKED_LOSS_EXT_KERNEL_INLINE MASKED_LOSS_EXT_INLINE
#endif

namespace masked_loss_ext {

MASKED_LOSS_EXT_INLINE float absolute(float x) { return ::fabsf(x); }
MASKED_LOSS_EXT_INLINE double absolute(double x) { return ::fabs(x); }
MASKED_LOSS_EXT_INLINE float square_root(float x) { return ::sqrtf(x); }
MASKED_LOSS_EXT_INLINE double square_root(double x) { return ::sqrt(x); }

// 0 and NaN are their own signs.
template <class A>
MASKED_LOSS_EXT_INLINE A sign(A x) {
  return x > 0 ? A(1) : x < 0 ? A(-1) : x;
}

// A loss of one element: its value and slope at d = p - t. A NaN in d is one in both.

struct Mse {
  template <class A>
  MASKED_LOSS_EXT_INLINE A value(A d, A) { return d * d; }
  template <class A>
  MASKED_LOSS_EXT_INLINE A slope(A d, A) { return A(2) * d; }
};

struct L1 {
  template <class A>
  MASKED_LOSS_EXT_INLINE A value(A d, A) { return absolute(d); }
  template <class A>
  MASKED_LOSS_EXT_INLINE A slope(A d, A) { return sign(d); }
};

// d^2 / (2 delta) below delta, which PyTorch calls beta, |d| - delta / 2 above; delta may be 0.
struct SmoothL1 {
  template <class A>
  MASKED_LOSS_EXT_INLINE A value(A d, A delta) {
    const A size = absolute(d);
    return size < delta ? A(0.5) * d * d / delta : size - A(0.5) * delta;
  }
  template <class A>
  MASKED_LOSS_EXT_INLINE A slope(A d, A delta) { return absolute(d) < delta ? d / delta : sign(d); }
};

// d^2 / 2 below delta, delta (|d| - delta / 2) above.
struct Huber {
  template <class A>
  MASKED_LOSS_EXT_INLINE A value(A d, A delta) {
    const A size = absolute(d), quadratic = size < delta ? size : delta;
    return quadratic * (size - A(0.5) * quadratic);
  }
  template <class A>
  MASKED_LOSS_EXT_INLINE A slope(A d, A delta) { return d > delta ? delta : d < -delta ? -delta : d; }
};

// delta^2 (sqrt(1 + (d / delta)^2) - 1), without the difference of two numbers that are nearly equal.
struct PseudoHuber {
  template <class A>
  MASKED_LOSS_EXT_INLINE A value(A d, A delta) {
    const A x = d / delta;
    return d * d / (A(1) + square_root(A(1) + x * x));
  }
  template <class A>
  MASKED_LOSS_EXT_INLINE A slope(A d, A delta) {
    const A x = d / delta;
    return d / square_root(A(1) + x * x);
  }
};

enum class ElementLoss : uint8_t { kMse, kL1, kSmoothL1, kHuber, kPseudoHuber };

// In the order of ElementLoss; PyTorch's names where it has the loss.
constexpr const char* kElementLossNames[] = {"mse", "l1", "smooth_l1", "huber", "pseudo_huber"};

template <class F>
MASKED_LOSS_EXT_KERNEL_INLINE auto with_loss(ElementLoss loss, F f) {
  switch (loss) {
    case ElementLoss::kL1: return f(L1{});
    case ElementLoss::kSmoothL1: return f(SmoothL1{});
    case ElementLoss::kHuber: return f(Huber{});
    case ElementLoss::kPseudoHuber: return f(PseudoHuber{});
    default: return f(Mse{});
  }
}

// What a kernel works on, on either device.
struct ErrorProblem {
  Layout layout;
  Array prediction, target, mask, edit_mask, weighting;
  ElementLoss element_loss = ElementLoss::kMse;
  Array delta;  // [], absent: 1
  double foreground = 1, background = 1;
  double denominator = 1;        // of the loss, but for divide_by_count
  bool divide_by_count = false;  // by the number of selected elements
  bool one_loss = true;          // the reduction leaves one number
  Array loss;                    // one per row or element. forward: output; backward: its gradient
  Array grad_prediction, grad_target, grad_weighting;
};

MASKED_LOSS_EXT_INLINE bool varies(const ErrorProblem& q, const Array& array, Operand operand) {
  return array.data != nullptr && q.layout.col_stride[operand] != 0;
}

// m is the edit mask's value; 1 = foreground.
template <class A>
MASKED_LOSS_EXT_INLINE A edit_weight(const ErrorProblem& q, A m) {
  return A(q.foreground) * m + A(q.background) * (A(1) - m);
}

// Which factors of a term go into a weight.
struct Factors {
  bool weighting, loss;
};

// Product of the factors that a row shares, or of those of its column `col` that it does not.
// Read::number<A> and Read::is_on read an entry of an array.
template <class A, class Read>
MASKED_LOSS_EXT_KERNEL_INLINE A factor_of(const ErrorProblem& q, const int64_t* offset, Factors use,
                                          bool shared, int64_t col = 0) {
  const auto place = [&](Operand o) { return offset[o] + col * q.layout.col_stride[o]; };
  A factor = shared && q.edit_mask.data == nullptr ? A(q.background) : A(1);
  if (q.edit_mask.data != nullptr && varies(q, q.edit_mask, kEditMask) != shared) {
    // An integer is on where it is not 0, as in any mask: 255 is 1.
    const A m = is_integer(q.edit_mask.kind)
                    ? A(Read::is_on(q.edit_mask, place(kEditMask)))
                    : Read::template number<A>(q.edit_mask, place(kEditMask));
    factor = edit_weight(q, m);
  }
  if (use.weighting && q.weighting.data != nullptr && varies(q, q.weighting, kWeighting) != shared) {
    factor *= Read::template number<A>(q.weighting, place(kWeighting));
  }
  if (use.loss && q.loss.data != nullptr && varies(q, q.loss, kLoss) != shared) {
    factor *= Read::template number<A>(q.loss, place(kLoss));
  }
  return factor;
}

}  // namespace masked_loss_ext
