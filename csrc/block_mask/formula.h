// SPDX-License-Identifier: BSD-3-Clause
// Attention masks as row intervals, and the block lists of a FlexAttention BlockMask made from them.
//
//   allowed(q, kv) = OR over r of lo[r][q] <= kv < hi[r][q]
//
// A q-block and a kv-block have a class: full where every pair is allowed, partial where some are, else
// empty. With every row's intervals maximal (sorted, merged where they overlap or touch) a row covers a
// kv-block exactly where one of its intervals does, so two counts per kv-block give the class: rows that
// touch it (> 0: not empty) and rows that cover it (= q_block: full). Both come from difference arrays,
// O(rows + kv-blocks) per q-block instead of q_block * kv_len.
//
// Packed rows of samples that consist of segments, of which the first `kept` tokens each are visible:
//
//   allowed(q, kv) = same sample and visible(kv) and visible(q) [by `dropped`, for queries that are not]
//                    and ( front(q, kv) or (order(q, kv) and -left <= kv - q <= right) )
//   order          = kv <= q in all modes but full
//   front          = kv before the prefix's end (causal_last: before the last segment), or kv one of the
//                    sample's first `sinks` tokens and order(q, kv): a sink is exempt from the window,
//                    not from causality
#pragma once

#include "common/array.h"

namespace masked_loss_ext {

constexpr int kMaxIntervals = 8;  // per row; local arrays have this size

enum BlockClass : uint8_t { kEmptyBlock = 0, kPartialBlock = 1, kFullBlock = 2 };
enum class PackedMode : uint8_t { kFull, kCausal, kCausalLast, kPrefix };
// What a query does that is itself not visible.
enum class DroppedQueries : uint8_t { kNone, kSelf, kAttend };

struct Interval {
  int32_t begin, end;
};

MASKED_LOSS_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MASKED_LOSS_EXT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
MASKED_LOSS_EXT_INLINE int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return smaller(larger(x, low), high);
}

// Sorts, and merges what overlaps or touches; returns how many are left.
MASKED_LOSS_EXT_INLINE int merge_intervals(Interval* intervals, int count) {
  for (int i = 1; i < count; ++i) {
    const Interval one = intervals[i];
    int j = i;
    for (; j > 0 && intervals[j - 1].begin > one.begin; --j) intervals[j] = intervals[j - 1];
    intervals[j] = one;
  }
  int merged = 0;
  for (int i = 0; i < count; ++i) {
    if (merged > 0 && intervals[i].begin <= intervals[merged - 1].end) {
      if (intervals[i].end > intervals[merged - 1].end) intervals[merged - 1].end = intervals[i].end;
    } else {
      intervals[merged++] = intervals[i];
    }
  }
  return merged;
}

struct IntervalRows {
  const int32_t* lo;  // [batch, intervals, rows]
  const int32_t* hi;
  int64_t lo_stride[3], hi_stride[3];
  int64_t batch, rows, kv_len;
  int intervals;  // at most kMaxIntervals
};

// The maximal intervals of one row, within [0, kv_len); returns how many.
MASKED_LOSS_EXT_INLINE int load_row(const IntervalRows& in, int64_t b, int64_t q, Interval* out) {
  int count = 0;
  for (int r = 0; r < in.intervals; ++r) {
    const int32_t lo = in.lo[b * in.lo_stride[0] + r * in.lo_stride[1] + q * in.lo_stride[2]];
    const int32_t hi = in.hi[b * in.hi_stride[0] + r * in.hi_stride[1] + q * in.hi_stride[2]];
    const int64_t begin = larger(lo, 0), end = smaller(hi, in.kv_len);
    if (begin < end) out[count++] = {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
  }
  return count > 1 ? merge_intervals(out, count) : count;
}

struct BlockGrid {
  int64_t q_block, kv_block, q_blocks, kv_blocks;
};

// One direction of the lists: of partial and of full blocks, how many and which in each row of them.
struct ListPointers {
  int32_t* partial_count;  // [batch, rows of the list]
  int32_t* partial;        // [batch, rows of the list, columns]
  int32_t* full_count;
  int32_t* full;
};

struct BlockRange {
  int32_t touched_begin, touched_end, covered_begin, covered_end;
};

// Division by the size of a block; a shift where it is a power of two, as almost always.
struct BlockSize {
  uint32_t size;
  int shift;  // negative: no power of two
};

MASKED_LOSS_EXT_INLINE BlockSize block_size(int64_t size) {
  BlockSize block = {static_cast<uint32_t>(size), 0};
  while ((int64_t(1) << block.shift) < size) ++block.shift;
  if ((int64_t(1) << block.shift) != size) block.shift = -1;
  return block;
}

MASKED_LOSS_EXT_INLINE uint32_t blocks_before(uint32_t position, BlockSize block) {
  return block.shift >= 0 ? position >> block.shift : position / block.size;
}

// kv-blocks that an interval touches, and those that it covers (none where covered_end <= covered_begin).
MASKED_LOSS_EXT_INLINE BlockRange blocks_of(Interval interval, BlockSize block) {
  const uint32_t begin = interval.begin, end = interval.end;
  const uint32_t first = blocks_before(begin, block), last = blocks_before(end, block);
  return {static_cast<int32_t>(first), static_cast<int32_t>(last + (last * block.size < end)),
          static_cast<int32_t>(first + (first * block.size < begin)), static_cast<int32_t>(last)};
}

struct PackedRows {
  const int64_t* offsets;  // [samples * segments + 1]
  const int64_t* kept;     // [samples, segments]
  const int64_t* prefix;   // [samples], null but for kPrefix
  int64_t offset_stride, kept_stride[2], prefix_stride;
  int64_t samples, rows;
  int64_t left, right, sinks;  // at most rows; left, right negative: unbounded
  int32_t* lo;                 // [slots, rows]
  int32_t* hi;
  int segments, slots;  // slots at most kMaxIntervals
  PackedMode mode;
  DroppedQueries dropped;
};

// Offsets are clamped, so that wrong ones give wrong intervals but never one outside the rows.
MASKED_LOSS_EXT_INLINE int64_t offset_at(const PackedRows& p, int64_t i) {
  return clamped(p.offsets[i * p.offset_stride], 0, p.rows);
}

// The segment that row t lies in: the last that begins at or before it. -1: none;
// samples * segments: t is padding.
MASKED_LOSS_EXT_INLINE int64_t segment_of_row(const PackedRows& p, int64_t t) {
  int64_t low = 0, high = p.samples * p.segments + 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offset_at(p, middle) <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - 1;
}

MASKED_LOSS_EXT_INLINE int64_t visible_end(const PackedRows& p, int64_t segment) {
  const int64_t begin = offset_at(p, segment), length = offset_at(p, segment + 1) - begin;
  const int64_t sample = segment / p.segments, g = segment % p.segments;
  const int64_t kept = p.kept[sample * p.kept_stride[0] + g * p.kept_stride[1]];
  return begin + clamped(kept, 0, larger(length, 0));
}

struct Sample {
  int64_t begin, prefix_end;
  Interval runs[kMaxIntervals];  // of visible tokens, maximal
  int count;
};

MASKED_LOSS_EXT_INLINE Sample load_sample(const PackedRows& p, int64_t sample) {
  Sample s = {};
  const int64_t first = sample * p.segments;
  s.begin = s.prefix_end = offset_at(p, first);
  if (p.mode == PackedMode::kCausalLast) s.prefix_end = offset_at(p, first + p.segments - 1);
  if (p.mode == PackedMode::kPrefix) {
    const int64_t prefix = clamped(p.prefix[sample * p.prefix_stride], 0, p.rows);
    s.prefix_end = smaller(s.begin + prefix, p.rows);
  }
  for (int g = 0; g < p.segments; ++g) {
    const int32_t begin = static_cast<int32_t>(offset_at(p, first + g));
    const int32_t end = static_cast<int32_t>(visible_end(p, first + g));
    if (begin >= end) continue;
    if (s.count > 0 && begin == s.runs[s.count - 1].end) {
      s.runs[s.count - 1].end = end;
    } else {
      s.runs[s.count++] = {begin, end};
    }
  }
  return s;
}

// The maximal intervals that a query at row t of the sample attends to; returns how many, at most
// p.slots. Front and band are one piece where they touch; if they do not, there is a token between them.
MASKED_LOSS_EXT_INLINE int attended(const PackedRows& p, const Sample& s, int64_t t, Interval* out) {
  const bool ordered = p.mode != PackedMode::kFull;
  const int64_t band_begin = p.left < 0 ? s.begin : larger(t - p.left, s.begin);
  int64_t band_end = ordered ? t + 1 : p.rows;
  if (p.right >= 0) band_end = smaller(band_end, t + 1 + p.right);
  int64_t front_end = s.begin + p.sinks;
  if (ordered) front_end = smaller(front_end, t + 1);
  front_end = larger(front_end, s.prefix_end);
  const bool joined = front_end >= band_begin;
  const int64_t begins[2] = {s.begin, band_begin};
  const int64_t ends[2] = {joined ? larger(front_end, band_end) : front_end, band_end};
  int count = 0;
  for (int r = 0; r < s.count; ++r) {
    for (int piece = 0; piece < (joined ? 1 : 2); ++piece) {
      const int64_t begin = larger(s.runs[r].begin, begins[piece]);
      const int64_t end = smaller(s.runs[r].end, ends[piece]);
      if (begin < end) out[count++] = {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
    }
  }
  return count;
}

// The same for a query that may not be visible.
MASKED_LOSS_EXT_INLINE int attended_by(const PackedRows& p, const Sample& s, int64_t t, bool visible,
                                       Interval* out) {
  if (visible || p.dropped == DroppedQueries::kAttend) return attended(p, s, t, out);
  if (p.dropped == DroppedQueries::kNone) return 0;
  out[0] = {static_cast<int32_t>(t), static_cast<int32_t>(t + 1)};
  return 1;
}

MASKED_LOSS_EXT_INLINE void store_row(const PackedRows& p, int64_t t, const Interval* intervals,
                                      int count) {
  for (int r = 0; r < p.slots; ++r) {
    p.lo[r * p.rows + t] = r < count ? intervals[r].begin : 0;
    p.hi[r * p.rows + t] = r < count ? intervals[r].end : 0;
  }
}

}  // namespace masked_loss_ext
