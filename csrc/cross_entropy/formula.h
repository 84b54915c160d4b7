// SPDX-License-Identifier: BSD-3-Clause
// The arithmetic of masked_cross_entropy, shared by CPU and CUDA: which rows count, and what follows
// from the sums over a row. Row-level numbers are double: there are few of them.
//
// With z = softcap(logits) / T, m = max z, y the label, w class weights, eps label smoothing:
//   lse = m + ln sum_c e^(z_c - m)     ce = lse - z_y     p_c = e^(z_c - lse)     p = p_y
//   H = -sum_c p_c ln p_c              Q = sum_c w_c (lse - z_c)
//   core = (1 - eps) w_y ce + eps / V Q                   F = (1 - p)^gamma
//   row loss = token_weight (core F + z_loss lse^2)
// A logit of +inf makes lse inf and all else of its row NaN, its gradient too.
//
// Derivative, with g the gradient of the row loss times token_weight, g_lse, g_H, g_lp those of the
// statistics lse, H and -ce, W = sum_c w_c, F' = d F / d ce = gamma (1 - p)^(gamma - 1) p:
//   d / d z_c = (P - g_H (z_c - lse + H)) p_c - Y [c = y] - M w_c
//   Y = g (F (1 - eps) w_y + core F') - g_lp
//   M = g F eps / V
//   P = Y + X    X = M W + 2 g z_loss lse + g_lse
// and d / d logits_c = (1 - tanh^2(logits_c / cap)) / T d / d z_c; at a logit of -inf it is 0.
#pragma once

#include <math.h>

#include "common/array.h"
#include "common/layout.h"

namespace masked_loss_ext {

// Which rows count, and their labels. Everything but the logits is contiguous.
struct CountedRows {
  int64_t rows = 0, classes = 0;
  int64_t first = 0, columns = 0;     // the classes of the logits at hand: all, or a shard of the vocabulary
  int64_t row_length = 1, shift = 0;  // row r is at t = r % row_length, its label at r + shift
  int64_t ignore_index = 0;
  Array target, mask, segment_ids;
  Array index;  // [rows] int64: row i of the logits is row index[i] of all else; -1: none, less: a bad one
};

// Where a label stands among the columns at hand: outside of [0, columns) for none.
MASKED_LOSS_EXT_INLINE int64_t label_column(const CountedRows& q, int64_t label) { return label - q.first; }

// Which row of all that is per row the i-th row of the logits is; negative for none. Below -1: there is one
// too many, which must show.
MASKED_LOSS_EXT_INLINE int64_t place_of(const CountedRows& q, int64_t i) {
  return q.index.data == nullptr ? i : static_cast<const int64_t*>(q.index.data)[i];
}

constexpr int64_t kNotCounted = -1;  // what label_of() returns besides labels
constexpr int64_t kBadLabel = -2;    // counts, but is outside [0, V): nothing may be read for it
constexpr int64_t kNoLabel = -3;     // counts, and there are no labels

// Elements::integer(array, i) and Elements::is_on(array, i) read one entry.
template <class Elements>
MASKED_LOSS_EXT_INLINE int64_t label_of(const CountedRows& q, int64_t row) {
  if (row < 0) return row == -1 ? kNotCounted : kBadLabel;
  if (q.shift > 0 && row % q.row_length + q.shift >= q.row_length) return kNotCounted;
  const int64_t at = row + q.shift;
  if (q.mask.data != nullptr && !Elements::is_on(q.mask, at)) return kNotCounted;
  if (q.shift > 0 && q.segment_ids.data != nullptr &&
      Elements::integer(q.segment_ids, at) != Elements::integer(q.segment_ids, row)) {
    return kNotCounted;
  }
  if (q.target.data == nullptr) return kNoLabel;
  const int64_t label = Elements::integer(q.target, at);
  if (label == q.ignore_index) return kNotCounted;
  return label >= 0 && label < q.classes ? label : kBadLabel;
}

struct CrossEntropyOptions {
  double label_smoothing = 0, softcap = 0, z_loss = 0, focal_gamma = 0;
};

enum class RowReduction { kMean, kSum, kNone };

// Sums over a part of a row; parts are merged in order. The label's column is no part of them and comes
// last, in double (with_label): float sums swallow what is below 6e-8 of its e^0, and log p with it. What
// `ties` counts stays apart for the same reason; it may be 0, and the terms then be part of the sum.
template <class A>
struct RowSums {
  A max = -A(INFINITY);  // of z
  A ties = 0;            // terms e^0, of z = max
  A sum = 0;             // of e^(z - max) but for those
  A distance = 0;        // of e^(z - max) (z - max), for the entropy
  A weighted = 0;        // of w z, for label smoothing; the label's too
};

// max is -inf until something larger came: then there is nothing to rescale.
template <class A>
MASKED_LOSS_EXT_INLINE void rescale(RowSums<A>& a, A max, A factor) {
  if (a.max == -A(INFINITY) || a.max == max) return;
  a.sum += a.ties;
  a.ties = 0;
  a.distance = factor * (a.distance + (a.max - max) * a.sum);
  a.sum *= factor;
}

// To a larger max. An exponential is taken only where one is needed: of a short row it is a good part.
MASKED_LOSS_EXT_INLINE void raise_max(RowSums<double>& a, double max) {
  if (a.max != -INFINITY && a.max != max) rescale(a, max, ::exp(a.max - max));
  a.max = max;
}

MASKED_LOSS_EXT_INLINE void merge(RowSums<double>& a, RowSums<double> b) {
  const double max = a.max > b.max ? a.max : b.max;
  raise_max(a, max);
  raise_max(b, max);
  a.ties += b.ties;
  a.sum += b.sum;
  a.distance += b.distance;
  a.weighted += b.weighted;
}

// The first of the largest columns as torch.argmax has it, NaN being the largest: the column of the largest
// number, or kNanColumn + that of the first NaN, so that of equal ones the smaller value is the right one. Of
// nothing but -inf it is 0, which is also what a part without any column may say.
constexpr int64_t kNanColumn = INT64_MIN;

MASKED_LOSS_EXT_INLINE int64_t merged_argmax(double a, int64_t a_column, double b, int64_t b_column) {
  if (a_column < 0 || b_column < 0 || a == b) return a_column < b_column ? a_column : b_column;
  return a > b ? a_column : b_column;
}

MASKED_LOSS_EXT_INLINE int64_t column_of(int64_t argmax) {
  return argmax < 0 ? argmax - kNanColumn : argmax;
}

// What a part of a row comes to, on every device: all that the row's results are made of. Parts merge in
// any cut (pieces of a row, or shards of the vocabulary in rank order, see shards.h): maxima are taken, the rest added
// once it is scaled to the larger one.
struct RowPart {
  RowSums<double> sums;
  double highest = -INFINITY;  // of s, z = s scale, but for the label's; sums.max is its multiple
  double label = 0;            // s at the label, where the part holds it; else 0
  double weights = 0;          // sum of w, for label smoothing
  int64_t argmax = 0;          // class of s but for the label's, see merged_argmax(); with statistics alone
};

MASKED_LOSS_EXT_INLINE void merge(RowPart& a, const RowPart& b) {
  merge(a.sums, b.sums);
  a.argmax = merged_argmax(a.highest, a.argmax, b.highest, b.argmax);
  a.highest = a.highest > b.highest ? a.highest : b.highest;
  a.label += b.label;
  a.weights += b.weights;
}

MASKED_LOSS_EXT_INLINE void with_label(RowSums<double>& sums, double z) {
  RowSums<double> label;
  label.max = z;
  label.ties = z == -INFINITY ? 0 : 1;
  if (z != z) label.sum = NAN;
  merge(sums, label);
}

// ln sum e^(z - max): of a row whose largest class has almost all of it, what is beside it.
MASKED_LOSS_EXT_INLINE double log_sum_of(const RowSums<double>& sums) {
  if (sums.ties == 1) return ::log1p(sums.sum);
  return ::log(sums.ties + sums.sum);
}

MASKED_LOSS_EXT_INLINE double entropy_of(const RowSums<double>& sums, double log_sum) {
  if (!(::fabs(sums.max) < INFINITY)) return NAN;  // no class is left, or one is +inf
  return log_sum - sums.distance / (sums.ties + sums.sum);
}

// What a row comes to; all 0 where it does not count.
struct RowResult {
  double highest = 0, log_sum = 0;  // see RowPart: lse = highest scale + log_sum
  double lse = 0, entropy = 0, log_prob = 0, smooth_distance = 0, loss = 0;
  int64_t argmax = 0;  // with it hit: of a row whose statistics are asked for
  bool hit = false;
};

// (1 - p)^gamma and its derivative in ce; 0 where p is 1, where gamma < 1 would make it infinite.
struct Focal {
  double factor = 1, slope = 0;
};

MASKED_LOSS_EXT_INLINE Focal focal_of(double ce, double gamma) {
  Focal focal;
  if (gamma == 0) return focal;
  const double rest = -::expm1(-ce);
  if (rest <= 0) {
    focal.factor = 0;
    return focal;
  }
  focal.factor = ::pow(rest, gamma);
  focal.slope = gamma * focal.factor / rest * ::exp(-ce);
  return focal;
}

MASKED_LOSS_EXT_INLINE double core_of(const CrossEntropyOptions& o, double ce, double w_y,
                                      double smooth_distance, int64_t classes) {
  double core = (1 - o.label_smoothing) * w_y * ce;
  if (o.label_smoothing > 0) core += o.label_smoothing / double(classes) * smooth_distance;
  return core;
}

// Loss of a row but for its token weight.
MASKED_LOSS_EXT_INLINE double row_loss(const CrossEntropyOptions& o, const RowResult& r, double w_y,
                                       int64_t classes) {
  double loss = core_of(o, -r.log_prob, w_y, r.smooth_distance, classes);
  if (o.focal_gamma != 0) loss *= focal_of(-r.log_prob, o.focal_gamma).factor;
  if (o.z_loss != 0) loss += o.z_loss * r.lse * r.lse;
  return loss;
}

MASKED_LOSS_EXT_INLINE RowResult row_result(RowPart part, double scale, int64_t label) {
  const bool has_label = label >= 0;
  RowResult r;
  RowSums<double>& sums = part.sums;
  const double target = part.label * scale;
  r.highest = part.highest;
  if (has_label) {
    with_label(sums, target);
    r.highest = part.highest > part.label ? part.highest : part.label;
    const int64_t own = part.label != part.label ? kNanColumn + label : label;
    part.argmax = merged_argmax(part.highest, part.argmax, part.label, own);
  }
  r.argmax = column_of(part.argmax);
  r.log_sum = log_sum_of(sums);
  r.lse = sums.max + r.log_sum;
  r.entropy = entropy_of(sums, r.log_sum);
  if (!has_label) return r;
  const bool overflows = sums.max == INFINITY;
  r.log_prob = overflows ? double(NAN) : (target - sums.max) - r.log_sum;
  const double weighted_lse = part.weights != 0 ? part.weights * r.lse : 0;  // lse may be -inf
  r.smooth_distance = overflows ? double(NAN) : weighted_lse - sums.weighted;
  r.hit = r.argmax == label;
  return r;
}

// Incoming gradients of one row; loss holds the token weight and the denominator too.
struct RowGradients {
  double loss = 0, lse = 0, entropy = 0, log_prob = 0;
};

// P, Y, M, W, X - M W, g_H and H of the derivative above.
struct RowCoefficients {
  double probability = 0, target = 0, smoothing = 0, weights = 0, rest = 0;
  double entropy_scale = 0, entropy = 0;
};

// What the forward keeps of a row for the backward, [rows, 2] in the dtype of the loss, so that
// ln p_c = (s_c - highest) scale - log_sum. Their sum would be rounded like the logits, and s - lse has no
// digits left where those are large.
constexpr int64_t kRowSums = 2;

template <class A>
MASKED_LOSS_EXT_INLINE void put_row_sums(A* sums, int64_t row, const RowResult& r) {
  sums[row * kRowSums] = A(r.highest);
  sums[row * kRowSums + 1] = A(r.log_sum);
}

template <class A>
MASKED_LOSS_EXT_INLINE void set_row_sums(RowResult& r, const A* sums, int64_t row, double scale) {
  r.highest = sums[row * kRowSums];
  r.log_sum = sums[row * kRowSums + 1];
  r.lse = r.highest * scale + r.log_sum;
}

// Nothing but -inf: there is no gradient.
MASKED_LOSS_EXT_INLINE bool all_banned(const RowResult& r) {
  return r.highest == -INFINITY && r.log_sum == -INFINITY;
}

MASKED_LOSS_EXT_INLINE RowCoefficients coefficients_of(const CrossEntropyOptions& o,
                                                       const RowResult& r, const RowGradients& g,
                                                       double w_y, double weight_sum,
                                                       int64_t classes) {
  RowCoefficients k;
  k.target = -g.log_prob;
  if (g.loss != 0) {
    const Focal focal = focal_of(-r.log_prob, o.focal_gamma);
    k.target += g.loss * focal.factor * (1 - o.label_smoothing) * w_y;
    if (focal.slope != 0) {
      k.target += g.loss * focal.slope * core_of(o, -r.log_prob, w_y, r.smooth_distance, classes);
    }
    k.smoothing = g.loss * focal.factor * o.label_smoothing / double(classes);
  }
  k.weights = weight_sum;
  k.rest = 2 * g.loss * o.z_loss * r.lse + g.lse;
  k.probability = r.highest == INFINITY ? double(NAN) : k.target + (k.smoothing * weight_sum + k.rest);
  k.entropy_scale = g.entropy;
  k.entropy = r.entropy;
  return k;
}

// d / d z at the label: p - 1 and P - Y each lose no digit, and W p - w_y is 0 where there is one class,
// which M W p - M w_y is not: of a fused multiply-add it leaves the rounding of a product.
MASKED_LOSS_EXT_INLINE double target_gradient(const RowCoefficients& k, double log_prob, double w_y) {
  const double p = ::exp(log_prob);
  double gradient = k.target * ::expm1(log_prob) + k.rest * p + k.smoothing * (k.weights * p - w_y);
  if (k.entropy_scale != 0) gradient -= k.entropy_scale * (log_prob + k.entropy) * p;
  return gradient;
}

// The rows of one call, or of a chunk of it, as the kernels of every device see them. What is absent has no
// data; all but the logits and their gradient is contiguous, and in the dtype A of the loss where no other
// is said.
struct RowProblem {
  CountedRows counted;
  CrossEntropyOptions options;
  RowReduction reduction = RowReduction::kSum;  // kNone: loss and grad_loss are [rows]
  bool statistics = false;                      // entropy, hit and argmax are wanted
  bool temperature_per_row = false;             // else it is one number
  Layout layout;  // where rows of the logits (kPrediction) and of their gradient (kGrad) begin
  Array logits, grad_logits;      // [rows, columns], any floating dtype
  Array weight, token_weight;     // [V]; [rows], any floating dtype
  Array temperature, normalizer;  // [], any dtype; of a temperature per row [rows]
  // What the forward makes and the backward reads: [rows], of loss [rows] or []
  Array loss, lse, entropy, log_prob, smooth_distance;
  Array hit;       // [rows], bool
  Array argmax;    // [rows], int64
  Array totals;    // [2] double: denominator, and the sum of w, or V where nothing needs that
  Array row_sums;  // [rows, kRowSums]
  // Incoming gradients: [rows], of grad_loss [rows] or []
  Array grad_loss, grad_lse, grad_entropy, grad_log_prob;
  Array grad_token_weight;  // [rows]
};

// --- one row of a problem; A: the type of the loss. Elements::number(array, i) reads one entry ----------

// Entry i; 0 where there is nothing.
template <class A>
MASKED_LOSS_EXT_INLINE double entry(const Array& array, int64_t i) {
  return array.data != nullptr ? double(static_cast<const A*>(array.data)[i]) : 0.0;
}

template <class A>
MASKED_LOSS_EXT_INLINE void put(const Array& array, int64_t i, double value) {
  if (array.data != nullptr) static_cast<A*>(array.data)[i] = A(value);
}

template <class A>
MASKED_LOSS_EXT_INLINE double class_weight(const RowProblem& q, int64_t label) {
  return q.weight.data != nullptr && label >= 0 ? entry<A>(q.weight, label) : 1.0;
}

template <class Elements>
MASKED_LOSS_EXT_INLINE double token_weight(const RowProblem& q, int64_t row) {
  return q.token_weight.data != nullptr ? Elements::number(q.token_weight, row + q.counted.shift) : 1.0;
}

// The result of the row of which `part` has all the sums.
template <class A, class Elements>
MASKED_LOSS_EXT_INLINE RowResult finished(const RowProblem& q, const RowPart& part, double scale, int64_t row,
                                          int64_t label) {
  RowResult r = row_result(part, scale, label);
  if (label >= 0) {
    r.loss = token_weight<Elements>(q, row) *
             row_loss(q.options, r, class_weight<A>(q, label), q.counted.classes);
  }
  return r;
}

template <class A>
MASKED_LOSS_EXT_INLINE void put_row(const RowProblem& q, int64_t row, const RowResult& r) {
  if (row < 0) return;
  put_row_sums(static_cast<A*>(q.row_sums.data), row, r);
  put<A>(q.lse, row, r.lse);
  put<A>(q.entropy, row, r.entropy);
  put<A>(q.log_prob, row, r.log_prob);
  put<A>(q.smooth_distance, row, r.smooth_distance);
  put<bool>(q.hit, row, r.hit);
  put<int64_t>(q.argmax, row, double(r.argmax));
  if (q.reduction == RowReduction::kNone) put<A>(q.loss, row, r.loss);
}

// What the forward said of a row.
template <class A>
MASKED_LOSS_EXT_INLINE RowResult saved_row(const RowProblem& q, int64_t row, double scale) {
  RowResult r;
  set_row_sums(r, static_cast<const A*>(q.row_sums.data), row, scale);
  r.entropy = entry<A>(q.entropy, row);
  r.log_prob = entry<A>(q.log_prob, row);
  r.smooth_distance = entry<A>(q.smooth_distance, row);
  return r;
}

// loss_gradient: of the row's loss, but for its token weight. weights: the sum of w.
template <class A, class Elements>
MASKED_LOSS_EXT_INLINE RowCoefficients coefficients_at(const RowProblem& q, const RowResult& r, int64_t row,
                                                       int64_t label, double weights,
                                                       double loss_gradient) {
  RowGradients g;
  g.lse = entry<A>(q.grad_lse, row);
  g.entropy = entry<A>(q.grad_entropy, row);
  if (label >= 0) {
    g.loss = loss_gradient * token_weight<Elements>(q, row);
    g.log_prob = entry<A>(q.grad_log_prob, row);
  }
  return coefficients_of(q.options, r, g, class_weight<A>(q, label), weights, q.counted.classes);
}

// Position row + shift is the only one whose label this row sees; the first `shift` ones of each row length
// are nobody's.
template <class A>
MASKED_LOSS_EXT_INLINE void put_token_gradient(const RowProblem& q, int64_t row, double gradient) {
  if (row < 0) return;
  const int64_t shift = q.counted.shift, at = shift > 0 ? row % q.counted.row_length : 0;
  if (at + shift < q.counted.row_length || shift == 0) put<A>(q.grad_token_weight, row + shift, gradient);
  if (at < shift) put<A>(q.grad_token_weight, row, 0);
}

}  // namespace masked_loss_ext
