// Everything that is summed over channels, in one reading of S and T, and the extremes of the maps.
#pragma once

#include "blocks.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace gkd_d2 {
namespace {

// The alphas and u of the channels of a tile, as far as the losses need them.
template <typename acc_t, typename tile_t>
struct ChannelFactors {
  acc_t student_alpha[tile_t::kSize] = {}, teacher_alpha[tile_t::kSize] = {}, weight[tile_t::kSize] = {};

  // Of `count` channels of an image from `first` on.
  __device__ __forceinline__ void gather(const tile_t& tile, const Terms& terms, const LevelData<acc_t>& level,
                                         int64_t first, int count) {
    if (terms.needs_student_map()) tile.gather(level.channel_means[kStudentGrad] + first, count, student_alpha);
    if (terms.needs_teacher_map()) tile.gather(level.channel_means[kTeacherGrad] + first, count, teacher_alpha);
    if (terms.imitates()) tile.gather(level.channel_weight + first, count, weight);
  }

  __device__ __forceinline__ void add(int k, acc_t student, acc_t teacher, acc_t (&sums)[kCellSums]) const {
    const acc_t difference = student - teacher;
    sums[kStudentMap] += student_alpha[k] * student;
    sums[kTeacherMap] += teacher_alpha[k] * teacher;
    sums[kDistance] += weight[k] * difference * difference;
    sums[kStudentMagnitude] += absolute(student);
    sums[kTeacherMagnitude] += absolute(teacher);
  }
};

// The sums over channels of the cell first_cell + threadIdx.x of an image, for `count` cells from first_cell on; those
// that are not wanted stay 0.
template <typename scalar_t, bool kVectors>
__device__ __forceinline__ void sum_cells(const Terms& terms, const LevelData<acc_type<scalar_t>>& level, int image,
                                          int first_cell, int count,
                                          acc_type<scalar_t> (&tile_sums)[kWarps][kPaddedTile<scalar_t>],
                                          acc_type<scalar_t> (&cell_sums)[kCellSums]) {
  using acc_t = acc_type<scalar_t>;
  using tile_t = Tile<scalar_t, kVectors>;
  constexpr int kSize = kVectorSize<scalar_t>, kAhead = tile_t::kPairsAhead;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_channel = static_cast<int64_t>(image) * level.channels;
  const auto* student = static_cast<const scalar_t*>(level.inputs[kStudent]) + first_channel * level.cells;
  const auto* teacher = static_cast<const scalar_t*>(level.inputs[kTeacher]) + first_channel * level.cells;
  const tile_t tile{lane};
  if (!level.channels_last[kStudent]) {
    using factors_t = ChannelFactors<acc_t, Shared<acc_t>>;
    acc_t sums[kSize][kCellSums] = {};
    const auto start_of = [&](int c) { return static_cast<int64_t>(c) * level.cells + first_cell; };
    for (int first = warp; first < level.channels; first += kAhead * kWarps) {
      Pack<scalar_t> S[kAhead], T[kAhead];
      factors_t factors[kAhead];
      tile.fetch_pairs(student, teacher, start_of, first, level.channels, count, S, T);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int c = first + j * kWarps;
        if (c < level.channels) factors[j].gather(Shared<acc_t>{}, terms, level, first_channel + c, 1);
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        acc_t s[kSize], t[kSize];
        widen(S[j], s);
        widen(T[j], t);
#pragma unroll
        for (int k = 0; k < kSize; ++k) factors[j].add(0, s[k], t[k], sums[k]);
      }
    }
#pragma unroll
    for (int sum = 0; sum < kCellSums; ++sum) {
      if (level.cell_sums[sum] == nullptr) continue;
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSize; ++k) tile_sums[warp][padded<acc_t>(tile.index(k))] = sums[k][sum];
      __syncthreads();
      if (threadIdx.x < kTile<scalar_t>) {
        for (int other = 0; other < kWarps; ++other) cell_sums[sum] += tile_sums[other][padded<acc_t>(threadIdx.x)];
      }
    }
    return;
  }
  static_assert(kCellSums <= kWarps, "the sums of a tile share the memory of its warps");
  for (int c = 0; c < level.channels; c += kTile<scalar_t>) {
    ChannelFactors<acc_t, tile_t> factors;
    const int channels = level.channels - c;
    factors.gather(tile, terms, level, first_channel + c, channels);
    const auto start_of = [&](int cell) { return static_cast<int64_t>(first_cell + cell) * level.channels + c; };
    for (int first = warp; first < count; first += kAhead * kWarps) {
      Pack<scalar_t> S[kAhead], T[kAhead];
      tile.fetch_pairs(student, teacher, start_of, first, count, channels, S, T);
      acc_t sums[kAhead][kCellSums] = {};
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        acc_t s[kSize], t[kSize];
        widen(S[j], s);
        widen(T[j], t);
#pragma unroll
        for (int k = 0; k < kSize; ++k) factors.add(k, s[k], t[k], sums[j]);
      }
      // All sums side by side, for one alone would wait for each exchange.
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
#pragma unroll
          for (int sum = 0; sum < kCellSums; ++sum) {
            sums[j][sum] += __shfl_xor_sync(kAllLanes, sums[j][sum], offset);
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        acc_t of_lane = 0;  // lane k writes sum k
#pragma unroll
        for (int sum = 0; sum < kCellSums; ++sum) of_lane = lane == sum ? sums[j][sum] : of_lane;
        const int cell = first + j * kWarps;
        if (lane >= kCellSums || cell >= count) continue;
        acc_t& of_cell = tile_sums[lane][padded<acc_t>(cell)];
        of_cell = c == 0 ? of_lane : of_cell + of_lane;
      }
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= count) return;
#pragma unroll
  for (int sum = 0; sum < kCellSums; ++sum) {
    if (level.cell_sums[sum] != nullptr) cell_sums[sum] = tile_sums[sum][padded<acc_t>(threadIdx.x)];
  }
}

// A block sums up what rounding alone may make of the ranges of an image's maps, from its first cell.
template <typename scalar_t>
__device__ __forceinline__ void sum_map_noise(const Terms& terms, const LevelData<acc_type<scalar_t>>& level,
                                              int image) {
  using acc_t = acc_type<scalar_t>;
  const int64_t first_channel = static_cast<int64_t>(image) * level.channels;
  const auto* student = static_cast<const scalar_t*>(level.inputs[kStudent]) + first_channel * level.cells;
  const auto* teacher = static_cast<const scalar_t*>(level.inputs[kTeacher]) + first_channel * level.cells;
  const int64_t stride = level.channels_last[kStudent] ? 1 : level.cells;
  acc_t noise[2] = {0, 0};
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    if (terms.needs_student_map()) {
      noise[0] +=
          MapNoise<acc_t>::share(level.channel_means[kStudentGrad][first_channel + c], widen(student[c * stride]));
    }
    if (terms.needs_teacher_map()) {
      noise[1] +=
          MapNoise<acc_t>::share(level.channel_means[kTeacherGrad][first_channel + c], widen(teacher[c * stride]));
    }
  }
  reduce_block(noise, Plus{});
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) level.map_noise[2 * image + k] = noise[k];
  }
}

// A block sums up a tile of cells over all channels, and finds the extremes of the tile.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2)
    cell_sums_kernel(const __grid_constant__ ForwardParams<acc_type<scalar_t>> params) {
  using acc_t = acc_type<scalar_t>;
  __shared__ acc_t tile_sums[kWarps][kPaddedTile<scalar_t>];
  const Place place = locate(params.tile_blocks, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const Terms& terms = params.terms;
  const int tiles = divide_up(level.cells, kTile<scalar_t>);
  const int image = place.block / tiles, first_cell = place.block % tiles * kTile<scalar_t>;
  const int count = min(kTile<scalar_t>, level.cells - first_cell);
  acc_t cell_sums[kCellSums] = {};
  if (level.vectors[kStudent] && level.vectors[kTeacher]) {
    sum_cells<scalar_t, true>(terms, level, image, first_cell, count, tile_sums, cell_sums);
  } else {
    sum_cells<scalar_t, false>(terms, level, image, first_cell, count, tile_sums, cell_sums);
  }

  const bool in_tile = static_cast<int>(threadIdx.x) < count;
  const int64_t cell = static_cast<int64_t>(image) * level.cells + first_cell + threadIdx.x;
  for (int sum = 0; sum < kCellSums; ++sum) {
    if (in_tile && level.cell_sums[sum] != nullptr) level.cell_sums[sum][cell] = cell_sums[sum];
  }
  acc_t extremes[kExtremes];
  const acc_t student_G = rectified(cell_sums[kStudentMap], terms.relu);
  const acc_t teacher_G = rectified(cell_sums[kTeacherMap], terms.relu);
  const acc_t nothing = -static_cast<acc_t>(HUGE_VAL);
  extremes[kStudentLow] = in_tile ? -student_G : nothing;
  extremes[kStudentHigh] = in_tile ? student_G : nothing;
  extremes[kTeacherLow] = in_tile ? -teacher_G : nothing;
  extremes[kTeacherHigh] = in_tile ? teacher_G : nothing;
  extremes[kStudentMost] = in_tile ? cell_sums[kStudentMagnitude] : nothing;
  extremes[kTeacherMost] = in_tile ? cell_sums[kTeacherMagnitude] : nothing;
  reduce_block(extremes, Larger{});
  if (threadIdx.x == 0) {
    for (int k = 0; k < kExtremes; ++k) level.extremes[static_cast<int64_t>(place.block) * kExtremes + k] = extremes[k];
  }
  if (first_cell == 0) sum_map_noise<scalar_t>(terms, level, image);
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_cell_sums(const ForwardParams<acc_type<scalar_t>>& params, cudaStream_t stream) {
  cell_sums_kernel<scalar_t><<<params.tile_blocks.first[params.num_levels], kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace gkd_d2
