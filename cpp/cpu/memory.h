// Caches, and memory that a thread keeps from call to call.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <new>
#include <type_traits>
#include <utility>

#include "../norm_args.h"
#include "threads.h"

namespace normkit::cpu {

// Room for an object that few calls need.  std::optional writes zeros over its whole storage first:
// 30 ns for a cursor, of which a call has several.
template <class T>
class Room {
 public:
  Room() {}  // the memory stays as it is
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  template <class... Arguments>
  void emplace(Arguments&&... arguments) {
    static_assert(std::is_trivially_destructible_v<T>);
    made_ = new (memory_) T(std::forward<Arguments>(arguments)...);
  }
  explicit operator bool() const { return made_ != nullptr; }
  T& operator*() const { return *made_; }
  T* operator->() const { return made_; }

 private:
  alignas(T) unsigned char memory_[sizeof(T)];
  T* made_ = nullptr;
};

// Grows and stays: a call allocates nothing once its thread has seen the shape.  Large buffers are
// let go again, so that one huge row does not hold its size for the life of the thread.
class Scratch {
 public:
  ~Scratch() { free(); }
  float* reserve(int64_t floats) {
    if (floats > size_) {
      free();
      data_ = static_cast<float*>(::operator new(floats * sizeof(float), kAlignment));
      size_ = floats;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKept) free();
  }

 private:
  static constexpr int64_t kKept = 1 << 20;  // floats
  static constexpr std::align_val_t kAlignment{64};
  void free() {
    ::operator delete(data_, kAlignment);
    data_ = nullptr;
    size_ = 0;
  }
  float* data_ = nullptr;
  int64_t size_ = 0;
};

// Not sysconf(_SC_LEVEL3_CACHE_SIZE): glibc 2.36 says 320 MB for 32 MB on some AMD processors.
inline int64_t last_cache_bytes() {
  static const int64_t bytes = [] {
    long kilobytes = 0;
    if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
      if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
      std::fclose(file);
    }
    return kilobytes > 0 ? int64_t{kilobytes} << 10 : int64_t{32} << 20;
  }();
  return bytes;
}

// Whether stores around the caches pay, since little of so much stays there.  From the size of the
// last cache on, where they have won by 10 to 50 % (Zen 3 and Zen 5, 33.5 MB); at half of it they
// gain nothing on the one and lose on the other.  Of a larger cache 16 MB count for each thread,
// and no less than 32 in all: other cores have their share, and one core does not write there as
// fast as around it (Xeon of 260 MB: a copy and then a sum of what it wrote take, of the time
// through the caches, 1.12, 0.95 and 0.73 on two threads at 16, 32 and 64 MB, and on one 1.04 and
// 0.79 at 16 and 32 MB).
inline bool fills_last_cache(int64_t traffic) {
  const int64_t last_cache = last_cache_bytes();
  return traffic >= std::min<int64_t>(last_cache, 32 << 20) &&
         traffic >= std::min(last_cache, int64_t{max_threads()} << 24);
}

// Other threads may read what was written around the caches only after this, once at the end of a
// thread's work: after each block it would wait for the memory every time (Xeon, 2048x4096: 2 to
// 7 % of the call).
inline void end_of_stream() {
#if defined(__x86_64__) || defined(_M_X64)
  asm volatile("sfence" ::: "memory");
#endif
}

// Whether every row is dense, and begins and ends with a cache line, as stores around the caches
// need it.
inline bool on_cache_lines(const RowsOf& rows, int outer_dims, int64_t n) {
  bool all = !rows.has_strided_columns() && reinterpret_cast<uintptr_t>(rows.data) % 64 == 0 &&
             n * item_size(rows.dtype) % 64 == 0;
  for (int d = 0; d < outer_dims; ++d) all = all && rows.stride[d] % 64 == 0;
  return all;
}

}  // namespace normkit::cpu
