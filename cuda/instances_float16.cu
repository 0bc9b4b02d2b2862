#include "instances.cuh"

namespace normkit::cuda {
template Kernel kernel_of<Half>(Statistic, bool, const Plan&);
}
