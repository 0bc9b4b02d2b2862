// Fibers, and what the sanitizers are told of them.
//
// This is compiled without sanitizers.  It tells ASan and TSan of every switch, so that the kernels
// are what they look at.  For TSan each CUDA thread is a thread, and only what orders memory on a
// device orders it: __syncthreads, __syncwarp and the cluster's barrier do, shuffles and the end of
// a block do not.  Two rules keep the emulation itself out of its sight: memory is allocated in the
// name of the thread that launches, and nothing here calls what TSan intercepts (memset, memcpy)
// for memory of a kernel.
#pragma once
#include <sys/mman.h>
#if !defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT
#endif
#ifdef EMU_UCONTEXT
#include <ucontext.h>
#endif

#include <cstddef>

extern "C" {
#define EMU_WEAK __attribute__((weak))
EMU_WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, std::size_t size);
EMU_WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, std::size_t* size);
EMU_WEAK void __asan_poison_memory_region(const volatile void* address, std::size_t size);
EMU_WEAK void* __tsan_get_current_fiber(void);
EMU_WEAK void* __tsan_create_fiber(unsigned flags);
EMU_WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
EMU_WEAK void __tsan_acquire(void* address);
EMU_WEAK void __tsan_release(void* address);
}

namespace emu {

constexpr std::size_t kStack = 256 * 1024, kPage = 4096;

// Where TSan sees an order: an address, eight bytes apart from others.
struct Order {
  alignas(8) char at[8];
  void acquire() {
    if (__tsan_acquire) __tsan_acquire(at);
  }
  void release() {
    if (__tsan_release) __tsan_release(at);
  }
};

struct Context {
#ifdef EMU_UCONTEXT
  ucontext_t registers{};
#else
  void* stack_pointer = nullptr;
#endif
  const char* stack = nullptr;
  std::size_t stack_size = 0;
  void* asan = nullptr;
  void* tsan = nullptr;
};

#ifndef EMU_UCONTEXT
extern "C" void emu_switch(void** save, void* load);
// What a function has to leave as it was, the return address included, is on the stack.
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#endif

// To be called first by what a switch has led to.
inline void switched(Context& from, Context& to) {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* bottom = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(to.asan, &bottom, &size);
  from.stack = static_cast<const char*>(bottom);
  from.stack_size = size;
}

// From here on memory is allocated, and read and written, by this one.
inline void pretend(const Context& context) {
  constexpr unsigned kOrdersNothing = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(context.tsan, kOrdersNothing);
}

inline void switch_context(Context& from, Context& to) {
  pretend(to);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_size);
#ifdef EMU_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  emu_switch(&from.stack_pointer, to.stack_pointer);
#endif
}

// False if there is no memory for it.
inline bool start(Context& c, void (*entry)()) {
  void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  // The last page catches an overflow.
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE)) return false;
  char* stack = static_cast<char*>(memory);
  c.stack = stack;
  c.stack_size = kStack;
  if (__tsan_create_fiber) c.tsan = __tsan_create_fiber(0);
#ifdef EMU_UCONTEXT
  getcontext(&c.registers);
  c.registers.uc_stack.ss_sp = stack + kPage;
  c.registers.uc_stack.ss_size = kStack - kPage;
  makecontext(&c.registers, entry, 0);
#else
  // It begins as if called: the stack is 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStack) - 1;
  *--top = reinterpret_cast<void*>(entry);
  c.stack_pointer = top - 6;
#endif
  return true;
}

// memset, which sanitizers do not see.
inline void fill(char* at, std::size_t bytes) {
#ifdef __x86_64__
  asm volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(0xFF) : "memory");
#else
  for (volatile char* p = at; bytes; --bytes) *p++ = static_cast<char>(0xFF);
#endif
}

}  // namespace emu
