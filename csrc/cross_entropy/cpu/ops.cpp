// SPDX-License-Identifier: BSD-3-Clause
// masked_cross_entropy on CPU: the passes over rows, cut into chunks for the threads, the final sums, and
// the errors that no kernel can raise.
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu/capability.h"
#include "common/cpu/device.h"
#include "common/cpu/memory.h"
#include "common/cpu/parallel.h"
#include "cross_entropy/cpu/rows.h"
#include "cross_entropy/vocab_parallel.h"

namespace masked_loss_ext {
namespace {

// A gradient of as many rows is cut by rows alone, so that chunks lie one after another in the output.
constexpr int64_t kManyRows = 64;

const CrossEntropyKernels& kernels() {
  return kernels_of_this_machine<CrossEntropyKernels>();
}

CrossEntropyProblem pass_over(const RowProblem& rows, double scale) {
  CrossEntropyProblem q;
  static_cast<RowProblem&>(q) = rows;
  q.scale = scale;
  return q;
}

bool in_place(const RowProblem& q) { return q.grad_logits.data == q.logits.data; }

int64_t bytes_of(const RowProblem& q, int64_t logits) { return logits * size_of(q.grad_logits.kind); }

void prepare_gradient(CrossEntropyProblem& q, double grad_scale) {
  q.grad_scale = grad_scale;
  q.weight_sum = q.totals.data != nullptr ? static_cast<const double*>(q.totals.data)[1] : 0;
  if (q.grad_logits.data == nullptr || in_place(q)) return;
  const int64_t bytes = bytes_of(q, q.counted.rows * q.counted.columns);
  advise_huge_pages(q.grad_logits.data, bytes);
  q.zero_logits = untouched_pages(q.grad_logits.data, bytes);
}

void add(RowTotals& all, const RowTotals& more) {
  all.loss += more.loss;
  all.denominator += more.denominator;
  if (all.bad_row < 0) all.bad_row = more.bad_row;
  if (all.bad_temperature < 0) all.bad_temperature = more.bad_temperature;
}

// Added in order, `per_group` neighbours first.
RowTotals sum_of(const std::vector<RowTotals>& totals, int64_t per_group) {
  RowTotals all;
  const int64_t count = static_cast<int64_t>(totals.size());
  for (int64_t first = 0; first < count; first += per_group) {
    RowTotals group;
    for (int64_t i = first; i < first + per_group && i < count; ++i) add(group, totals[i]);
    add(all, group);
  }
  return all;
}

int64_t finish_groups(int64_t rows) { return (rows + kRowsPerFinish - 1) / kRowsPerFinish; }

template <class F>
void for_each_row_of(int64_t group, int64_t rows, const F& f) {
  const int64_t last = std::min(rows, (group + 1) * kRowsPerFinish);
  for (int64_t row = group * kRowsPerFinish; row < last; ++row) f(row);
}

RowTotals run_forward(CrossEntropyProblem q) {
  q.chunks = cut(q.counted, false);
  const bool is_cut = q.chunks.pieces > 1;
  const int64_t groups = finish_groups(q.counted.rows);
  std::vector<RowPart> parts(is_cut ? q.chunks.count : 0);
  std::vector<RowTotals> totals(is_cut ? groups : q.chunks.count);
  q.parts = is_cut ? parts.data() : nullptr;
  q.chunk_totals = totals.data();
  // Last chunk first: what the model wrote last is still in the cache, and what is read last here is
  // what the backward, which goes upwards, reads first.
  for_each_chunk(q.chunks.count, [&](int64_t i) { kernels().forward(q, q.chunks.count - 1 - i); });
  if (is_cut) for_each_chunk(groups, [&](int64_t group) { kernels().finish(q, group); });
  return sum_of(totals, 1);
}

// Chunks that lie one after another in a fresh gradient, where it is not written over the logits.
template <class F>
void for_each_gradient_chunk(const CrossEntropyProblem& q, int64_t count, int64_t logits, const F& f) {
  if (q.grad_logits.data == nullptr || in_place(q)) return for_each_chunk(count, f);
  for_each_chunk_of_output(count, q.grad_logits.data, bytes_of(q, logits), f);
}

void run_backward(CrossEntropyProblem q) {
  q.chunks = cut(q.counted, q.counted.rows >= kManyRows);
  std::vector<double> slopes(q.chunks.pieces > 1 ? q.counted.rows : 0);
  q.slopes = slopes.empty() ? nullptr : slopes.data();
  for (int64_t row = 0; q.slopes != nullptr && row < q.counted.rows; ++row) kernels().read_slope(q, row);
  for_each_gradient_chunk(q, q.chunks.count, q.chunks.rows_per_chunk * q.chunks.cols_per_piece,
                          [&](int64_t chunk) { kernels().backward(q, chunk); });
}

void refuse_bad_temperature(const char* op, const RowProblem& q, const Tensor& logits,
                            const RowTotals& totals) {
  if (totals.bad_temperature >= 0) check_temperature_of(op, q, logits, totals.bad_temperature);
}

void refuse_bad_rows(const char* op, const RowProblem& q, const Tensor& logits, const RowTotals& totals) {
  if (totals.bad_row >= 0) refuse_label(op, q, logits, totals.bad_row);
  refuse_bad_temperature(op, q, logits, totals);
}

// Of another rank's message, which may hold anything: no integer before it is known to be one.
std::string size_text(double size) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.17g", size);
  return digits;
}

[[noreturn]] void refuse_sizes(const char* op, const Shards& shards) {
  std::string got;
  for (int64_t i = 0; i < shards.count; ++i) {
    const ShardHeader h = header_of(shards, i);
    got += (i ? ", " : "") + size_text(h.first) + " + " + size_text(h.columns);
  }
  fail(op, ": vocab_start must be where the shards of the ranks before end, and all together be vocab_size ",
       size_text(header_of(shards, 0).classes), ", got of the ranks ", got);
}

void refuse_misfit(const char* op, const Shards& shards) {
  const int64_t shard = first_misfit(shards);
  if (shard < 0) return;
  const ShardHeader first = header_of(shards, 0);
  if (shard == shards.count || same_call(header_of(shards, shard), first)) refuse_sizes(op, shards);
  const ShardHeader other = header_of(shards, shard);
  const auto differs = [&](const char* name, double one, double two) {
    if (one != two) fail(op, ": ", name, " must be the same on all ranks, got ", one, " on the first of the ",
                         "group and ", two, " on number ", shard);
  };
  differs("vocab_size", first.classes, other.classes);
  differs("temperature", first.temperature, other.temperature);
  differs("normalizer", first.normalizer, other.normalizer);
  fail(op, ": all keywords must be the same on all ranks, got others on number ", shard, " of the group");
}

// A row of all shards, in their order.
RowPart merged(const CrossEntropyProblem& q, const Shards& shards, int64_t row) {
  const double scale = q.temperature_per_row ? 1 / read_entry<double>(q.temperature, row) : q.scale;
  RowPart whole = unpack(shards.format, row_of(shards, 0, row), scale);
  for (int64_t i = 1; i < shards.count; ++i) {
    merge(whole, unpack(shards.format, row_of(shards, i, row), scale));
  }
  return whole;
}

struct Rows : ShardedRows {
  static void forward(const char* op, const RowProblem& q, const Tensor& logits) {
    const double given = given_denominator(op, q);
    put_class_weights(q);
    const RowTotals totals = forward_rows(op, q);
    refuse_bad_rows(op, q, logits, totals);
    put_loss(q, totals, denominator_of(q, totals, given));
  }

  static void backward(const char* op, RowProblem q, const Tensor& logits) {
    if (q.temperature_per_row) refuse_bad_temperature(op, q, logits, count_rows(q));
    const double grad_scale = grad_scale_of(q);
    if (q.reduction != RowReduction::kNone) q.grad_loss = {};
    backward_rows(op, q, grad_scale);
  }

  // The counted rows are known before the first gradient is written, so that a bad label leaves all as it
  // was.
  static void sweep(const char* op, RowProblem q, const Tensor& logits) {
    const double given = given_denominator(op, q);
    read_scale(op, q);
    const RowTotals counted = count_rows(q);
    refuse_bad_rows(op, q, logits, counted);
    put_class_weights(q);
    const double denominator = denominator_of(q, counted, given);
    const Tensor buffer = sweep_buffer(q, logits, q.counted.rows);
    put_loss(q, sweep_rows(op, q, denominator != 0 ? 1 / denominator : 0), denominator);
  }

  static void scale(const char*, const RowProblem& rows, const Tensor&) {
    const double factor = read_entry<double>(rows.grad_loss, 0);
    if (factor == 1) return;
    CrossEntropyProblem q = pass_over(rows, 1);
    q.chunks = cut(q.counted, false);
    for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernels().scale(q, factor, chunk); });
  }
};

}  // namespace

void refuse_label(const char* op, const RowProblem& q, const Tensor& like, int64_t row) {
  throw std::out_of_range(text_of(op, ": target at row ", row_index(like, row, q.counted.shift),
                                  " must be in [0, ", q.counted.classes, ") or ignore_index ",
                                  q.counted.ignore_index, ", got ",
                                  read_integer(q.counted.target, row + q.counted.shift)));
}

double given_denominator(const char* op, const RowProblem& q) {
  if (q.reduction != RowReduction::kMean || q.normalizer.data == nullptr) return 1;
  const double value = read_entry<double>(q.normalizer, 0);
  check_finite(op, "normalizer", value, false);
  return value;
}

double denominator_of(const RowProblem& q, const RowTotals& totals, double given) {
  return q.reduction == RowReduction::kMean && q.normalizer.data == nullptr ? totals.denominator : given;
}

void put_class_weights(const RowProblem& q) {
  double sum = double(q.counted.classes);
  if (q.weight.data != nullptr && q.options.label_smoothing > 0) {
    sum = 0;
    for (int64_t c = 0; c < q.counted.classes; ++c) sum += read_entry<double>(q.weight, c);
  }
  static_cast<double*>(q.totals.data)[1] = sum;
}

void put_loss(const RowProblem& q, const RowTotals& totals, double denominator) {
  static_cast<double*>(q.totals.data)[0] = denominator;
  if (q.reduction == RowReduction::kNone) return;
  const double loss = denominator != 0 ? totals.loss / denominator : 0;
  if (q.loss.kind == Kind::kDouble) *static_cast<double*>(q.loss.data) = loss;
  else *static_cast<float*>(q.loss.data) = static_cast<float>(loss);
}

double grad_scale_of(const RowProblem& q) {
  if (q.grad_loss.data == nullptr) return 0;
  if (q.reduction == RowReduction::kNone) return 1;
  const double denominator = *static_cast<const double*>(q.totals.data);
  return denominator != 0 ? read_entry<double>(q.grad_loss, 0) / denominator : 0;
}

Tensor sweep_buffer(RowProblem& q, const Tensor& like, int64_t rows) {
  const Tensor buffer = empty_tensor(like, {kRowSums + 2, rows}, accumulate_type(like));
  const auto part = [&](int64_t i) {
    Array array = array_of(buffer);
    array.data = static_cast<char*>(array.data) + i * rows * size_of(array.kind);
    return array;
  };
  q.row_sums = part(0);
  q.log_prob = part(kRowSums);
  if (q.options.label_smoothing > 0) q.smooth_distance = part(kRowSums + 1);
  return buffer;
}

RowTotals forward_rows(const char* op, const RowProblem& rows) {
  return run_forward(pass_over(rows, read_scale(op, rows)));
}

void ShardedRows::shard(const char* op, const RowProblem& rows, ShardFormat format, double* message,
                        const Tensor&) {
  CrossEntropyProblem q = pass_over(rows, read_scale(op, rows));
  q.chunks = cut(q.counted, false);
  std::vector<RowPart> parts(q.counted.rows * q.chunks.pieces);  // of rows that do not count: of nothing
  q.parts = parts.data();
  for_each_chunk(q.chunks.count, [&](int64_t chunk) { kernels().forward(q, chunk); });
  const auto send = [&](int64_t row) {
    RowPart* pieces = q.parts + row * q.chunks.pieces;
    for (int64_t i = 1; i < q.chunks.pieces; ++i) merge(pieces[0], pieces[i]);
    pack(format, pieces[0], message + place_of(q.counted, row) * numbers_of(format));
  };
  for_each_chunk(finish_groups(q.counted.rows),
                 [&](int64_t group) { for_each_row_of(group, q.counted.rows, send); });
}

void ShardedRows::head(const char* op, const RowProblem& q, ShardHeader header, double* place, const Tensor&) {
  if (q.temperature.data != nullptr && !q.temperature_per_row) header.temperature = 1 / read_scale(op, q);
  header.normalizer = given_denominator(op, q);
  std::memcpy(place, &header, sizeof header);
}

void ShardedRows::unite(const char* op, const RowProblem& rows, const Shards& shards, const Tensor& like) {
  refuse_misfit(op, shards);
  const double given = given_denominator(op, rows);
  put_class_weights(rows);
  CrossEntropyProblem q = pass_over(rows, read_scale(op, rows));
  std::vector<RowPart> parts(q.counted.rows);
  q.parts = parts.data();
  std::vector<RowTotals> totals(finish_groups(q.counted.rows));
  q.chunk_totals = totals.data();
  for_each_chunk(static_cast<int64_t>(totals.size()), [&](int64_t group) {
    for_each_row_of(group, q.counted.rows, [&](int64_t row) {
      const int64_t label = label_of<HostElements>(q.counted, row);
      if (label >= 0 || label == kNoLabel) parts[row] = merged(q, shards, row);
    });
    kernels().finish(q, group);
  });
  const RowTotals all = sum_of(totals, 1);
  refuse_bad_rows(op, rows, like, all);
  put_loss(rows, all, denominator_of(rows, all, given));
}

RowTotals count_rows(const RowProblem& rows) {
  CrossEntropyProblem q = pass_over(rows, 1);
  q.chunks = cut(q.counted, false);
  if (q.chunks.pieces > 1) q.chunks.rows_per_chunk = kRowsPerFinish;  // as run_forward() adds them
  const int64_t chunks = (q.counted.rows + q.chunks.rows_per_chunk - 1) / q.chunks.rows_per_chunk;
  std::vector<RowTotals> totals(chunks);
  q.chunk_totals = totals.data();
  for_each_chunk(chunks, [&](int64_t chunk) { kernels().count(q, chunk); });
  return sum_of(totals, 1);
}

void backward_rows(const char* op, const RowProblem& rows, double grad_scale) {
  CrossEntropyProblem q = pass_over(rows, read_scale(op, rows));
  prepare_gradient(q, grad_scale);
  run_backward(q);
}

RowTotals sweep_rows(const char* op, const RowProblem& rows, double grad_scale) {
  CrossEntropyProblem q = pass_over(rows, read_scale(op, rows));
  prepare_gradient(q, grad_scale);
  q.chunks = cut(q.counted, false);
  const bool is_cut = q.chunks.pieces > 1;
  if (is_cut && q.counted.rows < kManyRows) {  // one pass after the other, each over all threads
    const RowTotals totals = run_forward(q);
    run_backward(q);
    return totals;
  }
  const int64_t chunks = q.chunks.count / q.chunks.pieces;
  std::vector<RowTotals> totals(chunks);
  q.chunk_totals = totals.data();
  // In place last chunk first: what the model wrote last is still in the cache.
  for_each_gradient_chunk(q, chunks, q.chunks.rows_per_chunk * q.counted.columns, [&](int64_t i) {
    kernels().sweep(q, in_place(q) ? chunks - 1 - i : i);
  });
  return sum_of(totals, is_cut ? kRowsPerFinish : 1);
}

}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_row_forward<masked_loss_ext::Rows>(m);
  masked_loss_ext::register_row_backward<masked_loss_ext::Rows>(m);
  masked_loss_ext::register_row_sweep<masked_loss_ext::Rows>(m);
  masked_loss_ext::register_vocab_parallel_forward<masked_loss_ext::Rows>(m);
  masked_loss_ext::register_vocab_parallel_backward<masked_loss_ext::Rows>(m);
}
