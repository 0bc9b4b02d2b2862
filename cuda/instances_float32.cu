#include "instances.cuh"

namespace normkit::cuda {
template Kernel kernel_of<float>(Statistic, bool, const Plan&);
}
