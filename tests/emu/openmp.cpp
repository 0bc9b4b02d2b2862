// An OpenMP runtime as LLVM's, of which the CPU kernels find what they call: for machines that have
// none.  Each parallel region has threads of its own.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

thread_local int my_number = 0, my_team = 1, wanted = 0;
thread_local bool in_region = false;

using Microtask = void (*)(int32_t*, int32_t*, void*);

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int omp_get_max_threads() { return 3; }
__attribute__((visibility("default"))) int omp_in_parallel() { return in_region; }
__attribute__((visibility("default"))) int omp_get_thread_num() { return my_number; }
__attribute__((visibility("default"))) int omp_get_num_threads() { return my_team; }

__attribute__((visibility("default"))) int32_t __kmpc_global_thread_num(void*) { return 7; }
__attribute__((visibility("default"))) void __kmpc_push_num_threads(void*, int32_t thread,
                                                                    int32_t threads) {
  if (thread == 7) wanted = threads;
}
__attribute__((visibility("default"))) void __kmpc_fork_call(void*, int32_t, Microtask task,
                                                             void* context) {
  const int team = wanted < 3 ? wanted : 3;  // fewer than may be asked for
  std::vector<std::thread> threads;
  for (int number = 0; number < team; ++number)
    threads.emplace_back([=] {
      my_number = number, my_team = team, in_region = true;
      int32_t id = number;
      task(&id, &id, context);
    });
  for (std::thread& thread : threads) thread.join();
}

}  // extern "C"
