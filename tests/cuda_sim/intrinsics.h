// SPDX-License-Identifier: BSD-3-Clause
// Barriers, warp functions and atomics of CUDA on the simulator's fibers.
// Only the types that CUDA itself accepts compile here.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "runtime.h"

namespace cuda_sim {

template <class T, class... Ts>
constexpr bool is_one_of = (std::is_same_v<T, Ts> || ...);

template <class T>
constexpr bool is_shuffled = is_one_of<T, int, unsigned, long, unsigned long, long long,
                                       unsigned long long, float, double>;

// The first lane of the caller's segment of `width` lanes.
inline int segment(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    kernel_error("shuffle width is not a power of two up to 32", site);
  return lane_id() & ~(width - 1);
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(is_shuffled<T>, "CUDA has no shuffle for this type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_meet(WarpCall::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T, class F>
T read_modify_write(T* address, F&& f) {
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace cuda_sim

// Default arguments name the caller's line: no macro is needed.
#define CUDA_SIM_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_SIM_SITE) {
  cuda_sim::block_barrier(cuda_sim::BarrierCall::kPlain, false, {file, line});
}
inline int __syncthreads_or(int predicate, CUDA_SIM_SITE) {
  return cuda_sim::block_barrier(cuda_sim::BarrierCall::kOr, predicate != 0, {file, line});
}
inline int __syncthreads_and(int predicate, CUDA_SIM_SITE) {
  return cuda_sim::block_barrier(cuda_sim::BarrierCall::kAnd, predicate != 0, {file, line});
}
inline int __syncthreads_count(int predicate, CUDA_SIM_SITE) {
  return cuda_sim::block_barrier(cuda_sim::BarrierCall::kCount, predicate != 0, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_SIM_SITE) {
  cuda_sim::warp_meet(cuda_sim::WarpCall::kSync, mask, 0, 0, {file, line});
}

// A lane that would read beyond its segment gets its own value, as the PTX instruction does.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_SIM_SITE) {
  const int first = cuda_sim::segment(width, {file, line});
  return cuda_sim::shuffle(mask, value, first + (source & (width - 1)), {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SIM_SITE) {
  const int lane = cuda_sim::lane_id(), first = cuda_sim::segment(width, {file, line});
  const bool inside = delta <= static_cast<unsigned>(lane - first);
  return cuda_sim::shuffle(mask, value, inside ? lane - static_cast<int>(delta) : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_SIM_SITE) {
  const int lane = cuda_sim::lane_id(), last = cuda_sim::segment(width, {file, line}) + width - 1;
  const bool inside = delta <= static_cast<unsigned>(last - lane);
  return cuda_sim::shuffle(mask, value, inside ? lane + static_cast<int>(delta) : lane, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_SIM_SITE) {
  const int lane = cuda_sim::lane_id(), last = cuda_sim::segment(width, {file, line}) + width - 1;
  const int source = (lane ^ lane_mask) & 31;
  return cuda_sim::shuffle(mask, value, source <= last ? source : lane, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_SIM_SITE) {
  return static_cast<unsigned>(
      cuda_sim::warp_meet(cuda_sim::WarpCall::kBallot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_SIM_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_SIM_SITE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
// CUDA promises no more than the calling lane, so that is what a kernel gets.
inline unsigned __activemask() { return 1u << cuda_sim::lane_id(); }

#undef CUDA_SIM_SITE

// Fibers give way only where they synchronise: memory is always consistent and a plain update is atomic.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}

template <class T>
using NoDeduce = std::common_type_t<T>;  // lets a literal convert to the type of the address

template <class T>
T atomicAdd(T* p, NoDeduce<T> v) {
  static_assert(cuda_sim::is_one_of<T, int, unsigned, unsigned long long, float, double>);
  return cuda_sim::read_modify_write(p, [&](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicSub(T* p, NoDeduce<T> v) {
  static_assert(cuda_sim::is_one_of<T, int, unsigned>);
  return cuda_sim::read_modify_write(p, [&](T old) { return static_cast<T>(old - v); });
}
template <class T>
constexpr bool is_atomic_integer =
    cuda_sim::is_one_of<T, int, unsigned, long long, unsigned long long>;
template <class T>
T atomicMax(T* p, NoDeduce<T> v) {
  static_assert(is_atomic_integer<T>);
  return cuda_sim::read_modify_write(p, [&](T old) { return std::max(old, v); });
}
template <class T>
T atomicMin(T* p, NoDeduce<T> v) {
  static_assert(is_atomic_integer<T>);
  return cuda_sim::read_modify_write(p, [&](T old) { return std::min(old, v); });
}
template <class T>
T atomicAnd(T* p, NoDeduce<T> v) {
  static_assert(is_atomic_integer<T>);
  return cuda_sim::read_modify_write(p, [&](T old) { return old & v; });
}
template <class T>
T atomicOr(T* p, NoDeduce<T> v) {
  static_assert(is_atomic_integer<T>);
  return cuda_sim::read_modify_write(p, [&](T old) { return old | v; });
}
template <class T>
T atomicXor(T* p, NoDeduce<T> v) {
  static_assert(is_atomic_integer<T>);
  return cuda_sim::read_modify_write(p, [&](T old) { return old ^ v; });
}
template <class T>
T atomicExch(T* p, NoDeduce<T> v) {
  static_assert(cuda_sim::is_one_of<T, int, unsigned, unsigned long long, float>);
  return cuda_sim::read_modify_write(p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, NoDeduce<T> compare, NoDeduce<T> v) {
  static_assert(cuda_sim::is_one_of<T, int, unsigned, unsigned long long, unsigned short>);
  return cuda_sim::read_modify_write(p, [&](T old) { return old == compare ? v : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return cuda_sim::read_modify_write(p, [&](unsigned old) { return old >= limit ? 0 : old + 1; });
}
