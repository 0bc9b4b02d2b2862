// What the emulation, or a sanitizer that looks at the kernels in it, has to end the process for.
#pragma once
#include "../../cuda/portable.cuh"

// Outside of the namespace, or the compiler sees that nobody reads it.
inline float global_value[128];

namespace {

using namespace normkit::cuda;

constexpr unsigned kAll = 0xffffffffu;

LaunchConfig shape(dim3 grid, dim3 block, unsigned cluster = 1, unsigned dynamic_smem = 0) {
  return {grid, block, dynamic_smem, cluster, true, nullptr};
}

__device__ unsigned global_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

enum class When { kAlways, kAsan, kTsan };

struct Fault {
  const char* name;
  When when;
  const char* message;
  void (*run)();
};

template <class F>
__global__ void call(F f) {
  f();
}

template <class F>
void one_block(F f, unsigned threads = 64) {
  NORMKIT_LAUNCH(call<F>, shape(1, threads), f);
}
template <class F>
void one_cluster(F f, unsigned threads = 32) {
  NORMKIT_LAUNCH(call<F>, shape(4, threads, 4), f);
}

void start_cluster() {
  cluster_arrive();
  cluster_wait();
}

const Fault kFaults[] = {
    {"divergent_barrier", When::kAlways, "at different __syncthreads()",
     [] {
       one_block([] {
         if (threadIdx.x < 32)
           __syncthreads();
         else
           __syncthreads();
       });
     }},
    {"barrier_after_end", When::kAlways, "__syncthreads()",
     [] {
       one_block([] {
         if (threadIdx.x != 7) __syncthreads();
       });
     }},
    {"deadlock", When::kAlways, "deadlock",
     [] {
       one_block([] {
         if (threadIdx.x < 40)
           __syncthreads();
         else
           __shfl_xor_sync(kAll, 0, 1);
       });
     }},
    {"shuffle_without_a_lane", When::kAlways, "deadlock",
     [] {
       one_block([] {
         if (threadIdx.x != 5) __shfl_xor_sync(kAll, 0, 1);
       });
     }},
    {"shuffle_with_different_masks", When::kAlways, "deadlock",
     [] { one_block([] { __shfl_xor_sync(threadIdx.x % 2 ? kAll : 0x55555555u, 0, 2); }); }},
    {"shuffle_outside_its_mask", When::kAlways, "not in its own mask",
     [] { one_block([] { __shfl_xor_sync(0xffffu, 0, 1); }); }},
    {"shuffle_from_outside_the_mask", When::kAlways, "not in the mask",
     [] { one_block([] { __shfl_xor_sync(threadIdx.x % 32 < 8 ? 0xffu : ~0xffu, 0, 8); }); }},
    {"shuffle_from_a_lane_that_is_not_there", When::kAlways, "not in the mask",
     [] { one_block([] { __shfl_xor_sync(kAll, 0, 8); }, 40); }},
    {"shuffles_at_different_places", When::kAlways, "at different places",
     [] {
       one_block([] {
         if (threadIdx.x % 2)
           __shfl_xor_sync(kAll, 0, 1);
         else
           __shfl_xor_sync(kAll, 0, 1);
       });
     }},
    {"arrive_twice", When::kAlways, "twice",
     [] { one_cluster([] { cluster_arrive(), cluster_arrive(); }); }},
    {"wait_without_arrive", When::kAlways, "without cluster_arrive()",
     [] { one_cluster([] { cluster_wait(); }); }},
    {"end_before_wait", When::kAlways, "ends between",
     [] { one_cluster([] { cluster_arrive(); }); }},
    {"cluster_barrier_without_a_block", When::kAlways, "cluster_",
     [] {
       one_cluster([] {
         if (cluster_rank() != 2) start_cluster();
       });
     }},
    {"rank_out_of_range", When::kAlways, "does not have",
     [] {
       one_cluster([] {
         NORMKIT_SHARED(int, value);
         start_cluster();
         cluster_peer(&value, 4);
       });
     }},
    {"peer_before_it_has_started", When::kAlways, "before it is known",
     [] {
       one_cluster([] {
         NORMKIT_SHARED(int, value);
         cluster_arrive();
         *cluster_peer(&value, cluster_rank() ^ 1) = 1;
         cluster_wait();
       });
     }},
    {"peer_of_no_shared_memory", When::kAlways, "no shared memory",
     [] {
       one_cluster([] {
         int value = 0;
         start_cluster();
         cluster_peer(&value, 0);
       });
     }},
    {"end_while_a_peer_reads", When::kAlways, "block",
     [] {
       one_cluster([] {
         NORMKIT_SHARED(int, value);
         if (threadIdx.x == 0) value = 1;
         start_cluster();
         global_value[blockIdx.x] = float(*cluster_peer(&value, cluster_rank() ^ 1));
       });
     }},
    {"dynamic_without", When::kAlways, "in a launch without",
     [] {
       one_block([] {
         NORMKIT_DYNAMIC_SHARED(float, value);
         value[0] = 1;
       });
     }},
    {"too_much_shared_memory", When::kAlways, "48 KiB",
     [] {
       one_block([] {
         NORMKIT_SHARED(char[48 * 1024], value);
         NORMKIT_SHARED(char, more);
         value[0] = more;
       });
     }},
    {"past_the_end_of_shared_memory", When::kAsan, "heap-buffer-overflow",
     [] {
       one_block([] {
         NORMKIT_SHARED(float[32], value);
         float* to = value;  // UBSan knows the array's bounds
         to[threadIdx.x] = 1;
       });
     }},
    {"memory_of_a_block_that_has_ended", When::kAsan, "use-after-poison",
     [] {
       for (unsigned seed = 0; seed < 50; ++seed) {
         emu::seed(seed);
         one_cluster([] {
           NORMKIT_SHARED(float, value);
           value = 1;
           start_cluster();
           float* peer = cluster_peer(&value, cluster_rank() ^ 1);
           start_cluster();
           global_value[blockIdx.x] = *peer;
         });
       }
     }},
    {"misaligned_load", When::kAsan, "misaligned address",
     [] { one_block([] { load_if(global_value + threadIdx.x, true); }, 32); }},
    {"race_without_barrier", When::kTsan, "data race",
     [] {
       one_block([] {
         NORMKIT_SHARED(float[64], value);
         value[threadIdx.x] = 1;
         global_value[threadIdx.x] = value[threadIdx.x ^ 1];
       });
     }},
    {"race_at_reuse", When::kTsan, "data race",
     [] {
       one_block([] {
         NORMKIT_SHARED(float[64], value);
         for (int i = 0; i < 2; ++i) {
           value[threadIdx.x] = 1;
           __syncthreads();
           global_value[threadIdx.x] = value[threadIdx.x ^ 33];
         }
       });
     }},
    {"race_across_a_shuffle", When::kTsan, "data race",
     [] {
       one_block([] {
         NORMKIT_SHARED(float[64], value);
         value[threadIdx.x] = 1;
         __shfl_xor_sync(kAll, 0, 1);
         global_value[threadIdx.x] = value[threadIdx.x ^ 1];
       });
     }},
    {"race_in_a_cluster", When::kTsan, "data race",
     [] {
       one_cluster([] {
         NORMKIT_SHARED(float[32], value);
         start_cluster();
         *cluster_peer(&value[threadIdx.x], cluster_rank() ^ 1) = 1;
         __syncthreads();
         global_value[threadIdx.x] = value[threadIdx.x];
         start_cluster();
       });
     }},
    {"race_after_a_relaxed_arrival", When::kTsan, "data race",
     [] {
       one_cluster([] {
         NORMKIT_SHARED(float[32], value);
         value[threadIdx.x] = 1;
         cluster_arrive_relaxed();
         cluster_wait();
         global_value[global_index()] = *cluster_peer(&value[threadIdx.x], cluster_rank() ^ 1);
         start_cluster();
       });
     }},
    {"race_between_blocks", When::kTsan, "data race",
     [] {
       const auto kernel = [] {
         __syncthreads();
         global_value[threadIdx.x] = 1;
         __syncthreads();
       };
       NORMKIT_LAUNCH(call<decltype(kernel)>, shape(2, 64), kernel);
     }},
};

}  // namespace
