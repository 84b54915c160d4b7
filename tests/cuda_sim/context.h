// SPDX-License-Identifier: BSD-3-Clause
// Switching between the stacks of fibers: twenty instructions on x86-64, ucontext elsewhere (the same, with
// a system call per switch). -DCUDA_SIM_UCONTEXT takes ucontext on x86-64 as well.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(CUDA_SIM_UCONTEXT)
#include <ucontext.h>
#else
// The ABI's callee-saved registers lie on the stack that is left; *save receives its stack pointer.
extern "C" void cuda_sim_switch(void** save, void* load);
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_sim {

// A fiber's stack is used again, and who was on it may not have returned from its functions.
inline void forget_frames([[maybe_unused]] char* stack, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, bytes);
#endif
}

class Context {
 public:
#if !defined(__x86_64__) || defined(CUDA_SIM_UCONTEXT)
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    forget_frames(stack, bytes);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context_, &other.context_); }

 private:
  ucontext_t context_;
#else
  // stack + bytes must be 16-byte aligned; entry must not return.
  void prepare(char* stack, size_t bytes, void (*entry)()) {
    forget_frames(stack, bytes);
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // where entry's return address would be: keeps the alignment the ABI asks for
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer_ = top;
  }
  void switch_to(Context& other) { cuda_sim_switch(&stack_pointer_, other.stack_pointer_); }

 private:
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace cuda_sim
