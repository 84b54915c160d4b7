// SPDX-License-Identifier: BSD-3-Clause
// repetition_counts and repetition_links on CPU: threads take rows; a row is named in ascending order, so
// that the first window of a kind is the one that the table holds.
#include "repetition/formula.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "common/cpu/device.h"
#include "common/cpu/parallel.h"
#include "common/cpu/scalars.h"
#include "repetition/call.h"

namespace masked_loss_ext {
namespace {

class Row {
 public:
  Row(const TokenRows& in, uint8_t* scratch)
      : in_(in), s_(scratch_at(scratch, in.length)), last_slot_(slots_for(in.length) - 1) {}

  void count(int64_t row, const CountPointers& out) {
    name_tokens(row);
    out.longest_run[row] = longest_run();
    const bool fits = in_.ngram <= in_.length;
    if (fits) name_windows(1, in_.ngram);
    int64_t pairs = 0, windows = 0, distinct = 0;
    std::fill(s_.slots, s_.slots + in_.length, 0);  // how often each name was seen
    for (int64_t i = 0; i + in_.ngram <= in_.length; ++i) {
      const int32_t name = s_.names[i];
      if (name == kNoName) continue;
      ++windows;
      distinct += name == i;
      pairs += s_.slots[name]++;
    }
    out.pairs[row] = pairs;
    out.windows[row] = windows;
    out.distinct[row] = distinct;
  }

  void link(int64_t row, const LinkPointers& out) {
    int32_t* context_before = out.context_before + row * in_.length;
    int32_t* ngram_after = out.ngram_after + row * in_.length;
    std::fill(context_before, context_before + in_.length, -1);
    std::fill(ngram_after, ngram_after + in_.length, static_cast<int32_t>(in_.length));
    if (in_.ngram > in_.length) return;
    name_tokens(row);
    if (in_.ngram > 1) name_windows(1, in_.ngram - 1);
    for (int64_t i = 0; i < in_.length; ++i) s_.contexts[i] = in_.ngram > 1 ? s_.names[i] : 0;
    if (in_.ngram > 1) name_windows(in_.ngram - 1, in_.ngram);
    const int64_t last = in_.ngram - 1;  // of a window, from its first
    for_each_earlier(s_.contexts, [&](int64_t earlier, int64_t i) {
      const bool same = s_.names[earlier] == s_.names[i];  // what differs from one differs from the other
      context_before[i + last] =
          same ? context_before[earlier + last] : static_cast<int32_t>(earlier + last);
    });
    for_each_earlier(s_.names, [&](int64_t earlier, int64_t i) {
      ngram_after[earlier + last] = static_cast<int32_t>(i + last);
    });
  }

 private:
  // The first position whose key is keys[i], which from now on may be i.
  int32_t name_of(int64_t i) {
    uint64_t slot = first_slot(s_.keys[i], last_slot_);
    while (s_.slots[slot] != kEmptySlot) {
      if (s_.keys[s_.slots[slot]] == s_.keys[i]) return s_.slots[slot];
      slot = (slot + 1) & last_slot_;
    }
    return s_.slots[slot] = static_cast<int32_t>(i);
  }

  void clear_slots() { std::fill(s_.slots, s_.slots + last_slot_ + 1, kEmptySlot); }

  void name_tokens(int64_t row) {
    clear_slots();
    const int64_t token = row * in_.token_stride[0], valid = row * in_.valid_stride[0];
    const bool bytes = in_.valid.kind == Kind::kUInt8;  // a bool mask: no need to ask for each entry
    const auto* flags = static_cast<const uint8_t*>(in_.valid.data);
    for (int64_t i = 0; i < in_.length; ++i) {
      s_.names[i] = kNoName;
      const int64_t at = valid + i * in_.valid_stride[1];
      if (flags && (bytes ? flags[at] == 0 : read_entry<double>(in_.valid, at) == 0)) continue;
      s_.keys[i] = static_cast<uint64_t>(read_integer(in_.tokens, token + i * in_.token_stride[1]));
      s_.names[i] = name_of(i);
    }
  }

  // From the names of windows of `part` tokens to those of `length`.
  void name_windows(int64_t part, int64_t length) {
    while (part < length) {
      const int64_t joined = joined_length(part, length, in_.length);
      clear_slots();
      for (int64_t i = 0; i < in_.length; ++i) {  // in place: what follows i is read, not what precedes it
        const bool exists = joined_key(s_.names, in_.length, i, part, joined, &s_.keys[i]);
        s_.names[i] = exists ? name_of(i) : kNoName;
      }
      part = joined;
    }
  }

  int64_t longest_run() const {
    int64_t longest = 0, run = 0;
    for (int64_t t = 0; t < in_.length; ++t) {
      run = continues_run(s_.names, t) ? run + 1 : s_.names[t] != kNoName;
      longest = std::max(longest, run);
    }
    return longest;
  }

  // Calls f(u, i) for every full window i and the latest full window u before it with the same group.
  template <class F>
  void for_each_earlier(const int32_t* group, const F& f) {
    clear_slots();
    for (int64_t i = 0; i + in_.ngram <= in_.length; ++i) {
      if (s_.names[i] == kNoName) continue;
      int32_t& latest = s_.slots[group[i]];
      if (latest != kEmptySlot) f(latest, i);
      latest = static_cast<int32_t>(i);
    }
  }

  const TokenRows& in_;
  const RowScratch s_;
  const uint64_t last_slot_;
};

// Calls f(Row, index) for every row, with the scratch of a thread.
template <class F>
void for_each_row(const TokenRows& in, bool contexts, const F& f) {
  const int64_t lanes = std::min<int64_t>(in.rows, torch::stable::get_num_threads());
  const int64_t bytes = scratch_bytes(in.length, contexts);
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[lanes * bytes]);  // aligned as any object needs
  std::atomic<int64_t> next{0};
  for_each_chunk(lanes, [&](int64_t lane) {
    Row row(in, scratch.get() + lane * bytes);
    for (int64_t i = next++; i < in.rows; i = next++) f(row, i);
  });
}

struct Rows : Cpu {
  static void count(const char*, const TokenRows& in, const CountPointers& out, const Tensor&) {
    for_each_row(in, false, [&](Row& row, int64_t i) { row.count(i, out); });
  }

  static void link(const char*, const TokenRows& in, const LinkPointers& out, const Tensor&) {
    for_each_row(in, true, [&](Row& row, int64_t i) { row.link(i, out); });
  }
};

}  // namespace
}  // namespace masked_loss_ext

STABLE_TORCH_LIBRARY_IMPL(masked_loss_ext, CPU, m) {
  masked_loss_ext::register_repetition<masked_loss_ext::Rows>(m);
}
