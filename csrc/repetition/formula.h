// SPDX-License-Identifier: BSD-3-Clause
// Exact repetition statistics of rows of tokens: which n-grams of a row are equal, in O(S log n).
//
// A window is n consecutive positions that are all valid. Its name is the first position of the row at
// which an equal window begins, so two windows are equal exactly where their names are, and names do not
// depend on the order in which a hash table was filled.
//
//   pairs  = sum over names of c * (c - 1) / 2,   c = windows that have it
//
// Single tokens are named by comparing tokens. A window of length m <= 2 h is named by the pair of names
// of its first and its last h tokens, which overlap or touch: two integers are compared, however long it
// is (Karp, Miller, Rosenberg 1972), and one is valid where both parts are. A table of positions finds the
// windows to compare: of equal hashes alone nothing follows. Names of tokens of a short row fill 16 bits,
// and up to four of them are one key.
#pragma once

#include "common/array.h"

namespace masked_loss_ext {

constexpr int32_t kNoName = -1;                       // some position of the window is not valid
constexpr int32_t kEmptySlot = -1;
constexpr int64_t kShortRow = 0xffff;                 // a row below this has names of 16 bits, none 0xffff
constexpr int64_t kNamesPerKey = 4;
constexpr int64_t kMaxRowLength = int64_t(1) << 30;   // the slots of a row are counted in 31 bits

struct TokenRows {
  Array tokens;  // [rows, length], integer
  Array valid;   // [rows, length], on where != 0; absent: all are
  int64_t token_stride[2], valid_stride[2];
  int64_t rows, length;
  int64_t ngram;  // at most length + 1, where no window fits
};

struct CountPointers {
  int64_t* pairs;  // each [rows]
  int64_t* windows;
  int64_t* distinct;
  int64_t* longest_run;
};

struct LinkPointers {
  int32_t* context_before;  // each [rows, length]
  int32_t* ngram_after;
};

// What one row needs while it is worked on.
struct RowScratch {
  uint64_t* keys;     // [length] token, or names of the two parts of a window
  int32_t* slots;     // [slots_for(length)] the positions named so far, by hash of their keys
  int32_t* names;     // [length] of the windows that begin there
  int32_t* contexts;  // [length] names one token shorter; for links alone
};

// A power of two, so that at most half of the table is taken.
MASKED_LOSS_EXT_INLINE int64_t slots_for(int64_t length) {
  int64_t slots = 2;
  while (slots < 2 * length) slots *= 2;
  return slots;
}

// A multiple of 8.
MASKED_LOSS_EXT_INLINE int64_t scratch_bytes(int64_t length, bool contexts) {
  const int64_t padded = (length + 1) / 2 * 2;
  return 8 * padded + 4 * slots_for(length) + 4 * padded * (contexts ? 2 : 1);
}

MASKED_LOSS_EXT_INLINE RowScratch scratch_at(uint8_t* data, int64_t length) {
  const int64_t padded = (length + 1) / 2 * 2;
  RowScratch scratch;
  scratch.keys = reinterpret_cast<uint64_t*>(data);
  scratch.slots = reinterpret_cast<int32_t*>(data + 8 * padded);
  scratch.names = scratch.slots + slots_for(length);
  scratch.contexts = scratch.names + padded;
  return scratch;
}

// Where a key is looked for first. Keys are small numbers side by side: every bit must move every other.
MASKED_LOSS_EXT_INLINE uint64_t first_slot(uint64_t key, uint64_t last_slot) {
  key ^= key >> 32;
  key *= 0x9e3779b97f4a7c15ull;
  key ^= key >> 29;
  key *= 0xbf58476d1ce4e5b9ull;
  return (key ^ key >> 32) & last_slot;
}

// The length that windows of `part` tokens, in a row of row_length, are joined to on the way to `length`.
MASKED_LOSS_EXT_INLINE int64_t joined_length(int64_t part, int64_t length, int64_t row_length) {
  const int64_t most = part == 1 && row_length < kShortRow ? kNamesPerKey : 2 * part;
  return most < length ? most : length;
}

// The key of `count` tokens by their names; false where one has none.
MASKED_LOSS_EXT_INLINE bool packed_key(const int32_t* names, int64_t count, uint64_t* key) {
  bool exists = true;
  *key = 0;
  for (int64_t k = 0; k < count; ++k) {
    exists = exists && names[k] != kNoName;
    *key = *key << 16 | uint64_t(uint16_t(names[k]));
  }
  return exists;
}

// The key of the window of `joined` tokens at i, from the names of windows of `part` tokens. False: there
// is no such window.
MASKED_LOSS_EXT_INLINE bool joined_key(const int32_t* names, int64_t length, int64_t i, int64_t part,
                                       int64_t joined, uint64_t* key) {
  if (i + joined > length) return false;
  if (part == 1 && length < kShortRow) return packed_key(names + i, joined, key);
  const int32_t head = names[i], tail = names[i + joined - part];
  *key = uint64_t(uint32_t(head)) << 32 | uint32_t(tail);
  return head != kNoName && tail != kNoName;
}

// Whether a run of equal tokens goes on at t; `names` are those of tokens.
MASKED_LOSS_EXT_INLINE bool continues_run(const int32_t* names, int64_t t) {
  return t > 0 && names[t] != kNoName && names[t] == names[t - 1];
}

}  // namespace masked_loss_ext
