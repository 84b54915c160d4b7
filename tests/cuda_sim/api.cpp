// SPDX-License-Identifier: BSD-3-Clause
// What the tests call through ctypes; every function returns null or the text of an error.
#include <cstring>
#include <string>

#include "accesses.h"
#include "device_memory.h"
#include "scheduler.h"

namespace {

thread_local std::string error_text;

template <class F>
const char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error_text = e.what();
    return error_text.c_str();
  }
}

}  // namespace

#define CUDA_SIM_API extern "C" __attribute__((visibility("default")))

CUDA_SIM_API const char* cuda_sim_allocate(size_t bytes, int writable, void** data) {
  return guarded([&] {
    cuda_sim::install_fault_handlers();
    *data = cuda_sim::device_allocate(bytes, writable != 0);
  });
}
CUDA_SIM_API const char* cuda_sim_skip(size_t bytes) {
  return guarded([&] { cuda_sim::DeviceMemory::instance().skip(bytes); });
}
CUDA_SIM_API const char* cuda_sim_release(void* data) {
  return guarded([&] { cuda_sim::DeviceMemory::instance().release(data); });
}
CUDA_SIM_API const char* cuda_sim_write(void* to, const void* from, size_t bytes) {
  return guarded([&] { cuda_sim::DeviceMemory::instance().write(to, from, bytes); });
}
CUDA_SIM_API const char* cuda_sim_read(void* to, const void* from, size_t bytes) {
  return guarded([&] { cuda_sim::DeviceMemory::instance().read(to, from, bytes); });
}
CUDA_SIM_API int cuda_sim_is_device_pointer(const void* pointer) {
  return cuda_sim::is_device_pointer(pointer);
}
// Releases every buffer and forgets the launches; a tensor that still points there must not be used.
CUDA_SIM_API const char* cuda_sim_reset() {
  return guarded([] {
    cuda_sim::DeviceMemory::instance().release_all();
    cuda_sim::launch_log().clear();
  });
}
CUDA_SIM_API void cuda_sim_set_capturing(int on) { cuda_sim::capturing() = on != 0; }
CUDA_SIM_API int cuda_sim_set_order(const char* text) {
  return cuda_sim::Order::parse(text, &cuda_sim::order());
}
CUDA_SIM_API void cuda_sim_set_cluster_limit(unsigned blocks, unsigned launchable) {
  cuda_sim::cluster_limit() = blocks;
  cuda_sim::launchable_blocks() = launchable;
}
CUDA_SIM_API const char* cuda_sim_launches() { return cuda_sim::launch_log().c_str(); }
CUDA_SIM_API void cuda_sim_set_counting(int on) { cuda_sim::set_counting(on != 0); }
CUDA_SIM_API void cuda_sim_counts(const void* data, size_t bytes, uint16_t* reads, uint16_t* writes) {
  cuda_sim::read_counts(data, bytes, reads, writes);
}
