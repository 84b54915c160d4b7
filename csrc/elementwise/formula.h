// SPDX-License-Identifier: BSD-3-Clause
// The arithmetic of masked_squared_error, shared by CPU and CUDA, one element at a time.
//
//   term_i = a_i * w_i * omega_i * (p_i - t_i)^2        w_i = fg * m_i + bg * (1 - m_i)
//   S = sum_i term_i, n = #{i : a_i on};  mean = S / n, sum = S, batch_mean = S / size(0),
//   token_sum = S / size(-1), token = (sum over the last dimension) / size(-1), none = term_i
//
//   d term / d p = 2 * w * omega * (p - t);   d term / d t = its negative
//   d term / d omega = w * (p - t)^2
//
// a_i selects: where it is off nothing is computed from p, t, m or omega, so that a NaN stored there
// goes nowhere. Callers read each selected element of p and t once (forward) and once more (backward);
// the backward writes every element of the gradient once.
#pragma once

#include "common/array.h"

namespace masked_loss_ext {

// m is the edit mask's value; 1 = foreground. An integer mask has 1 wherever it is not 0.
template <class A>
MASKED_LOSS_EXT_INLINE A edit_weight(A m, A foreground, A background) {
  return foreground * m + background * (A(1) - m);
}

template <class A>
MASKED_LOSS_EXT_INLINE A squared_difference(A p, A t) {
  const A d = p - t;
  return d * d;
}

// weight = w * omega; scale = d loss / d term.
template <class A>
MASKED_LOSS_EXT_INLINE A gradient_factor(A weight, A scale) {
  return A(2) * weight * scale;
}

template <class A>
MASKED_LOSS_EXT_INLINE A prediction_gradient(A p, A t, A factor) {
  return factor * (p - t);
}

}  // namespace masked_loss_ext
