// The four losses, from what the chunks of cells have left.
#include "blocks.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace gkd_d2 {
namespace {

// One block adds up the losses over parts, images and levels.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) losses_kernel(const __grid_constant__ ForwardParams<acc_t> params) {
  const Terms& terms = params.terms;
  acc_t losses[4] = {};
  for (int l = 0; l < params.num_levels; ++l) {
    const LevelData<acc_t>& level = params.levels[l];
    const int parts = params.images * divide_up(level.cells, kChunkCells);
    acc_t first[1] = {0}, second[kSecondSums] = {};
    for (int part = threadIdx.x; part < parts; part += kThreads) {
      first[0] += level.first_sums[static_cast<int64_t>(part) * kFirstSums + kMapDistance];
      for (int k = 0; k < kSecondSums; ++k)
        second[k] += level.second_sums[static_cast<int64_t>(part) * kSecondSums + k];
    }
    if (terms.has_attention) {
      for (int image = threadIdx.x; image < params.images; image += kThreads) {
        second[kAttentionDistance] += level.channel_distance[image];
      }
    }
    reduce_block(first, Plus{});
    reduce_block(second, Plus{});
    losses[0] += level.gradient_weight * first[0];
    losses[1] += params.box_weight * second[kBoxDistance];
    losses[2] += params.attention_weight * second[kAttentionDistance];
    losses[3] += level.image_weight * second[kImageDistance];
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 4; ++k) params.losses[k] = losses[k];
}

}  // namespace

template <typename acc_t>
cudaError_t launch_losses(const ForwardParams<acc_t>& params, cudaStream_t stream) {
  losses_kernel<acc_t><<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

#define GKD_INSTANTIATE(acc_t) template cudaError_t launch_losses<acc_t>(const ForwardParams<acc_t>&, cudaStream_t);
GKD_INSTANTIATE(float)
GKD_INSTANTIATE(double)
#undef GKD_INSTANTIATE

}  // namespace gkd_d2
