// The CUDA kernels of all stages, instantiated in one unit: a unit for each stage would read CUDA's headers again for
// every architecture.
#include "box_masks.cuh"
#include "cell_sums.cuh"
#include "channel_sums.cuh"
#include "finish.cuh"
#include "gradient.cuh"
#include "kernels.h"

namespace gkd_d2 {

#define GKD_INSTANTIATE(scalar_t)                                                                             \
  template cudaError_t launch_channel_sums<scalar_t>(const ForwardParams<acc_type<scalar_t>>&, cudaStream_t); \
  template cudaError_t launch_cell_sums<scalar_t>(const ForwardParams<acc_type<scalar_t>>&, cudaStream_t);    \
  template cudaError_t launch_gradient<scalar_t>(const BackwardParams<acc_type<scalar_t>>&, cudaStream_t);
GKD_INSTANTIATE(float)
GKD_INSTANTIATE(double)
GKD_INSTANTIATE(BFloat16)
GKD_INSTANTIATE(Float16)
#undef GKD_INSTANTIATE

#define GKD_INSTANTIATE(acc_t)                                                                                \
  template cudaError_t launch_channel_weights<acc_t>(const ForwardParams<acc_t>&, cudaStream_t);              \
  template cudaError_t launch_box_masks<acc_t>(const ForwardParams<acc_t>&, const BoxOffsets&, cudaStream_t); \
  template cudaError_t launch_finish<acc_t>(const ForwardParams<acc_t>&, int, cudaStream_t);
GKD_INSTANTIATE(float)
GKD_INSTANTIATE(double)
#undef GKD_INSTANTIATE

}  // namespace gkd_d2
