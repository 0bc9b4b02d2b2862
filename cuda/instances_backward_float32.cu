#include "instances_backward.cuh"

namespace normkit::cuda {
template BackwardKernel backward_kernel_of<Uniform<float>>(Statistic, int);
}
