// Backward: the gradient with respect to S.
#pragma once

#include "blocks.cuh"
#include "kernels.h"
#include "tile.cuh"

namespace gkd_d2 {
namespace {

// The factors of the gradient with respect to S, of the cells or of the channels of a tile.
template <typename acc_t>
struct FactorSource {
  const Terms& terms;
  const LevelData<acc_t>& level;
  acc_t map, box, image, attention;

  __device__ __forceinline__ FactorSource(const BackwardParams<acc_t>& params, const LevelData<acc_t>& level_data)
      : terms(params.terms),
        level(level_data),
        map(params.loss_gradients[0]),
        box(2 * params.box_weight * params.loss_gradients[1]),
        image(2 * level.image_weight * params.loss_gradients[3]),
        attention(params.loss_gradients[2]) {}

  template <typename tile_t>
  __device__ __forceinline__ void of_cells(const tile_t& tile, int64_t first, int count,
                                           GradientFactors<acc_t> (&factors)[tile_t::kSize]) const {
    acc_t values[tile_t::kSize];
    if (terms.imitates()) {
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].imitation = image;
      if (terms.has_box) {
        tile.gather(level.box_mask + first, count, values);
#pragma unroll
        for (int k = 0; k < tile_t::kSize; ++k) factors[k].imitation += box * values[k];
      }
      tile.gather(level.cell_weight + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].imitation *= values[k];
    }
    if (terms.has_gradient) {
      tile.gather(level.gradient_map + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].map = map * values[k];
    }
    if (terms.has_attention) {
      tile.gather(level.cell_attention + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].attention = attention * values[k];
    }
  }

  template <typename tile_t>
  __device__ __forceinline__ void of_channels(const tile_t& tile, int64_t first, int count,
                                              GradientFactors<acc_t> (&factors)[tile_t::kSize]) const {
    acc_t values[tile_t::kSize];
    if (terms.imitates()) {
      tile.gather(level.channel_weight + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].imitation = values[k];
    }
    if (terms.has_gradient) {
      tile.gather(level.alpha + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].map = values[k];
    }
    if (terms.has_attention) {
      tile.gather(level.channel_attention + first, count, values);
#pragma unroll
      for (int k = 0; k < tile_t::kSize; ++k) factors[k].attention = attention * values[k];
    }
  }
};

// The gradient of a tile of cells of a group of channels, or of a tile of cells of all channels of channels_last
// features. A lane keeps the factors of its own elements along a row of memory, whose other factor its lanes share.
template <typename scalar_t, bool kVectors>
__device__ __forceinline__ void write_gradient(const BackwardParams<acc_type<scalar_t>>& params,
                                               const LevelData<acc_type<scalar_t>>& level, int block) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = kVectorSize<scalar_t>, kAhead = Tile<scalar_t, kVectors>::kPairsAhead;
  const Terms& terms = params.terms;
  const bool imitates = terms.imitates();
  const FactorSource<acc_t> source(params, level);
  const int tiles = divide_up(level.cells, kTile<scalar_t>);
  const int groups = level.channels_last[kStudent] ? 1 : divide_up(level.channels, kGradientChannels);
  const int first_cell = block % tiles * kTile<scalar_t>;
  const int group = block / tiles % groups, image = block / tiles / groups;
  const int count = min(kTile<scalar_t>, level.cells - first_cell);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channel_offset = static_cast<int64_t>(image) * level.channels;
  const int64_t cell_offset = static_cast<int64_t>(image) * level.cells + first_cell;
  const int64_t image_offset = channel_offset * level.cells;
  const auto* student = static_cast<const scalar_t*>(level.inputs[kStudent]) + image_offset;
  const auto* teacher = static_cast<const scalar_t*>(level.inputs[kTeacher]) + image_offset;
  auto* gradient = static_cast<scalar_t*>(level.gradient) + image_offset;
  const Tile<scalar_t, kVectors> tile{lane};
  GradientFactors<acc_t> of_lane[kSize] = {};
  // Writes `count` elements of the rows first, first + kWarps and so on, which start at start_of(row).
  const auto write = [&](int count, int first, int end, const auto& start_of, const auto& factors_of) {
    for (int row = first; row < end; row += kAhead * kWarps) {
      // As fetch_pairs; with a count of its own for T, that would spill registers on some architectures.
      Pack<scalar_t> S[kAhead], T[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int limit = row + j * kWarps < end ? count : 0;
        const int64_t start = start_of(row + j * kWarps);
        S[j] = tile.fetch(student + start, limit);
        T[j] = tile.fetch(teacher + start, imitates ? limit : 0);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (row + j * kWarps >= end) break;
        GradientFactors<acc_t> of_row[1] = {};
        factors_of(row + j * kWarps, of_row);
        acc_t s[kSize], t[kSize];
        widen(S[j], s);
        widen(T[j], t);
#pragma unroll
        for (int k = 0; k < kSize; ++k) s[k] = feature_gradient(terms, s[k], t[k], of_lane[k], of_row[0]);
        tile.store(gradient + start_of(row + j * kWarps), count, s);
      }
    }
  };
  if (!level.channels_last[kStudent]) {
    source.of_cells(tile, cell_offset, count, of_lane);
    write(
        count, group * kGradientChannels + warp, min(level.channels, (group + 1) * kGradientChannels),
        [&](int c) { return static_cast<int64_t>(c) * level.cells + first_cell; },
        [&](int c, auto& factors) { source.of_channels(Shared<acc_t>{}, channel_offset + c, 1, factors); });
    return;
  }
  for (int c = 0; c < level.channels; c += kTile<scalar_t>) {
    source.of_channels(tile, channel_offset + c, level.channels - c, of_lane);
    write(
        level.channels - c, warp, count,
        [&](int cell) { return static_cast<int64_t>(first_cell + cell) * level.channels + c; },
        [&](int cell, auto& factors) { source.of_cells(Shared<acc_t>{}, cell_offset + cell, 1, factors); });
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(const __grid_constant__ BackwardParams<acc_type<scalar_t>> params) {
  const Place place = locate(params.blocks, params.num_levels);
  const auto& level = params.levels[place.level];
  if (level.vectors[kStudent] && level.vectors[kTeacher]) {
    write_gradient<scalar_t, true>(params, level, place.block);
  } else {
    write_gradient<scalar_t, false>(params, level, place.block);
  }
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_gradient(const BackwardParams<acc_type<scalar_t>>& params, cudaStream_t stream) {
  gradient_kernel<scalar_t><<<params.blocks.first[params.num_levels], kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace gkd_d2
