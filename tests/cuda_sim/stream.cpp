// SPDX-License-Identifier: BSD-3-Clause
// What a stream does besides launches.
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "device_memory.h"
#include "scheduler.h"

namespace cuda_sim {
namespace {

struct HostCopy {
  void* to;
  std::vector<char> bytes;
};

std::vector<HostCopy>& pending() {
  static std::vector<HostCopy> copies;
  return copies;
}

void enter(const char* what, cudaStream_t stream) {
  if (stream != current_stream()) {
    throw std::runtime_error(std::string("cuda_sim: not on the current stream: ") + what);
  }
  launch_log() += std::string(what) + "\n";
}

}  // namespace

bool& capturing() {
  static bool on = false;
  return on;
}

}  // namespace cuda_sim

cudaError_t cudaMemsetAsync(void* data, int byte, size_t bytes, cudaStream_t stream) {
  cuda_sim::enter(("cudaMemsetAsync " + std::to_string(bytes)).c_str(), stream);
  cuda_sim::DeviceMemory::instance().fill(data, byte, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToHost) return cudaErrorInvalidValue;
  if (cuda_sim::capturing()) return cudaErrorStreamCaptureUnsupported;
  cuda_sim::enter(("cudaMemcpyAsync " + std::to_string(bytes)).c_str(), stream);
  std::vector<char> copy(bytes);
  cuda_sim::DeviceMemory::instance().read(copy.data(), from, bytes);
  cuda_sim::pending().push_back({to, copy});
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (cuda_sim::capturing()) return cudaErrorStreamCaptureUnsupported;
  cuda_sim::enter("cudaStreamSynchronize", stream);
  for (const auto& copy : cuda_sim::pending()) std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  cuda_sim::pending().clear();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (stream != cuda_sim::current_stream()) return cudaErrorInvalidValue;
  *status = cuda_sim::capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
