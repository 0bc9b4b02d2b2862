// Included ahead of cuda/launch*.cu by a host compiler: what they would launch is printed instead.
#pragma once
#include "portable.cuh"

namespace codegen {

void print_launch(const void* kernel, const normkit::cuda::LaunchConfig& config,
                  const void* arguments, std::size_t bytes);

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const normkit::cuda::LaunchConfig& config,
                   const Arguments& arguments) {
  print_launch(reinterpret_cast<const void*>(kernel), config, &arguments, sizeof arguments);
  return nullptr;
}

}  // namespace codegen

#undef NORMKIT_LAUNCH
#define NORMKIT_LAUNCH(kernel, ...) ::codegen::launch(kernel, __VA_ARGS__)
