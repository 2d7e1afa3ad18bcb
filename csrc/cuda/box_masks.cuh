// The box context masks.
#pragma once

#include "blocks.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace gkd_d2 {
namespace {

// A box on the feature grid, relative to the first cell of its context.
template <typename acc_t>
struct ContextBox {
  int top, bottom, left, right;                          // the context, clipped to the map
  int inner_top, inner_bottom, inner_left, inner_right;  // the box itself, clipped to the map
  acc_t start_x, start_y, extent_x, extent_y, scale;

  __device__ __forceinline__ acc_t value(int y, int x) const {
    if (y < top || y >= bottom || x < left || x >= right) return 0;
    if (y >= inner_top && y < inner_bottom && x >= inner_left && x < inner_right) return scale;
    const acc_t dx = (start_x + static_cast<acc_t>(x - left)) / extent_x;
    const acc_t dy = (start_y + static_cast<acc_t>(y - top)) / extent_y;
    return scale * exp(-dx * dx / 2) * exp(-dy * dy / 2);
  }
};

// A block fills a chunk of the cells of one image's mask. The boxes whose context meets the chunk's rows are gathered
// first, in their order.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    box_masks_kernel(const __grid_constant__ ForwardParams<acc_t> params, const __grid_constant__ BoxOffsets offsets) {
  __shared__ ContextBox<acc_t> gathered[kThreads];
  __shared__ int counts[kWarps];
  const Place place = locate(params.chunk_blocks, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const int chunks = divide_up(level.cells, kChunkCells);
  const int image = place.block / chunks, first_cell = place.block % chunks * kChunkCells;
  if (image < offsets.first_image || image >= offsets.first_image + offsets.num_images) return;
  const int last_cell = min(level.cells, first_cell + kChunkCells) - 1;
  const int first_row = first_cell / level.width, last_row = last_cell / level.width;
  const int first_box = offsets.offset[image - offsets.first_image];
  const int num_boxes = offsets.offset[image - offsets.first_image + 1] - first_box;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  constexpr int kCells = kChunkCells / kThreads;
  acc_t mask[kCells] = {};
  for (int start = 0; start < num_boxes; start += kThreads) {
    ContextBox<acc_t> box{};
    bool meets = false;
    const int index = start + static_cast<int>(threadIdx.x);
    const double* xyxy = params.boxes + 4 * static_cast<int64_t>(first_box + index);
    if (index < num_boxes && GridBox::usable(xyxy)) {
      const GridBox grid(xyxy, level.height, level.width, params.image_height, params.image_width);
      box.top = static_cast<int>(grid.y.context_begin(level.height));
      box.bottom = static_cast<int>(grid.y.context_end(level.height));
      box.left = static_cast<int>(grid.x.context_begin(level.width));
      box.right = static_cast<int>(grid.x.context_end(level.width));
      box.inner_top = static_cast<int>(grid.y.begin(level.height));
      box.inner_bottom = static_cast<int>(grid.y.end(level.height));
      box.inner_left = static_cast<int>(grid.x.begin(level.width));
      box.inner_right = static_cast<int>(grid.x.end(level.width));
      box.start_x = static_cast<acc_t>(box.left + 0.5 - grid.x.centre());
      box.start_y = static_cast<acc_t>(box.top + 0.5 - grid.y.centre());
      box.extent_x = static_cast<acc_t>(grid.x.extent());
      box.extent_y = static_cast<acc_t>(grid.y.extent());
      box.scale = static_cast<acc_t>(grid.scale());
      meets = box.top <= last_row && box.bottom > first_row && box.left < box.right;
    }
    const unsigned votes = __ballot_sync(kAllLanes, meets);
    if (lane == 0) counts[warp] = __popc(votes);
    __syncthreads();
    int before = __popc(votes & ((1u << lane) - 1u)), total = 0;
    for (int other = 0; other < kWarps; ++other) {
      before += other < warp ? counts[other] : 0;
      total += counts[other];
    }
    if (meets) gathered[before] = box;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kCells; ++k) {
      const int cell = first_cell + k * kThreads + static_cast<int>(threadIdx.x);
      const int y = cell / level.width, x = cell % level.width;
      for (int i = 0; i < total; ++i) mask[k] = Larger{}(mask[k], gathered[i].value(y, x));
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kCells; ++k) {
    const int cell = first_cell + k * kThreads + static_cast<int>(threadIdx.x);
    if (cell < level.cells) level.box_mask[static_cast<int64_t>(image) * level.cells + cell] = mask[k];
  }
}

}  // namespace

template <typename acc_t>
cudaError_t launch_box_masks(const ForwardParams<acc_t>& params, const BoxOffsets& offsets, cudaStream_t stream) {
  box_masks_kernel<acc_t><<<params.chunk_blocks.first[params.num_levels], kThreads, 0, stream>>>(params, offsets);
  return cudaGetLastError();
}

}  // namespace gkd_d2
