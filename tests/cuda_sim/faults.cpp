// SPDX-License-Identifier: BSD-3-Clause
// Turns a fault in simulated device memory into a sentence on stderr, then aborts. Other faults go to the
// handler that was there before.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device_memory.h"
#include "scheduler.h"
#include "symbols.h"

namespace cuda_sim {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
struct sigaction previous[NSIG];
volatile sig_atomic_t handling = 0;

void say(const char* text) {
  if (write(STDERR_FILENO, text, std::strlen(text)) < 0) return;
}

const void* program_counter(const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
  (void)context;
  return nullptr;
#endif
}

const char* access_kind(const void* context) {
#if defined(__x86_64__)
  const auto* u = static_cast<const ucontext_t*>(context);
  return u->uc_mcontext.gregs[REG_ERR] & 2 ? "write" : "read";
#else
  (void)context;
  return "access";
#endif
}

// The line of the fault, by binutils; not safe in a signal handler, hence last and against the clock.
void say_source_line(const void* pc) {
  const Symbols& symbols = Symbols::instance();
  if (!symbols.holds_code(pc)) return;
  alarm(20);
  char command[4608];
  snprintf(command, sizeof command, "addr2line -Cfpie '%s' 0x%zx 2>/dev/null", symbols.path().c_str(),
           symbols.offset(pc));
  FILE* pipe = popen(command, "r");
  if (!pipe) return;
  char line[1024];
  while (fgets(line, sizeof line, pipe)) {
    say("  ");
    say(line);
  }
  pclose(pipe);
}

// What happened, or false where it is not the simulator's business.
bool describe(int signal, const siginfo_t* info, const void* context, char* text, size_t size) {
  const bool memory_fault = signal == SIGSEGV || signal == SIGBUS;
  const bool in_kernel = running().kernel != nullptr;
  if (memory_fault && DeviceMemory::instance().contains(info->si_addr)) {
    char place[256];
    DeviceMemory::instance().describe(info->si_addr, place, sizeof place);
    snprintf(text, size, "%s: %s of %s", in_kernel ? "out of bounds" : "host access outside a launch",
             access_kind(context), place);
    return true;
  }
  if (!in_kernel) return false;
  if (memory_fault && Block::instance().on_stack_guard(info->si_addr))
    snprintf(text, size, "stack overflow");
  else if (memory_fault)
    snprintf(text, size, "out of bounds: %s of address %p, which is not device memory",
             access_kind(context), info->si_addr);
  else if (signal == SIGFPE)
    snprintf(text, size, "integer division by zero");
  else
    snprintf(text, size,
             "undefined behaviour: an array index out of bounds, a misaligned vector access, or an overflow"
             " of a signed integer or shift");
  return true;
}

void handle(int signal, siginfo_t* info, void* context) {
  char text[1024];
  if (handling || !describe(signal, info, context, text, sizeof text)) {
    sigaction(signal, &previous[signal], nullptr);  // happens again under the previous handler
    return;
  }
  handling = 1;
  say("\ncuda_sim: ");
  say(text);
  if (running().kernel) {
    say(" in ");
    say(running().where().c_str());
  }
  say("\n");
  say_source_line(program_counter(context));
  abort();
}

// Not in the function that it is for: there it would pass for a kernel's shared memory.
thread_local bool has_alternate_stack = false;

// Kernels have small stacks, and the one that overflowed cannot hold the handler.
void use_alternate_stack() {
  if (has_alternate_stack) return;
  has_alternate_stack = true;
  constexpr size_t kBytes = 256 * 1024;
  stack_t stack{};
  stack.ss_sp = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  stack.ss_size = kBytes;
  if (stack.ss_sp != MAP_FAILED) sigaltstack(&stack, nullptr);
}

}  // namespace

void install_fault_handlers() {
  use_alternate_stack();
  static bool done = false;
  if (done) return;
  done = true;
  Symbols::instance();  // read now: the handler should not open files
  struct sigaction action {};
  action.sa_sigaction = &handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&action.sa_mask);
  for (int signal : kSignals) sigaction(signal, &action, &previous[signal]);
}

}  // namespace cuda_sim
