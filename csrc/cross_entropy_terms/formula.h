// SPDX-License-Identifier: BSD-3-Clause
// The arithmetic of cross_entropy_terms, shared by CPU and CUDA: what follows from the sums over a row,
// and which classes are n-gram candidates. Row-level numbers are double: there are few of them.
//
// With s the logits, m = max s, y the label, T the temperature, p = softmax(s), pT = softmax(s / T):
//   ln p_j = (s_j - m) - ln sum_c e^(s_c - m)     ln pT_j likewise of s / T
//   scaled_log_prob      L = ln pT_y              log_prob        l = ln p_y
//   scaled_mean_log_prob M = 1/V sum_j ln pT_j    entropy         H = -sum_j p_j ln p_j
//   class_log_prob       l_k = ln p_(c_k)         unlikelihood    U = sum_c -ln(1 - p_c)
//
// Derivative, with g_X the gradient of X, r_c = p_c / (1 - p_c), [j = c] summed over all c alike:
//   d / d s_j = a pT_j + (b - g_H (ln p_j + H)) p_j + g_M / (V T)
//             + g_L / T [j = y] + g_l [j = y] + sum_k g_k [j = c_k] + g_U sum_c r_c [j = c]
//   a = -(g_L + g_M) / T     b = -(g_l + sum_k g_k + g_U sum_c r_c)
// and 0 where s_j is -inf. A ln p_c beyond kLargestLogProb is taken for it, so that -ln(1 - p_c) stays
// finite (at most 24 ln 2); it is constant there, so r_c is 0. A logit of +inf makes all of its row NaN.
#pragma once

#include <math.h>

#include "common/array.h"
#include "cross_entropy/formula.h"

namespace masked_loss_ext {

constexpr double kLargestLogProb = -0x1p-24;

// One entry per row, or absent: the results, and (but for candidates) their gradients.
struct TermArrays {
  Array scaled_log_prob, scaled_mean_log_prob, log_prob, entropy;
  Array class_log_prob;  // [rows, asked]
  Array unlikelihood, candidates;
};

// Everything but the logits, contiguous.
struct TermRows {
  CountedRows counted;
  Array classes;             // [rows, asked] of any integer, negative: not asked for
  int64_t asked = 0;         // classes per row
  const int32_t* context_before = nullptr;  // [rows], or absent
  const int32_t* ngram_after = nullptr;
  TermArrays terms;          // results of the forward, incoming gradients of the backward
  double* sums = nullptr;    // [rows, kTermSums], written by the forward
};

// Whether the forward is asked for terms at temperature 1.
MASKED_LOSS_EXT_INLINE bool has_unscaled(const TermRows& q) { return q.terms.log_prob.data != nullptr; }

// Calls f(class) for the n-gram candidates of a row. Whatever the links hold, it ends (each leads further
// back) and stays inside the sequence. Links of repetition_links() pass over repeats: see there.
template <class Elements, class F>
MASKED_LOSS_EXT_INLINE void for_each_candidate(const TermRows& q, int64_t row, int64_t label,
                                               const F& f) {
  if (q.context_before == nullptr) return;
  const int64_t t = row % q.counted.row_length, first = row - t;
  int64_t after = t;
  for (int64_t u = q.context_before[row]; u >= 0 && u < after; u = q.context_before[first + u]) {
    after = u;
    if (q.ngram_after[first + u] < t) continue;  // the same class comes once more
    const int64_t c = label_of<Elements>(q.counted, first + u);
    if (c >= 0 && c != label) f(c);
  }
}

// The k-th class asked for of a row: negative where none is.
template <class Elements>
MASKED_LOSS_EXT_INLINE int64_t asked_class(const TermRows& q, int64_t row, int64_t k) {
  return Elements::integer(q.classes, row * q.asked + k);
}

// What the forward keeps of a row for the backward. Maximum and logarithms stay apart: their sum would be
// rounded like the logits, and s - lse had no digits left where those are large.
struct TermSums {
  double max = 0, log_sum_scaled = 0, log_sum = 0, entropy = 0;
};
constexpr int64_t kTermSums = 4;

MASKED_LOSS_EXT_INLINE TermSums term_sums_at(const TermRows& q, int64_t row) {
  const double* p = q.sums + row * kTermSums;
  TermSums r;
  r.max = p[0], r.log_sum_scaled = p[1], r.log_sum = p[2], r.entropy = p[3];
  return r;
}

MASKED_LOSS_EXT_INLINE void put_term_sums(const TermRows& q, int64_t row, const TermSums& r) {
  double* p = q.sums + row * kTermSums;
  p[0] = r.max, p[1] = r.log_sum_scaled, p[2] = r.log_sum, p[3] = r.entropy;
}

// From the sums at temperature 1 and at T over all classes but the label, s_y. apart: the latter are not the
// former.
MASKED_LOSS_EXT_INLINE TermSums term_sums_of(const TermRows& q, RowSums<double> one,
                                             RowSums<double> scaled, bool apart, double scale, double s_y) {
  TermSums r;
  with_label(one, s_y);
  r.max = one.max;
  if (has_unscaled(q)) {
    r.log_sum = log_sum_of(one);
    r.entropy = entropy_of(one, r.log_sum);
  }
  if (apart) with_label(scaled, s_y * scale);
  r.log_sum_scaled = apart ? log_sum_of(scaled) : r.log_sum;
  if (r.max == INFINITY) r.log_sum = r.log_sum_scaled = NAN;
  return r;
}

// Nothing but -inf: there is no gradient.
MASKED_LOSS_EXT_INLINE bool all_banned(const TermSums& r) {
  return r.max == -INFINITY && r.log_sum_scaled == -INFINITY;
}

MASKED_LOSS_EXT_INLINE double log_prob_of(const TermSums& r, double s) {
  return (s - r.max) - r.log_sum;
}

MASKED_LOSS_EXT_INLINE double scaled_log_prob_of(const TermSums& r, double s, double scale) {
  return (s - r.max) * scale - r.log_sum_scaled;
}

// -ln(1 - p); NaN stays NaN.
MASKED_LOSS_EXT_INLINE double unlikelihood_of(double log_p) {
  return -::log(-::expm1(log_p > kLargestLogProb ? kLargestLogProb : log_p));
}

// Its derivative in ln p.
MASKED_LOSS_EXT_INLINE double unlikelihood_slope(double log_p) {
  return log_p > kLargestLogProb ? 0.0 : ::exp(log_p) / -::expm1(log_p);
}

// How the two sides reach memory: Access::Reader is the Elements of label_of(); of one row logit(class)
// and store(class, gradient of its logit); read(array, i), 0 where it is absent, and write(array, i, value),
// which then does nothing. writes(class, i): whether this thread stores the i-th of a row's single entries.

// Writes what a row comes to. mean_below: mean of s - m. A class not below V gets NaN.
template <class Access>
MASKED_LOSS_EXT_INLINE void put_terms(const TermRows& q, int64_t row, int64_t label, const TermSums& r,
                                      double mean_below, double scale, const Access& a) {
  const TermArrays& out = q.terms;
  const double s_y = a.logit(label);
  a.write(out.scaled_log_prob, row, scaled_log_prob_of(r, s_y, scale));
  a.write(out.scaled_mean_log_prob, row, mean_below * scale - r.log_sum_scaled);
  a.write(out.log_prob, row, log_prob_of(r, s_y));
  a.write(out.entropy, row, r.entropy);
  for (int64_t k = 0; k < q.asked; ++k) {
    const int64_t c = asked_class<typename Access::Reader>(q, row, k);
    double log_p = 0;
    if (c >= 0) log_p = c < q.counted.classes ? log_prob_of(r, a.logit(c)) : double(NAN);
    a.write(out.class_log_prob, row * q.asked + k, log_p);
  }
  double sum = 0, count = 0;
  for_each_candidate<typename Access::Reader>(q, row, label, [&](int64_t c) {
    sum += unlikelihood_of(log_prob_of(r, a.logit(c)));
    count += 1;
  });
  a.write(out.unlikelihood, row, sum);
  a.write(out.candidates, row, count);
  put_term_sums(q, row, r);
}

// The same value for all terms of a row that does not count.
template <class Access>
MASKED_LOSS_EXT_INLINE void fill_terms(const TermRows& q, int64_t row, double value, const Access& a) {
  const TermArrays& out = q.terms;
  const Array per_row[] = {out.scaled_log_prob, out.scaled_mean_log_prob, out.log_prob,
                           out.entropy,         out.unlikelihood,         out.candidates};
  for (const Array& term : per_row) a.write(term, row, value);
  for (int64_t k = 0; k < q.asked; ++k) a.write(out.class_log_prob, row * q.asked + k, value);
  put_term_sums(q, row, TermSums{});
}

// a, b, g_H, H and g_M / (V T) of the derivative above, and what the label's own cell gets besides.
struct TermCoefficients {
  double scaled = 0, plain = 0, entropy_scale = 0, entropy = 0, mean = 0;
  double label_scaled = 0, label_plain = 0;  // g_L / T, g_l
};

// d / d s at a class with `extra` besides the label's share. Where p is almost 1, p and 1 - p each keep
// their digits.
MASKED_LOSS_EXT_INLINE double cell_gradient(const TermCoefficients& k, const TermSums& r,
                                            double scale, double s, bool is_label, double extra) {
  if (s == -INFINITY) return 0;
  const double own_scaled = is_label ? k.label_scaled : 0.0;
  const double own = (is_label ? k.label_plain : 0.0) + extra;
  double gradient = k.mean;
  if (k.scaled != 0 || own_scaled != 0) {
    const double log_p = scaled_log_prob_of(r, s, scale);
    gradient += (k.scaled + own_scaled) * ::exp(log_p) - own_scaled * ::expm1(log_p);
  }
  if (k.plain != 0 || own != 0 || k.entropy_scale != 0) {
    const double log_p = log_prob_of(r, s), p = ::exp(log_p);
    gradient += (k.plain + own) * p - own * ::expm1(log_p);
    if (k.entropy_scale != 0 && p > 0) gradient -= k.entropy_scale * (log_p + k.entropy) * p;
  }
  return gradient;
}

// A row in the backward, and the gradients of its terms.
struct TermRow {
  int64_t row = 0, label = 0;
  double scale = 1, unlikelihood = 0;  // 1 / T, g_U
  TermSums sums;
  TermCoefficients k;
};

template <class Access>
MASKED_LOSS_EXT_INLINE double candidate_gradient(const TermRow& r, int64_t c, const Access& a) {
  return r.unlikelihood * unlikelihood_slope(log_prob_of(r.sums, a.logit(c)));
}

template <class Access, class F>
MASKED_LOSS_EXT_INLINE void for_each_gradient(const TermRows& q, const TermRow& r, const Access&,
                                              const F& f) {
  if (r.unlikelihood == 0) return;
  for_each_candidate<typename Access::Reader>(q, r.row, r.label, f);
}

// b of the derivative holds the sum over the candidates, so they are visited before the row is written.
template <class Access>
MASKED_LOSS_EXT_INLINE TermRow term_row(const TermRows& q, int64_t row, int64_t label, double scale,
                                        const Access& a) {
  TermRow r;
  r.row = row, r.label = label, r.scale = scale;
  r.sums = term_sums_at(q, row);
  const double scaled = a.read(q.terms.scaled_log_prob, row);
  const double mean = a.read(q.terms.scaled_mean_log_prob, row);
  r.unlikelihood = a.read(q.terms.unlikelihood, row);
  r.k.label_scaled = scaled * scale;
  r.k.label_plain = a.read(q.terms.log_prob, row);
  r.k.scaled = -(scaled + mean) * scale;
  r.k.mean = mean * scale / double(q.counted.classes);
  r.k.entropy_scale = a.read(q.terms.entropy, row);
  r.k.entropy = r.sums.entropy;
  r.k.plain = -r.k.label_plain;
  for (int64_t i = 0; i < q.asked && q.terms.class_log_prob.data != nullptr; ++i) {
    const int64_t c = asked_class<typename Access::Reader>(q, row, i);
    if (c >= 0 && c < q.counted.classes) r.k.plain -= a.read(q.terms.class_log_prob, row * q.asked + i);
  }
  for_each_gradient(q, r, a, [&](int64_t c) { r.k.plain -= candidate_gradient(r, c, a); });
  return r;
}

// The row's coefficients in the type of the loop over its classes. At temperature 1, or where one temperature
// has no gradient, one exponential is enough: without `both` there is one temperature, that of `scale`, and its
// coefficient is `plain`.
template <class A>
struct TermLoop {
  A scaled, plain, entropy_scale, entropy, mean, base, scale, log_sum_scaled, log_sum;
  bool both;
};

template <class A>
MASKED_LOSS_EXT_INLINE TermLoop<A> term_loop(const TermRow& r) {
  double plain = r.k.plain, log_sum = r.sums.log_sum, scale = r.scale;
  const bool both = scale != 1 && r.k.scaled != 0 && (plain != 0 || r.k.entropy_scale != 0);
  if (scale == 1 || (!both && r.k.scaled != 0)) {
    plain = scale == 1 ? plain + r.k.scaled : r.k.scaled;
    log_sum = r.sums.log_sum_scaled;
  } else if (!both) {
    scale = 1;
  }
  return {A(r.k.scaled),   A(plain), A(r.k.entropy_scale),     A(r.k.entropy), A(r.k.mean),
          A(r.sums.max),   A(scale), A(r.sums.log_sum_scaled), A(log_sum),     both};
}

// a pT + (b - g_H (ln p + H)) p + mean, exactly 0 at -inf (a banned class). e(x) is e^x, e.bounded(x) is x but
// not so low that its product with e^x were NaN. both, entropy: k.both, and whether k.entropy_scale is not 0.
template <class A, class E>
MASKED_LOSS_EXT_INLINE A dense_gradient(const TermLoop<A>& k, bool both, bool entropy, A logit, const E& e) {
  const A below = logit - k.base;
  A value = k.mean;
  if (both) value += k.scaled * e(e.bounded(below * k.scale - k.log_sum_scaled));
  const A log_p = e.bounded((both ? below : below * k.scale) - k.log_sum);
  const A share = entropy ? k.plain - k.entropy_scale * (log_p + k.entropy) : k.plain;
  value += share * e(log_p);
  return logit == -A(INFINITY) ? A(0) : value;
}

// Sum of the gradients of a class over the places at which it is asked for.
template <class Access>
MASKED_LOSS_EXT_INLINE double asked_gradient(const TermRows& q, int64_t row, int64_t c, const Access& a) {
  double sum = 0;
  for (int64_t i = 0; i < q.asked && q.terms.class_log_prob.data != nullptr; ++i) {
    if (asked_class<typename Access::Reader>(q, row, i) != c) continue;
    sum += a.read(q.terms.class_log_prob, row * q.asked + i);
  }
  return sum;
}

// The first place at which a class is asked for; q.asked where it is not.
template <class Access>
MASKED_LOSS_EXT_INLINE int64_t first_asked(const TermRows& q, int64_t row, int64_t c, const Access&) {
  int64_t i = 0;
  while (i < q.asked && asked_class<typename Access::Reader>(q, row, i) != c) ++i;
  return i;
}

template <class Access>
MASKED_LOSS_EXT_INLINE void store_cell(const TermRow& r, int64_t c, double extra, const Access& a) {
  a.store(c, cell_gradient(r.k, r.sums, r.scale, a.logit(c), c == r.label, extra));
}

// The entries of a row's gradient that get more than the others, each once and as a whole, so that it is
// rounded once. A class may be the label's, asked for (several times) and a candidate: the first of these
// that it is writes it.
template <class Access>
MASKED_LOSS_EXT_INLINE void store_cells(const TermRows& q, const TermRow& r, const Access& a) {
  if (a.writes(r.label, 0)) store_cell(r, r.label, asked_gradient(q, r.row, r.label, a), a);
  for (int64_t i = 0; i < q.asked; ++i) {
    const int64_t c = asked_class<typename Access::Reader>(q, r.row, i);
    if (c < 0 || c >= q.counted.classes || c == r.label || !a.writes(c, 1 + i)) continue;
    if (first_asked(q, r.row, c, a) < i) continue;
    double extra = asked_gradient(q, r.row, c, a);
    for_each_gradient(q, r, a, [&](int64_t other) {
      if (other == c) extra += candidate_gradient(r, c, a);
    });
    store_cell(r, c, extra, a);
  }
  int64_t i = 1 + q.asked;
  for_each_gradient(q, r, a, [&](int64_t c) {
    if (!a.writes(c, i++) || first_asked(q, r.row, c, a) < q.asked) return;
    store_cell(r, c, candidate_gradient(r, c, a), a);
  });
}

}  // namespace masked_loss_ext
