#include "instances.cuh"

namespace normkit::cuda {
template Kernel kernel_of<BFloat16>(Statistic, bool, const Plan&);
}
