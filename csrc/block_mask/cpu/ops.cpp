// SPDX-License-Identifier: BSD-3-Clause
// The block-mask operators on CPU. Row intervals are written segment by segment: rows that see the same
// are filled, not computed. Block lists: one pass over the rows leaves a class byte per pair of blocks and
// the lists of each q-block; the transposes are read from the bytes, a tile of columns at a time.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "block_mask/call.h"
#include "common/cpu/device.h"
#include "common/cpu/parallel.h"

namespace masked_loss_ext {
namespace {

void fill_equal(const PackedRows& p, int64_t begin, int64_t end, const Interval* intervals, int count) {
  for (int r = 0; r < p.slots; ++r) {
    const Interval one = r < count ? intervals[r] : Interval{0, 0};
    std::fill(p.lo + r * p.rows + begin, p.lo + r * p.rows + end, one.begin);
    std::fill(p.hi + r * p.rows + begin, p.hi + r * p.rows + end, one.end);
  }
}

// Without a window a row sees the tokens before `cut`, which only the row's index moves: the intervals are
// the runs, each up to there, slot by slot.
void fill_ordered(const PackedRows& p, const Sample& sample, int64_t begin, int64_t end) {
  const int32_t prefix_end = static_cast<int32_t>(sample.prefix_end);
  for (int r = 0; r < p.slots; ++r) {
    const Interval run = r < sample.count ? sample.runs[r] : Interval{0, 0};
    int32_t* lo = p.lo + r * p.rows;
    int32_t* hi = p.hi + r * p.rows;
    for (int32_t t = static_cast<int32_t>(begin); t < end; ++t) {
      const int32_t cut = std::max(prefix_end, t + 1);
      lo[t] = cut > run.begin ? run.begin : 0;
      hi[t] = cut > run.begin ? std::min(run.end, cut) : 0;
    }
  }
}

// Rows [begin, end) of one sample, all visible or all not.
void fill_rows(const PackedRows& p, const Sample& sample, int64_t begin, int64_t end, bool visible) {
  if (begin >= end) return;
  Interval intervals[kMaxIntervals];
  const bool attend = visible || p.dropped == DroppedQueries::kAttend;
  const bool window = p.left >= 0 || p.right >= 0;
  const bool all_see_all = p.mode == PackedMode::kFull && !window;
  if (attend && !all_see_all && !window) return fill_ordered(p, sample, begin, end);
  if (attend ? all_see_all : p.dropped == DroppedQueries::kNone) {
    return fill_equal(p, begin, end, intervals, attended_by(p, sample, begin, visible, intervals));
  }
  for (int64_t t = begin; t < end; ++t) {
    store_row(p, t, intervals, attended_by(p, sample, t, visible, intervals));
  }
}

// Writes the intervals of rows [begin, end).
void fill_packed_rows(const PackedRows& p, int64_t begin, int64_t end) {
  const int64_t segments = p.samples * p.segments;
  int64_t segment = segment_of_row(p, begin), sample_index = -1;
  Sample sample = {};
  for (int64_t t = begin; t < end; ++segment) {
    const int64_t stop = segment < segments ? std::min(end, offset_at(p, segment + 1)) : end;
    if (segment < 0 || segment == segments) {
      fill_equal(p, t, stop, nullptr, 0);
    } else if (t < stop) {
      if (segment / p.segments != sample_index) {
        sample_index = segment / p.segments;
        sample = load_sample(p, sample_index);
      }
      const int64_t middle = std::clamp(visible_end(p, segment), t, stop);
      fill_rows(p, sample, t, middle, true);
      fill_rows(p, sample, middle, stop, false);
    }
    t = stop;
  }
}


// Rows, or pairs of blocks, per chunk: a millisecond or two. Less is not worth a second thread, which on a
// busy machine comes a whole time slice later.
constexpr int64_t kChunkWork = 1 << 19;
constexpr int64_t kTileColumns = 16;  // of class bytes: a cache line serves four tiles, buffers stay small

bool same_row(const IntervalRows& in, const int32_t* lo, const int32_t* hi, int64_t q, int64_t other) {
  for (int r = 0; r < in.intervals; ++r) {
    const int32_t* l = lo + r * in.lo_stride[1];
    const int32_t* h = hi + r * in.hi_stride[1];
    if (l[q * in.lo_stride[2]] != l[other * in.lo_stride[2]]) return false;
    if (h[q * in.hi_stride[2]] != h[other * in.hi_stride[2]]) return false;
  }
  return true;
}

constexpr int kRowsAtOnce = 16;

// Whether rows [begin, begin + kRowsAtOnce), side by side in memory, are all like row q.
bool same_rows(const IntervalRows& in, const int32_t* lo, const int32_t* hi, int64_t q, int64_t begin) {
  int32_t difference = 0;
  for (int r = 0; r < in.intervals; ++r) {
    const int32_t* l = lo + r * in.lo_stride[1];
    const int32_t* h = hi + r * in.hi_stride[1];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      difference |= (l[begin + i] ^ l[q]) | (h[begin + i] ^ h[q]);
    }
  }
  return difference == 0;
}

// The first row after q that is not like it, or end.
int64_t next_row(const IntervalRows& in, const int32_t* lo, const int32_t* hi, int64_t q, int64_t end) {
  int64_t next = q + 1;
  if (next == end || !same_row(in, lo, hi, q, next)) return next;
  if (in.lo_stride[2] == 1 && in.hi_stride[2] == 1) {
    while (next + kRowsAtOnce <= end && same_rows(in, lo, hi, q, next)) next += kRowsAtOnce;
  }
  while (next < end && same_row(in, lo, hi, q, next)) ++next;
  return next;
}

// Finds the classes of one q-block at a time.
class Classifier {
 public:
  Classifier(const IntervalRows& in, const BlockGrid& grid)
      : in_(in),
        grid_(grid),
        kv_block_(block_size(grid.kv_block)),
        touched_(grid.kv_blocks + 1),
        covered_(grid.kv_blocks + 1) {}

  void classify(int64_t b, int64_t q_block, uint8_t* classes /* [kv_blocks] */) {
    first_ = grid_.kv_blocks;
    last_ = 0;
    add_rows(b, q_block * grid_.q_block, std::min(in_.rows, (q_block + 1) * grid_.q_block));
    // Not memset: without kv-blocks there is no memory, and it takes no null pointer.
    std::fill_n(classes, grid_.kv_blocks, uint8_t{kEmptyBlock});
    int64_t touching = 0, covering = 0;
    for (int64_t j = first_; j < last_; ++j) {
      touching += touched_[j];
      covering += covered_[j];
      classes[j] = covering == grid_.q_block ? kFullBlock : touching > 0 ? kPartialBlock : kEmptyBlock;
    }
    if (first_ > last_) return;
    std::fill(touched_.begin() + first_, touched_.begin() + last_ + 1, 0);
    std::fill(covered_.begin() + first_, covered_.begin() + last_ + 1, 0);
  }

 private:
  // Equal rows that follow each other, as packed samples have them, are added once.
  void add_rows(int64_t b, int64_t begin, int64_t end) {
    if (in_.intervals == 0) return;  // lo and hi are null, to which nothing may be added
    const int32_t* lo = in_.lo + b * in_.lo_stride[0];
    const int32_t* hi = in_.hi + b * in_.hi_stride[0];
    Interval intervals[kMaxIntervals];
    for (int64_t q = begin, next; q < end; q = next) {
      next = next_row(in_, lo, hi, q, end);
      const int count = load_row(in_, b, q, intervals);
      for (int i = 0; i < count; ++i) add(intervals[i], static_cast<int32_t>(next - q));
    }
  }

  void add(Interval interval, int32_t rows) {
    const BlockRange range = blocks_of(interval, kv_block_);
    touched_[range.touched_begin] += rows;
    touched_[range.touched_end] -= rows;
    first_ = std::min<int64_t>(first_, range.touched_begin);
    last_ = std::max<int64_t>(last_, range.touched_end);
    if (range.covered_begin >= range.covered_end) return;
    covered_[range.covered_begin] += rows;
    covered_[range.covered_end] -= rows;
  }

  const IntervalRows& in_;
  const BlockGrid& grid_;
  const BlockSize kv_block_;
  std::vector<int32_t> touched_, covered_;  // differences of the numbers of rows, [kv_blocks + 1]
  int64_t first_ = 0, last_ = 0;            // what is touched at all
};

// Where the class changes after `from`, or n.
int64_t next_change(const uint8_t* classes, int64_t from, int64_t n) {
  const uint64_t same = classes[from] * UINT64_C(0x0101010101010101);
  int64_t i = from + 1;
  for (uint64_t eight; i + 8 <= n; i += 8) {
    std::memcpy(&eight, classes + i, 8);
    if (eight != same) break;
  }
  while (i < n && classes[i] == classes[from]) ++i;
  return i;
}

int32_t* count_up(int32_t* out, int32_t begin, int32_t end) {
  for (int32_t i = begin; i < end; ++i) out[i - begin] = i;
  return out + (end - begin);
}

struct Run {
  int32_t begin, end;
  uint8_t block_class;
};

// One row of the lists: the blocks of a class ascending, then all others ascending.
void write_lists(const uint8_t* classes, int64_t n, int64_t row, const ListPointers& out,
                 std::vector<Run>& runs) {
  runs.clear();
  int32_t counts[3] = {0, 0, 0};
  for (int64_t begin = 0, end; begin < n; begin = end) {
    end = next_change(classes, begin, n);
    runs.push_back({static_cast<int32_t>(begin), static_cast<int32_t>(end), classes[begin]});
    counts[classes[begin]] += static_cast<int32_t>(end - begin);
  }
  out.partial_count[row] = counts[kPartialBlock];
  out.full_count[row] = counts[kFullBlock];
  int32_t* partial = out.partial + row * n;
  int32_t* full = out.full + row * n;
  int32_t* not_partial = partial + counts[kPartialBlock];
  int32_t* not_full = full + counts[kFullBlock];
  for (const Run& run : runs) {
    int32_t*& to = run.block_class == kPartialBlock ? partial : not_partial;
    to = count_up(to, run.begin, run.end);
    int32_t*& to_full = run.block_class == kFullBlock ? full : not_full;
    to_full = count_up(to_full, run.begin, run.end);
  }
}

void transpose_tile(const uint8_t* classes /* [q_blocks, kv_blocks] */, const BlockGrid& grid,
                    int64_t begin, int64_t end, uint8_t* columns /* [end - begin, q_blocks] */) {
  for (int64_t i = 0; i < grid.q_blocks; ++i) {
    for (int64_t j = begin; j < end; ++j) {
      columns[(j - begin) * grid.q_blocks + i] = classes[i * grid.kv_blocks + j];
    }
  }
}

void fill_transposes(const uint8_t* classes, int64_t batch, const BlockGrid& grid,
                     const ListPointers& out) {
  const int64_t tiles = (grid.kv_blocks + kTileColumns - 1) / kTileColumns;
  const int64_t per_chunk = std::max<int64_t>(1, kChunkWork / (kTileColumns * (grid.q_blocks + 16)));
  const int64_t chunks = (batch * tiles + per_chunk - 1) / per_chunk;
  for_each_chunk(chunks, [&](int64_t chunk) {
    std::vector<uint8_t> columns(kTileColumns * grid.q_blocks);
    std::vector<Run> runs;
    const int64_t stop = std::min((chunk + 1) * per_chunk, batch * tiles);
    for (int64_t tile = chunk * per_chunk; tile < stop; ++tile) {
      const int64_t b = tile / tiles, begin = tile % tiles * kTileColumns;
      const int64_t end = std::min(grid.kv_blocks, begin + kTileColumns);
      transpose_tile(classes + b * grid.q_blocks * grid.kv_blocks, grid, begin, end, columns.data());
      for (int64_t j = begin; j < end; ++j) {
        write_lists(columns.data() + (j - begin) * grid.q_blocks, grid.q_blocks,
                    b * grid.kv_blocks + j, out, runs);
      }
    }
  });
}

// The eight lists; `q` is null where the transposes are not wanted. With `packed`, the intervals that `in`
// reads are written first, each just before it is read.
void fill_block_lists(const IntervalRows& in, const BlockGrid& grid, const ListPointers& kv,
                      const ListPointers* q, const PackedRows* packed) {
  const int64_t nk = grid.kv_blocks, total = in.batch * grid.q_blocks;
  // Not a vector: its zeros would be one pass too many.
  const std::unique_ptr<uint8_t[]> classes(q ? new uint8_t[total * nk + 1] : nullptr);
  const int64_t work = std::min(in.rows, grid.q_block) * (in.intervals + 1) + nk + 1;
  const int64_t per_chunk = std::max<int64_t>(1, kChunkWork / work);
  for_each_chunk((total + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    Classifier classifier(in, grid);
    std::vector<uint8_t> scratch(q ? 0 : nk);
    std::vector<Run> runs;
    const int64_t begin = chunk * per_chunk, end = std::min(begin + per_chunk, total);
    if (packed) {
      fill_packed_rows(*packed, begin * grid.q_block, std::min(in.rows, end * grid.q_block));
    }
    for (int64_t i = begin; i < end; ++i) {
      uint8_t* row = q ? classes.get() + i * nk : scratch.data();
      classifier.classify(i / grid.q_blocks, i % grid.q_blocks, row);
      write_lists(row, nk, i, kv, runs);
    }
  });
  if (q) fill_transposes(classes.get(), in.batch, grid, *q);
}

constexpr int64_t kRowsPerChunk = 1 << 19;  // a quarter of a millisecond

struct Masks : Cpu {
  // The kernels never write where offsets are wrong, but here they can be looked at.
  static void check_offsets(const char* op, const PackedRows& p) {
    int64_t before = 0;
    for (int64_t i = 0; i <= p.samples * p.segments; ++i) {
      const int64_t offset = p.offsets[i * p.offset_stride];
      if (offset < before) {
        fail(op, ": segment_offsets must ascend from 0 or more, got ", offset, " at ", i);
      }
      before = offset;
    }
    if (before > p.rows) {
      fail(op, ": segment_offsets must end within the ", p.rows, " rows, got ", before);
    }
  }

  static void fill_rows(const char*, const PackedRows& p, const Tensor&) {
    for_each_chunk((p.rows + kRowsPerChunk - 1) / kRowsPerChunk, [&](int64_t chunk) {
      fill_packed_rows(p, chunk * kRowsPerChunk, std::min(p.rows, (chunk + 1) * kRowsPerChunk));
    });
  }

  static void fill_lists(const char*, const IntervalRows& in, const BlockGrid& grid,
                         const ListPointers& kv, const ListPointers* q, const PackedRows* packed,
                         const Tensor&) {
    fill_block_lists(in, grid, kv, q, packed);
  }
};

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_block_mask<masked_loss_ext::Masks>(m);
}
