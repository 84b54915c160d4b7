// SPDX-License-Identifier: BSD-3-Clause
// Every operator of the library, once: what it is called, what it takes, what it returns.
// Kernels register themselves for CPU (cpu/*.cpp) and CUDA (cuda/*.cu); the fake (shape) function and
// the derivative of each op stand in masked_loss_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "common/checks.h"
#include "common/cpu/capability.h"

#ifndef MASKED_LOSS_EXT_VERSION
#error "MASKED_LOSS_EXT_VERSION must be defined by the build (masked_loss_ext/_build.py)"
#endif

// Token-wise weighted squared error, or another loss of p - t, over what `mask` keeps (formulas:
// elementwise/formula.h).
//   prediction, target  [...]         floating, same shape, any strides; dtypes may differ
//   mask                leading dims  any dtype, on where != 0; None keeps everything; a size of 1
//                                     stands for any, as in edit_mask
//   edit_mask           leading dims  m in [0, 1]; the weight is fg * m + bg * (1 - m); None: bg. A bool
//                                     or an integer is 1 where it is not 0
//   weighting           broadcastable to prediction
//   reduction           "mean"        sum / selected elements    -> []
//                       "sum"         sum                        -> []
//                       "batch_mean"  sum / size(0)              -> []
//                       "token_sum"   sum / size(-1)             -> []
//                       "token"       mean over the last dim     -> prediction.shape[:-1]
//                       "none"        per element                -> prediction.shape
//   loss                "mse", "l1", "smooth_l1", "huber" or "pseudo_huber"
//   delta               []            floating, where that loss bends; None: 1. A tensor, as it may change
//                                     from step to step; without a derivative
// Returns the loss (float32; float64 where prediction or target is) and the int64 count of selected
// elements.

// Cross entropy and row statistics of the rows that count (formula: cross_entropy/formula.h).
//   logits        [..., V]  floating; any strides (copied where the last one is not 1)
//   target        [...]     integer; None: statistics alone, loss 0
//   mask          [...]     any dtype, on where != 0; None keeps everything
//   weight        [V]       class weights, in the dtype of the loss
//   token_weight  [...]     floating
//   segment_ids   [...]     integer
//   temperature   []        > 0; a tensor, as it may change from step to step; or [...], one per row of logits
//                           (not per label, where a shift is), looked at where the row counts
//   normalizer    []        number to divide by, for reduction "mean"
//   softcap                 0 for none
//   shift                   position t of the last row dimension is scored against target t + shift
//   reduction               "mean" sum / denominator -> [], "sum" -> [], "none" -> [...]
//   schedule      [4]       float64 on the CPU: label_smoothing, softcap, z_loss, focal_gamma, in the place
//                           of these, where they change from step to step of a compiled graph
// Returns, in float32 (float64 where logits is): the loss; per row log-sum-exp, entropy (with
// `statistics`, else [0]), log-probability of the target and whether that is the argmax (hit, bool, with
// `statistics`; both [0] without a target), argmax (int64, with `statistics`, else [0]), and
// smooth_distance = sum_c w_c * (lse - z_c) (with label_smoothing or a schedule, else [0]), all 0 at rows
// that do not count; and what the backward needs besides: totals [2] (float64), the denominator and the sum
// of the class weights (V where nothing needs that), and row_sums [..., 2] (cross_entropy/formula.h).
#define MASKED_LOSS_EXT_ROW_ARGUMENTS(logits)                                                       \
  logits ", Tensor? target, Tensor? mask=None, Tensor? weight=None, Tensor? token_weight=None, "     \
  "Tensor? segment_ids=None, Tensor? temperature=None, Tensor? normalizer=None, "                    \
  "int ignore_index=-100, float label_smoothing=0.0, float softcap=0.0, float z_loss=0.0, "          \
  "float focal_gamma=0.0, SymInt shift=0, str reduction=\"mean\", bool statistics=False, "           \
  "Tensor? schedule=None"
#define MASKED_LOSS_EXT_ROW_RESULTS                                                                 \
  "(Tensor loss, Tensor lse, Tensor entropy, Tensor log_prob, Tensor hit, Tensor argmax, "           \
  "Tensor smooth_distance, Tensor totals, Tensor row_sums)"
#define MASKED_LOSS_EXT_ROW_GRADIENTS                                                               \
  "Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_log_prob, "               \
  "Tensor row_sums, Tensor entropy, Tensor log_prob, Tensor smooth_distance, Tensor totals"

// masked_cross_entropy of logits = hidden linear_weight^T + bias, which are never made as a whole
// (linear_cross_entropy/call.h).
//   hidden         [..., D]  floating; any strides
//   linear_weight  [V, D]    the classifier's, in the dtype of hidden, as is
//   bias           [V]
//   and what masked_cross_entropy takes of rows: weight are the class weights; the dtype of the loss is
//   float32 (float64 where hidden is)
//   chunk_rows               rows whose logits are made at a time; None: by their size
//   num_valid                at least the number of rows that count, where that is known: on CUDA nothing
//                            waits for it then
//   fp32_logits              logits of half inputs are float32
#define MASKED_LOSS_EXT_LINEAR_ARGUMENTS                                                            \
  MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor hidden, Tensor linear_weight, Tensor? bias")                \
  ", int? chunk_rows=None, SymInt? num_valid=None, bool fp32_logits=False"
#define MASKED_LOSS_EXT_LINEAR_NEEDS                                                                \
  "bool needs_hidden=True, bool needs_linear_weight=True, bool needs_bias=True, "                    \
  "bool needs_token_weight=True"
#define MASKED_LOSS_EXT_LINEAR_GRADIENTS                                                            \
  "Tensor grad_hidden, Tensor grad_linear_weight, Tensor grad_bias, Tensor grad_token_weight"

// masked_cross_entropy of a shard of the vocabulary on each of several ranks (cross_entropy/vocab_parallel.h):
// the logits are columns [vocab_start, vocab_start + their last size) of vocab_size; that may be none. Class
// weights are those of all classes. What a shard's rows come to is one message, which every rank gathers
// from all in the order of their shards, `messages` [ranks, numbers]; the results are those of whole rows.
#define MASKED_LOSS_EXT_SHARD ", SymInt vocab_start=0, SymInt vocab_size=0"

// What language-model losses need of a row, at temperature T and at 1 (formulas: cross_entropy_terms/formula.h).
//   logits, target, mask as above; target may not be None
//   temperature     []
//   classes         [..., K]  integer, classes whose log-probability is asked for; negative: none
//   context_before, ngram_after  [..., S] int32, the links of repetition_links: to the n-gram candidates
//   unscaled        False: the two terms at temperature T alone; the others, but sums, are then [0]
// Returns, in float32 (float64 where logits is) and 0 at rows that do not count: per row the terms at T,
// log-probability and entropy; per class its log-probability; per row unlikelihood and number of the
// candidates ([0] what is not asked for); and sums [..., 4] (float64), what the backward needs.

// Row intervals of packed samples, and the block lists of a FlexAttention BlockMask (block_mask/formula.h).
//   lo, hi           [B, R, Sq]   int32, R <= 8: row q attends to kv in [lo, hi) for any r; in any order,
//                                 overlapping or not; empty where hi <= lo
//   segment_offsets  [N * G + 1]  int64, where each segment of each sample begins; rows beyond the last
//                                 are padding
//   kept             [N, G]       int64, tokens of a segment that are visible (clamped to 0..its length)
//   prefix           [N]          int64, for mode prefix alone
//   mode             full | causal | causal_last (all but the last segment is a prefix) | prefix
//   window_left, window_right     None: unbounded
//   sinks                         first tokens of each sample that the window does not hide
//   dropped          none | self | attend: what queries do that are not visible themselves
// interval_block_lists returns, int32, kv_num_blocks [B, 1, nq], kv_indices [B, 1, nq, nk], the same two
// of full blocks, and the transposes of the four ([0] without `transposes`), as create_block_mask does,
// the entries beyond the counts included. packed_rows returns lo and hi [R, rows], maximal intervals in
// ascending order, then empty ones (0, 0); R is G, or 2 G where a window stands beside a prefix or sinks.
// nested_dropout_plan returns both, from one call: CPU inductor takes them from nothing less opaque.

// What repeats in rows of tokens, and where (repetition/formula.h).
//   tokens      [B, S]   integer, any strides
//   valid       [B, S]   any dtype, on where != 0; what is off is not read, and ends windows and runs
//   ngram_size  n >= 1   length of a window
// repetition_counts returns, int64 [B]: unordered pairs of equal windows, windows, different windows,
// and the longest run of one token. repetition_links returns, int32 [B, S], for t where a window ends:
// the latest u < t where one ends that has the same n - 1 tokens before another last (else -1), and the
// earliest u > t where an equal one ends (else S).
STABLE_TORCH_LIBRARY(masked_loss_ext, m) {
  m.def(
      "masked_squared_error(Tensor prediction, Tensor target, Tensor? mask=None, "
      "Tensor? edit_mask=None, Tensor? weighting=None, float foreground_weight=2.0, "
      "float background_weight=1.0, str reduction=\"mean\", str loss=\"mse\", Tensor? delta=None) -> "
      "(Tensor loss, Tensor count)");
  // Gradients that are not needed come back with no elements. grad_weighting is float32 (float64)
  // and not yet summed over the dimensions along which weighting was broadcast, except that the last
  // one is 1 where weighting's is.
  m.def(
      "_masked_squared_error_backward(Tensor grad_loss, Tensor prediction, Tensor target, "
      "Tensor? mask, Tensor? edit_mask, Tensor? weighting, float foreground_weight, "
      "float background_weight, str reduction, str loss, Tensor? delta, Tensor count, "
      "bool needs_prediction, bool needs_target, bool needs_weighting) -> (Tensor grad_prediction, "
      "Tensor grad_target, Tensor grad_weighting)");
  m.def("masked_cross_entropy(" MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits") ") -> "
        MASKED_LOSS_EXT_ROW_RESULTS);
  // grad_* may be absent; grad_logits is contiguous, with no elements where it is not needed, and so
  // is grad_token_weight (in the dtype of the loss).
  m.def("_masked_cross_entropy_backward(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits") ", bool needs_logits=True, "
        "bool needs_token_weight=True) -> (Tensor grad_logits, Tensor grad_token_weight)");
  // The same, with grad_logits written over the logits. The caller bumps their version.
  m.def("_masked_cross_entropy_backward_(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor(a!) logits") ", bool needs_token_weight=True) -> "
        "Tensor grad_token_weight");
  // Loss and gradient of the logits for an incoming gradient of 1, in one sweep; with a target, for
  // reduction mean or sum; statistics are not made.
  m.def("_masked_cross_entropy_sweep(" MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits") ") -> "
        "(Tensor loss, Tensor grad_logits)");
  // The same, with the gradient written over the logits. The caller bumps their version.
  m.def("_masked_cross_entropy_sweep_(" MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor(a!) logits") ") -> "
        "Tensor loss");
  // grad_logits *= grad_loss [], in the dtype of the loss; where that is 1 nothing is read. A gradient
  // of 0 stays 0.
  m.def("_masked_cross_entropy_scale_gradient_(Tensor(a!) grad_logits, Tensor grad_loss) -> ()");
  m.def("_vocab_parallel_cross_entropy_sums(" MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits")
        MASKED_LOSS_EXT_SHARD ") -> Tensor message");
  m.def("vocab_parallel_cross_entropy(" MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits")
        MASKED_LOSS_EXT_SHARD ", Tensor? messages=None) -> " MASKED_LOSS_EXT_ROW_RESULTS);
  m.def("_vocab_parallel_cross_entropy_backward(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor logits") MASKED_LOSS_EXT_SHARD ", bool needs_logits=True, "
        "bool needs_token_weight=True) -> (Tensor grad_logits, Tensor grad_token_weight)");
  m.def("_vocab_parallel_cross_entropy_backward_(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_ROW_ARGUMENTS("Tensor(a!) logits") MASKED_LOSS_EXT_SHARD
        ", bool needs_token_weight=True) -> Tensor grad_token_weight");
  // The same from hidden states and a shard of the classifier's rows; grad_hidden is the shard's share, to be
  // added up over the ranks.
  m.def("_vocab_parallel_linear_cross_entropy_sums(" MASKED_LOSS_EXT_LINEAR_ARGUMENTS MASKED_LOSS_EXT_SHARD
        ") -> Tensor message");
  m.def("vocab_parallel_linear_cross_entropy(" MASKED_LOSS_EXT_LINEAR_ARGUMENTS MASKED_LOSS_EXT_SHARD
        ", Tensor? messages=None) -> " MASKED_LOSS_EXT_ROW_RESULTS);
  m.def("_vocab_parallel_linear_cross_entropy_backward(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_LINEAR_ARGUMENTS MASKED_LOSS_EXT_SHARD ", " MASKED_LOSS_EXT_LINEAR_NEEDS ") -> ("
        MASKED_LOSS_EXT_LINEAR_GRADIENTS ")");
  m.def("linear_cross_entropy(" MASKED_LOSS_EXT_LINEAR_ARGUMENTS ") -> " MASKED_LOSS_EXT_ROW_RESULTS);
  // Gradients that are not needed come back with no elements.
  m.def("_linear_cross_entropy_backward(" MASKED_LOSS_EXT_ROW_GRADIENTS ", "
        MASKED_LOSS_EXT_LINEAR_ARGUMENTS ", " MASKED_LOSS_EXT_LINEAR_NEEDS ") -> ("
        MASKED_LOSS_EXT_LINEAR_GRADIENTS ")");
  // Loss and gradients for an incoming gradient of 1; with a target, for reduction mean or sum.
  m.def("_linear_cross_entropy_sweep(" MASKED_LOSS_EXT_LINEAR_ARGUMENTS ", " MASKED_LOSS_EXT_LINEAR_NEEDS
        ") -> (Tensor loss, " MASKED_LOSS_EXT_LINEAR_GRADIENTS ")");
  m.def(
      "cross_entropy_terms(Tensor logits, Tensor target, Tensor? mask=None, "
      "Tensor? temperature=None, Tensor? classes=None, Tensor? context_before=None, "
      "Tensor? ngram_after=None, int ignore_index=-100, bool unscaled=True) -> "
      "(Tensor scaled_log_prob, Tensor scaled_mean_log_prob, Tensor log_prob, Tensor entropy, "
      "Tensor class_log_prob, Tensor unlikelihood, Tensor candidates, Tensor sums)");
  // The contiguous gradient of the logits; grad_* may be absent.
  m.def(
      "_cross_entropy_terms_backward(Tensor? grad_scaled_log_prob, "
      "Tensor? grad_scaled_mean_log_prob, Tensor? grad_log_prob, Tensor? grad_entropy, "
      "Tensor? grad_class_log_prob, Tensor? grad_unlikelihood, Tensor logits, Tensor target, "
      "Tensor? mask, Tensor? temperature, Tensor? classes, Tensor? context_before, "
      "Tensor? ngram_after, Tensor sums, int ignore_index) -> Tensor grad_logits");
  m.def(
      "interval_block_lists(Tensor lo, Tensor hi, SymInt kv_len, SymInt q_block=128, "
      "SymInt kv_block=128, bool transposes=True) -> (Tensor kv_num_blocks, Tensor kv_indices, "
      "Tensor full_kv_num_blocks, Tensor full_kv_indices, Tensor q_num_blocks, Tensor q_indices, "
      "Tensor full_q_num_blocks, Tensor full_q_indices)");
  m.def(
      "packed_rows(Tensor segment_offsets, Tensor kept, SymInt rows, str mode=\"full\", "
      "int? window_left=None, int? window_right=None, Tensor? prefix=None, int sinks=0, "
      "str dropped=\"none\") -> (Tensor lo, Tensor hi)");
  m.def(
      "nested_dropout_plan(Tensor segment_offsets, Tensor kept, SymInt rows, str mode=\"full\", "
      "int? window_left=None, int? window_right=None, Tensor? prefix=None, int sinks=0, "
      "str dropped=\"none\", SymInt q_block=128, SymInt kv_block=128) -> (Tensor lo, Tensor hi, "
      "Tensor kv_num_blocks, Tensor kv_indices, Tensor full_kv_num_blocks, Tensor full_kv_indices, "
      "Tensor q_num_blocks, Tensor q_indices, Tensor full_q_num_blocks, Tensor full_q_indices)");
  m.def(
      "repetition_counts(Tensor tokens, Tensor? valid=None, int ngram_size=4) -> (Tensor pairs, "
      "Tensor windows, Tensor distinct, Tensor longest_run)");
  m.def(
      "repetition_links(Tensor tokens, Tensor? valid=None, int ngram_size=4) -> "
      "(Tensor context_before, Tensor ngram_after)");
  // A copy. To torch.compile, which may make a copy of its own again in the backward pass, when what
  // it was made from has changed, the result of an operator it does not know.
  m.def("_snapshot(Tensor tensor) -> Tensor");
  m.def("_version() -> str");
  m.def("cpu_capability() -> str");
  m.def("_half_products() -> str");  // "bfloat16 float16": which this processor multiplies as they are
}

static std::string version() { return MASKED_LOSS_EXT_VERSION; }
static torch::stable::Tensor snapshot(const torch::stable::Tensor& tensor) {
  masked_loss_ext::type_of("_snapshot", "tensor", tensor);  // refuses what cannot be copied
  return torch::stable::clone(tensor);
}
static std::string cpu_capability() {
  return masked_loss_ext::level_name(masked_loss_ext::cpu_level());
}
static std::string half_products() {
  const masked_loss_ext::HalfProducts known = masked_loss_ext::half_products();
  return std::string(known.bfloat16 ? "bfloat16" : "") + (known.bfloat16 && known.float16 ? " " : "") +
         (known.float16 ? "float16" : "");
}

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CompositeExplicitAutograd, m) {
  m.impl("_snapshot", TORCH_BOX(&snapshot));
  m.impl("_version", TORCH_BOX(&version));
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
  m.impl("_half_products", TORCH_BOX(&half_products));
}
