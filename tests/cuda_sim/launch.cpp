// SPDX-License-Identifier: BSD-3-Clause
// A launch from its checks to its end, and the simulator's settings.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <mutex>
#include <stdexcept>

#include "cluster.h"
#include "device_memory.h"
#include "scheduler.h"
#include "symbols.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_sim {
namespace {

std::mutex launch_mutex;
thread_local int device_scopes = 0;
char stream_token;

std::string name_of(const void* kernel) {
  const std::string name = Symbols::instance().demangled(kernel);
  return name.empty() ? "an unnamed kernel" : name;
}

std::string text_of(dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

// AddressSanitizer's shadow is mapped where no object is: at all numbers from 2^31 to 2^44.
bool is_shadow([[maybe_unused]] const void* word) {
#if defined(__SANITIZE_ADDRESS__)
  size_t scale = 0, begin = 0;
  __asan_get_shadow_mapping(&scale, &begin);
  constexpr uintptr_t kLast = (uintptr_t{1} << 47) - 1;
  return reinterpret_cast<uintptr_t>(word) <= (kLast >> scale) + begin;
#else
  return false;
#endif
}

// Whether this word can be an address at all; counts, strides and numbers of other types are not.
bool is_mapped(const void* word) {
  if (is_shadow(word)) return false;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  unsigned char resident;
  return mincore(reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(word) & ~(page - 1)), 1, &resident) == 0;
}

bool valid(const LaunchRequest& r) {
  const dim3 g = r.grid, b = r.block;
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) return false;
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return false;
  if (b.x > 1024 || b.y > 1024 || b.z > 64) return false;
  if (!r.cluster || r.cluster > cluster_limit() || g.x % r.cluster) return false;
  if (r.cluster > 1 && max_active_clusters(static_cast<int>(r.cluster)) == 0) return false;
  return uint64_t{b.x} * b.y * b.z <= kMaxBlockThreads && r.shared_bytes <= kMaxSharedBytes;
}

void check_use(const LaunchRequest& r) {
  const std::string kernel = name_of(r.kernel);
  if (device_scopes == 0)
    throw std::runtime_error("cuda_sim: launch outside a DeviceScope of " + kernel);
  if (r.stream != current_stream())
    throw std::runtime_error("cuda_sim: launch not on the current stream of " + kernel);
  for (int i = 0; i < r.num_pointers; ++i) {
    const PointerArgument& p = r.pointers[i];
    if (p.pointer && !is_device_pointer(p.pointer) && (!p.in_struct || is_mapped(p.pointer)))
      throw std::runtime_error("cuda_sim: argument " + std::to_string(p.position) +
                               (p.in_struct ? " holds" : " is") +
                               " a pointer to host memory (or beyond a buffer) in the launch of " + kernel);
  }
}

// The state of a launch that has to end however its kernel ends.
struct Session {
  explicit Session(const void* kernel) {
    running().kernel = kernel;
    DeviceMemory::instance().open();
  }
  std::string close() {
    running().kernel = nullptr;
    open = false;
    return DeviceMemory::instance().close();
  }
  ~Session() {
    if (open) close();
  }
  bool open = true;
};

void run_blocks(const LaunchRequest& r) {
  const uint64_t blocks = uint64_t{r.grid.x} * r.grid.y * r.grid.z;
  if (blocks > 0xffffffffu) throw std::runtime_error("cuda_sim: a grid this large is not simulated");
  std::vector<uint32_t> permutation;
  order().fill(&permutation, static_cast<uint32_t>(blocks / r.cluster), 0);
  gridDim = r.grid;
  blockDim = r.block;
  for (uint32_t cluster : permutation) run_cluster(r, uint64_t{cluster} * r.cluster);
}

}  // namespace

Running& running() {
  static Running state;
  return state;
}

std::string Running::where() const {
  const auto text = [](uint3 v) { return text_of(dim3(v.x, v.y, v.z)); };
  return name_of(kernel) + ", block " + text(blockIdx) + ", thread " +
         text(Block::instance().current().thread) + ", order " + order().name();
}

Order& order() {
  static Order chosen = [] {
    Order o;
    const char* text = std::getenv("MASKED_LOSS_EXT_CUDA_SIM_ORDER");
    if (text && !Order::parse(text, &o))
      throw std::runtime_error("MASKED_LOSS_EXT_CUDA_SIM_ORDER must be ascending, descending or a number");
    return o;
  }();
  return chosen;
}

bool Order::parse(const char* text, Order* order) {
  const std::string s = text;
  if (s == "ascending") return *order = {kAscending, 0}, true;
  if (s == "descending") return *order = {kDescending, 0}, true;
  if (s.empty() || s.size() > 9 || s.find_first_not_of("0123456789") != std::string::npos) return false;
  return *order = {kRandom, static_cast<unsigned>(std::stoul(s))}, true;
}

std::string Order::name() const {
  if (kind == kRandom) return "random " + std::to_string(seed);
  return kind == kAscending ? "ascending" : "descending";
}

void Order::fill(std::vector<uint32_t>* permutation, uint32_t n, uint64_t salt) const {
  permutation->resize(n);
  for (uint32_t i = 0; i < n; ++i) (*permutation)[i] = kind == kDescending ? n - 1 - i : i;
  if (kind != kRandom) return;
  uint64_t state = (seed + 1) * 0x9e3779b97f4a7c15u ^ salt * 0xbf58476d1ce4e5b9u;
  for (uint32_t i = n; i > 1; --i) {
    state ^= state >> 30;
    state *= 0xbf58476d1ce4e5b9u;
    state ^= state >> 27;
    state += 0x9e3779b97f4a7c15u;
    std::swap((*permutation)[i - 1], (*permutation)[static_cast<uint32_t>((state >> 32) * i >> 32)]);
  }
}

std::string& launch_log() {
  static std::string log;
  return log;
}

void enter_device() { ++device_scopes; }
void leave_device() { --device_scopes; }
cudaStream_t current_stream() { return reinterpret_cast<cudaStream_t>(&stream_token); }

cudaError_t run_launch(const LaunchRequest& request) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  install_fault_handlers();
  check_use(request);
  if (!valid(request)) return cudaErrorInvalidConfiguration;
  launch_log() += name_of(request.kernel) + " grid " + text_of(request.grid) + " block " +
                  text_of(request.block) + " shared " + std::to_string(request.shared_bytes);
  if (request.cluster > 1) launch_log() += " cluster " + std::to_string(request.cluster);
  launch_log() += "\n";
  make_shared_memory(request.cluster, request.shared_bytes);
  Session session(request.kernel);
  run_blocks(request);
  const std::string damage = session.close();
  if (!damage.empty())
    throw std::runtime_error("cuda_sim: " + damage + " in " + name_of(request.kernel));
  return cudaSuccess;
}

void begin_library_call(const char* what) {
  launch_mutex.lock();
  install_fault_handlers();
  if (device_scopes == 0) {
    launch_mutex.unlock();
    throw std::runtime_error(std::string("cuda_sim: outside a DeviceScope: ") + what);
  }
  launch_log() += std::string(what) + "\n";
  DeviceMemory::instance().open();
}

void end_library_call(bool succeeded) {
  const std::string damage = DeviceMemory::instance().close();
  launch_mutex.unlock();
  if (succeeded && !damage.empty()) throw std::runtime_error("cuda_sim: " + damage + " by a library");
}

}  // namespace cuda_sim

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
  }
  return "unrecognized error code";
}
