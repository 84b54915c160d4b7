// SPDX-License-Identifier: BSD-3-Clause
// How often each byte of device memory is read and written, for sources that are compiled with
// -fsanitize=thread: the calls that it puts before every access come here, not to a race detector.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_sim {

void set_counting(bool on);  // forgets what was counted
void forget_last_buffer();   // a buffer may have moved: to be called before each launch
// Adds up what was counted of [data, data + bytes), a byte at a time; 0 where nothing was.
void read_counts(const void* data, size_t bytes, uint16_t* reads, uint16_t* writes);

}  // namespace cuda_sim
