// The sums over cells of every channel of the inputs that need it, and what follows from them: alpha, u and the
// channels' share of loss_bmfi_attention.
#pragma once

#include "blocks.cuh"
#include "kernels.h"
#include "reduce.cuh"
#include "tile.cuh"

namespace gkd_d2 {
namespace {

// The sums over cells of one channel of one image of contiguous features, or of a tile of channels over a part of the
// cells of channels_last ones.
template <typename scalar_t, bool kVectors>
__device__ __forceinline__ void sum_channels(const LevelData<acc_type<scalar_t>>& level, Input input, int block,
                                             acc_type<scalar_t> (&of_warps)[kWarps][kPaddedTile<scalar_t>]) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = kVectorSize<scalar_t>, kAhead = Tile<scalar_t, kVectors>::kPacksAhead;
  const bool magnitudes = input == kStudent || input == kTeacher;
  const auto* features = static_cast<const scalar_t*>(level.inputs[input]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Tile<scalar_t, kVectors> tile{lane};
  acc_t sums[kSize] = {};
  // Adds up the tiles that `fetch` reads at first, first + step and so on; at or beyond the end it reads nothing.
  const auto add = [&](int first, int end, int step, const auto& fetch) {
    for (int i = first; i < end; i += kAhead * step) {
      Pack<scalar_t> packs[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) packs[j] = fetch(i + j * step);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        acc_t values[kSize];
        widen(packs[j], values);
#pragma unroll
        for (int k = 0; k < kSize; ++k) sums[k] += magnitudes ? absolute(values[k]) : values[k];
      }
    }
  };
  if (!level.channels_last[input]) {
    const scalar_t* row = features + static_cast<int64_t>(block) * level.cells;
    add(warp * kTile<scalar_t>, level.cells, kWarps * kTile<scalar_t>,
        [&](int start) { return tile.fetch(row + start, level.cells - start); });
    acc_t sum[1] = {0};
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[0] += sums[k];
    reduce_block(sum, Plus{});
    if (threadIdx.x == 0) level.channel_sums[input][block] = sum[0];
    return;
  }
  const int tiles = divide_up(level.channels, kTile<scalar_t>), parts = level.channel_parts[input];
  const int first_channel = block % tiles * kTile<scalar_t>;
  const int part = block / tiles % parts, image = block / tiles / parts;
  const int cells = divide_up(level.cells, parts);
  const scalar_t* image_features =
      features + static_cast<int64_t>(image) * level.cells * level.channels + first_channel;
  const int end = min(level.cells, (part + 1) * cells), count = level.channels - first_channel;
  add(part * cells + warp, end, kWarps, [&](int cell) {
    return tile.fetch(image_features + static_cast<int64_t>(cell) * level.channels, cell < end ? count : 0);
  });
#pragma unroll
  for (int k = 0; k < kSize; ++k) of_warps[warp][padded<acc_t>(tile.index(k))] = sums[k];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile<scalar_t> && first_channel + i < level.channels; i += kThreads) {
    acc_t sum = of_warps[0][padded<acc_t>(i)];
    for (int other = 1; other < kWarps; ++other) sum += of_warps[other][padded<acc_t>(i)];
    level.channel_sums[input][(static_cast<int64_t>(image) * parts + part) * level.channels + first_channel + i] = sum;
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const __grid_constant__ ForwardParams<acc_type<scalar_t>> params) {
  __shared__ acc_type<scalar_t> of_warps[kWarps][kPaddedTile<scalar_t>];
  const Input input = params.inputs[blockIdx.y];
  const BlockTable& table = params.channel_blocks[input];
  if (static_cast<int>(blockIdx.x) >= table.first[params.num_levels]) return;
  const Place place = locate(table, params.num_levels);
  const auto& level = params.levels[place.level];
  // Decided for the block as a whole: a decision at each load would keep the next one waiting.
  if (level.vectors[input]) {
    sum_channels<scalar_t, true>(level, input, place.block, of_warps);
  } else {
    sum_channels<scalar_t, false>(level, input, place.block, of_warps);
  }
}

// The maximum over channels of the means of magnitudes, and the sum of exp((mean - maximum) / temperature).
template <typename acc_t>
struct ChannelSoftmax {
  const acc_t* means;  // C
  acc_t channels, scale, most, sum;

  __device__ __forceinline__ ChannelSoftmax(const acc_t* means_of_image, int num_channels, acc_t temperature_scale)
      : means(means_of_image), channels(static_cast<acc_t>(num_channels)), scale(temperature_scale) {
    acc_t value[1] = {-static_cast<acc_t>(HUGE_VAL)};
    for (int c = threadIdx.x; c < num_channels; c += kThreads) value[0] = Larger{}(means[c], value[0]);
    reduce_block(value, Larger{});
    most = value[0];
    value[0] = 0;
    for (int c = threadIdx.x; c < num_channels; c += kThreads) value[0] += exp((means[c] - most) * scale);
    reduce_block(value, Plus{});
    sum = value[0];
  }
  // Ac
  __device__ __forceinline__ acc_t attention(int c) const { return channels * exp((means[c] - most) * scale) / sum; }
};

// The mean over cells of one channel of one image, from the sums of its parts.
template <typename acc_t>
__device__ __forceinline__ acc_t channel_mean(const LevelData<acc_t>& level, Input input, int image, int channel) {
  const int parts = level.channel_parts[input];
  const acc_t* sums = level.channel_sums[input] + static_cast<int64_t>(image) * parts * level.channels + channel;
  acc_t sum = 0;
#pragma unroll 8
  for (int part = 0; part < parts; ++part) sum += sums[static_cast<int64_t>(part) * level.channels];
  return sum / static_cast<acc_t>(level.summed_cells[input]);
}

// Divides the alphas of one image by their unit.
template <typename acc_t>
__device__ __forceinline__ void scale_alphas(acc_t* alpha, int channels) {
  acc_t largest[1] = {0};
  for (int c = threadIdx.x; c < channels; c += kThreads) largest[0] = Larger{}(absolute(alpha[c]), largest[0]);
  reduce_block(largest, Larger{});
  const acc_t unit = alpha_unit(largest[0]);
  for (int c = threadIdx.x; c < channels; c += kThreads) alpha[c] /= unit;
}

// A block turns the channel sums of one image and level into alpha, u and the channels' share of loss_bmfi_attention.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    channel_weights_kernel(const __grid_constant__ ForwardParams<acc_t> params) {
  const Terms& terms = params.terms;
  const LevelData<acc_t>& level = params.levels[blockIdx.x / params.images];
  const int image = static_cast<int>(blockIdx.x) % params.images;
  const int64_t offset = static_cast<int64_t>(image) * level.channels;
  // A thread reads only means that it has written itself.
  for (int i = 0; i < params.num_inputs; ++i) {
    const Input input = params.inputs[i];
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      level.channel_means[input][offset + c] = channel_mean(level, input, image, c);
    }
    if (input == kStudentGrad || input == kTeacherGrad) {
      scale_alphas(level.channel_means[input] + offset, level.channels);
    }
  }
  if (terms.weighs_by(Weighting::kUniform)) {
    for (int c = threadIdx.x; c < level.channels; c += kThreads) level.channel_weight[offset + c] = 1;
  }
  if (terms.weighs_by(Weighting::kGradient)) {
    const acc_t* alpha = level.channel_means[kTeacherGrad] + offset;
    acc_t total[1] = {0};
    for (int c = threadIdx.x; c < level.channels; c += kThreads) total[0] += absolute(alpha[c]);
    reduce_block(total, Plus{});
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      level.channel_weight[offset + c] =
          total[0] == 0 ? acc_t{1} : static_cast<acc_t>(level.channels) * absolute(alpha[c]) / total[0];
    }
  }
  if (!terms.needs_teacher_magnitude()) return;
  const ChannelSoftmax<acc_t> teacher(level.channel_means[kTeacher] + offset, level.channels, params.temperature_scale);
  if (terms.weighs_by_attention()) {
    for (int c = threadIdx.x; c < level.channels; c += kThreads)
      level.channel_weight[offset + c] = teacher.attention(c);
  }
  if (!terms.has_attention) return;
  const ChannelSoftmax<acc_t> student(level.channel_means[kStudent] + offset, level.channels, params.temperature_scale);
  acc_t sums[2] = {0, 0};  // of |Ac(S) - Ac(T)| and of Ac(S) * sign(Ac(S) - Ac(T))
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    const acc_t a = student.attention(c), difference = a - teacher.attention(c);
    sums[0] += absolute(difference);
    sums[1] += a * sign(difference);
  }
  reduce_block(sums, Plus{});
  if (threadIdx.x == 0) level.channel_distance[image] = sums[0];
  const acc_t mean_sign = sums[1] / static_cast<acc_t>(level.channels);
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    const acc_t a = student.attention(c), difference = a - teacher.attention(c);
    level.channel_attention[offset + c] = a * (sign(difference) - mean_sign) * level.channel_attention_scale;
  }
}

}  // namespace

template <typename scalar_t>
cudaError_t launch_channel_sums(const ForwardParams<acc_type<scalar_t>>& params, cudaStream_t stream) {
  int blocks = 0;
  for (int i = 0; i < params.num_inputs; ++i) {
    const int needed = params.channel_blocks[params.inputs[i]].first[params.num_levels];
    blocks = needed > blocks ? needed : blocks;
  }
  if (blocks == 0) return cudaSuccess;
  channel_sums_kernel<scalar_t><<<dim3(blocks, params.num_inputs), kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename acc_t>
cudaError_t launch_channel_weights(const ForwardParams<acc_t>& params, cudaStream_t stream) {
  channel_weights_kernel<acc_t><<<params.num_levels * params.images, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace gkd_d2
