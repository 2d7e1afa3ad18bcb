// The CUDA kernels. Sums are made in two stages, first within a block and then over blocks in a fixed order, without
// atomics: a repeated call is equal bit by bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "kernels.h"

namespace gkd_d2 {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------------- elements

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(double value, double& to) { to = value; }
__device__ __forceinline__ void narrow(float value, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void narrow(float value, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// 16 bytes of values.
template <typename value_t>
struct alignas(16) Pack {
  value_t values[kVectorSize<value_t>];
};

// The elements that one lane of a warp has of a tile: successive ones where 16 bytes may be moved at a time, else a
// warp's width apart. Elements at or beyond `count` are 0 and are not stored.
template <typename scalar_t, bool kVectors>
struct Tile {
  using acc_t = acc_type<scalar_t>;
  static constexpr int kSize = kVectorSize<scalar_t>;
  // How many packs a lane reads before it uses the first, so that their loads overlap, and how many pairs of S and T. A
  // pack that is read element by element is several loads by itself.
  static constexpr int kPacksAhead = kVectors ? 4 : 2;
  static constexpr int kPairsAhead = kPacksAhead / 2;
  int lane;

  __device__ __forceinline__ int index(int k) const {
    if constexpr (kVectors) return lane * kSize + k;
    return lane + k * kWarp;
  }

  // As they lie in memory: what is made of them comes after the next loads.
  __device__ __forceinline__ Pack<scalar_t> fetch(const scalar_t* from, int count) const {
    Pack<scalar_t> pack{};
    if constexpr (kVectors) {
      if (index(0) < count) pack = *reinterpret_cast<const Pack<scalar_t>*>(from + index(0));
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (index(k) < count) pack.values[k] = from[index(k)];
      }
    }
    return pack;
  }

  // S and T in the rows first, first + kWarps and so on, which start at start_of(row): `count` elements each, none at
  // or beyond the end.
  template <typename start_t>
  __device__ __forceinline__ void fetch_pairs(const scalar_t* student, const scalar_t* teacher, const start_t& start_of,
                                              int first, int end, int count, Pack<scalar_t> (&S)[kPairsAhead],
                                              Pack<scalar_t> (&T)[kPairsAhead]) const {
#pragma unroll
    for (int j = 0; j < kPairsAhead; ++j) {
      const int row = first + j * kWarps;
      const int64_t start = start_of(row);
      S[j] = fetch(student + start, row < end ? count : 0);
      T[j] = fetch(teacher + start, row < end ? count : 0);
    }
  }

  // Of a vector of factors.
  __device__ __forceinline__ void gather(const acc_t* from, int count, acc_t (&values)[kSize]) const {
    // The features may be aligned where what was summed up of them is not.
    if (kVectors && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<acc_t>) == 0) {
#pragma unroll
      for (int k = 0; k < kSize; k += kVectorSize<acc_t>) {
        Pack<acc_t> pack{};
        if (index(k) < count) pack = *reinterpret_cast<const Pack<acc_t>*>(from + index(k));
#pragma unroll
        for (int i = 0; i < kVectorSize<acc_t>; ++i) values[k + i] = pack.values[i];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[k] = index(k) < count ? from[index(k)] : acc_t{0};
    }
  }

  __device__ __forceinline__ void store(scalar_t* to, int count, const acc_t (&values)[kSize]) const {
    if constexpr (kVectors) {
      Pack<scalar_t> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) narrow(values[k], pack.values[k]);
      // As one value, for the members of a struct may be stored one by one; past the caches, for nothing here reads it.
      uint4 bytes;
      memcpy(&bytes, &pack, sizeof(bytes));
      if (index(0) < count) __stcs(reinterpret_cast<uint4*>(to + index(0)), bytes);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (index(k) < count) narrow(values[k], to[index(k)]);
      }
    }
  }
};

// What a tile is for the elements of many lanes, for one element that all lanes share.
template <typename value_t>
struct Shared {
  static constexpr int kSize = 1;
  __device__ __forceinline__ void gather(const value_t* from, int, value_t (&values)[1]) const { values[0] = *from; }
};

template <typename scalar_t>
__device__ __forceinline__ void widen(const Pack<scalar_t>& pack, acc_type<scalar_t> (&values)[kVectorSize<scalar_t>]) {
#pragma unroll
  for (int k = 0; k < kVectorSize<scalar_t>; ++k) values[k] = widen(pack.values[k]);
}

// The place of element i of a tile in shared memory. An element of room after each 128 bytes keeps lanes whose elements
// are 2, 4 or 8 apart out of each other's banks.
template <typename acc_t>
__device__ __forceinline__ constexpr int padded(int i) {
  return i + i / (128 / static_cast<int>(sizeof(acc_t)));
}
template <typename scalar_t>
constexpr int kPaddedTile = kTile<scalar_t> + kTile<scalar_t> * static_cast<int>(sizeof(acc_type<scalar_t>)) / 128;

// -------------------------------------------------------------------------------------------------- reductions

struct Plus {
  template <typename acc_t>
  __device__ __forceinline__ acc_t operator()(acc_t a, acc_t b) const {
    return a + b;
  }
};
struct Larger {
  template <typename acc_t>
  __device__ __forceinline__ acc_t operator()(acc_t a, acc_t b) const {
    return a > b ? a : b;
  }
};

template <typename acc_t, typename op_t>
__device__ __forceinline__ acc_t reduce_warp(acc_t value, const op_t& op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Reduces each of `values` over the block; every thread gets the results.
template <int kCount, typename acc_t, typename op_t>
__device__ __forceinline__ void reduce_block(acc_t (&values)[kCount], const op_t& op) {
  __shared__ acc_t of_warps[kCount][kWarps];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const acc_t value = reduce_warp(values[k], op);
    if (threadIdx.x % kWarp == 0) of_warps[k][threadIdx.x / kWarp] = value;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = of_warps[k][0];
    for (int warp = 1; warp < kWarps; ++warp) values[k] = op(values[k], of_warps[k][warp]);
  }
  __syncthreads();
}

// Reduces `parts` records of kCount values that lie one after the other in memory.
template <int kCount, typename acc_t, typename op_t>
__device__ __forceinline__ void reduce_parts(const acc_t* parts, int num_parts, acc_t identity, acc_t (&values)[kCount],
                                             const op_t& op) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = identity;
  for (int part = threadIdx.x; part < num_parts; part += kThreads) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = op(values[k], parts[part * kCount + k]);
  }
  reduce_block(values, op);
}

// ------------------------------------------------------------------------------------------------------ blocks

__host__ __device__ __forceinline__ int divide_up(int value, int by) { return (value + by - 1) / by; }

struct Place {
  int level, block;  // block: within the level
};

__device__ __forceinline__ Place locate(const BlockTable& table, int num_levels) {
  int level = 0;
  while (level + 1 < num_levels && static_cast<int>(blockIdx.x) >= table.first[level + 1]) ++level;
  return {level, static_cast<int>(blockIdx.x) - table.first[level]};
}

// ----------------------------------------------------------------------------------------------------- forward

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
  if (terms.weighs_by(Weighting::kAttention)) {
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

// What the kernels below share: a block takes a chunk of the cells of one image and level.
template <typename acc_t>
struct Chunk {
  const LevelData<acc_t>& level;
  int chunks, image, first_cell;
  int64_t image_offset;
  acc_t extremes[kExtremes];
  acc_t student_range, teacher_range;

  __device__ __forceinline__ Chunk(const ForwardParams<acc_t>& params, const Place& place, int tile)
      : level(params.levels[place.level]),
        chunks(divide_up(level.cells, kChunkCells)),
        image(place.block / chunks),
        first_cell(place.block % chunks * kChunkCells),
        image_offset(static_cast<int64_t>(image) * level.cells) {
    const int tiles = divide_up(level.cells, tile);
    reduce_parts(level.extremes + static_cast<int64_t>(image) * tiles * kExtremes, tiles, -static_cast<acc_t>(HUGE_VAL),
                 extremes, Larger{});
    extremes[kStudentLow] = -extremes[kStudentLow];
    extremes[kTeacherLow] = -extremes[kTeacherLow];
    const acc_t* noise = level.map_noise + 2 * image;
    student_range = map_range(extremes[kStudentLow], extremes[kStudentHigh], noise[0]);
    teacher_range = map_range(extremes[kTeacherLow], extremes[kTeacherHigh], noise[1]);
  }

  template <typename function_t>
  __device__ __forceinline__ void for_each_cell(const function_t& function) const {
#pragma unroll
    for (int k = 0; k < kChunkCells / kThreads; ++k) {
      const int cell = first_cell + k * kThreads + static_cast<int>(threadIdx.x);
      if (cell < level.cells) function(image_offset + cell);
    }
  }

  __device__ __forceinline__ acc_t* part(acc_t* sums, int count) const {
    return sums + (static_cast<int64_t>(image) * chunks + first_cell / kChunkCells) * count;
  }
  __device__ __forceinline__ const acc_t* all_parts(const acc_t* sums, int count) const {
    return sums + static_cast<int64_t>(image) * chunks * count;
  }

  __device__ __forceinline__ acc_t student_unit(acc_t g, bool relu) const {
    return unit_range(rectified(g, relu), extremes[kStudentLow], student_range);
  }
  __device__ __forceinline__ acc_t teacher_unit(acc_t g, bool relu) const {
    return unit_range(rectified(g, relu), extremes[kTeacherLow], teacher_range);
  }
  __device__ __forceinline__ acc_t student_exp(acc_t magnitude) const {
    return exp((magnitude - extremes[kStudentMost]) * level.magnitude_scale);
  }
  __device__ __forceinline__ acc_t teacher_exp(acc_t magnitude) const {
    return exp((magnitude - extremes[kTeacherMost]) * level.magnitude_scale);
  }
};

template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    first_sums_kernel(const __grid_constant__ ForwardParams<acc_t> params, int tile) {
  const Terms& terms = params.terms;
  const Chunk<acc_t> chunk(params, locate(params.chunk_blocks, params.num_levels), tile);
  const LevelData<acc_t>& level = chunk.level;
  acc_t sums[kFirstSums] = {};
  chunk.for_each_cell([&](int64_t cell) {
    if (terms.needs_teacher_map()) {
      const acc_t teacher = chunk.teacher_unit(level.cell_sums[kTeacherMap][cell], terms.relu);
      sums[kTeacherUnit] += teacher;
      if (terms.has_gradient) {
        const acc_t G = rectified(level.cell_sums[kStudentMap][cell], terms.relu);
        const acc_t student = unit_range(G, chunk.extremes[kStudentLow], chunk.student_range);
        const acc_t s = sign(student - teacher);
        sums[kMapDistance] += absolute(student - teacher);
        sums[kThroughLow] += s * (student - 1);
        sums[kThroughHigh] += s * student;
        sums[kLows] += G == chunk.extremes[kStudentLow] ? 1 : 0;
        sums[kHighs] += G == chunk.extremes[kStudentHigh] ? 1 : 0;
      }
    }
    if (terms.needs_teacher_magnitude()) {
      sums[kTeacherExp] += chunk.teacher_exp(level.cell_sums[kTeacherMagnitude][cell]);
    }
    if (terms.has_attention) sums[kStudentExp] += chunk.student_exp(level.cell_sums[kStudentMagnitude][cell]);
  });
  reduce_block(sums, Plus{});
  if (threadIdx.x == 0) {
    for (int k = 0; k < kFirstSums; ++k) chunk.part(level.first_sums, kFirstSums)[k] = sums[k];
  }
}

// Writes backward's maps in the places of the sums that they are made of; cell_attention gets As(S) for now, and the
// teacher's magnitudes give way to As(T).
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    second_sums_kernel(const __grid_constant__ ForwardParams<acc_t> params, int tile) {
  const Terms& terms = params.terms;
  const Chunk<acc_t> chunk(params, locate(params.chunk_blocks, params.num_levels), tile);
  const LevelData<acc_t>& level = chunk.level;
  acc_t first[kFirstSums];
  reduce_parts(chunk.all_parts(level.first_sums, kFirstSums), chunk.chunks, acc_t{0}, first, Plus{});
  const MapExtremes<acc_t> extremes{chunk.extremes[kStudentLow], chunk.extremes[kStudentHigh], chunk.student_range,
                                    first[kThroughLow] / first[kLows], -first[kThroughHigh] / first[kHighs]};
  const acc_t cells = static_cast<acc_t>(level.cells);
  acc_t sums[kSecondSums] = {};
  chunk.for_each_cell([&](int64_t cell) {
    const acc_t teacher_unit =
        terms.needs_teacher_map() ? chunk.teacher_unit(level.cell_sums[kTeacherMap][cell], terms.relu) : acc_t{0};
    const acc_t teacher_attention =
        terms.needs_teacher_magnitude()
            ? cells * chunk.teacher_exp(level.cell_sums[kTeacherMagnitude][cell]) / first[kTeacherExp]
            : acc_t{0};
    if (terms.has_gradient) {
      const acc_t g = level.cell_sums[kStudentMap][cell];
      const acc_t s = sign(chunk.student_unit(g, terms.relu) - teacher_unit);
      level.gradient_map[cell] = gradient_map_slope(g, s, extremes, level.gradient_weight, terms.relu);
    }
    if (terms.imitates()) {
      acc_t weight = 1;
      if (terms.weighting == Weighting::kAttention) weight = teacher_attention;
      if (terms.weighting == Weighting::kGradient && first[kTeacherUnit] != 0) {
        weight = cells * teacher_unit / first[kTeacherUnit];
      }
      const acc_t distance = weight * level.cell_sums[kDistance][cell];
      level.cell_weight[cell] = weight;
      if (terms.has_image) sums[kImageDistance] += distance;
      if (terms.has_box) sums[kBoxDistance] += distance * level.box_mask[cell];
    }
    if (terms.has_attention) {
      const acc_t a = cells * chunk.student_exp(level.cell_sums[kStudentMagnitude][cell]) / first[kStudentExp];
      sums[kAttentionDistance] += absolute(a - teacher_attention);
      sums[kAttentionSign] += a * sign(a - teacher_attention);
      level.cell_attention[cell] = a;
      level.cell_sums[kTeacherMagnitude][cell] = teacher_attention;
    }
  });
  reduce_block(sums, Plus{});
  if (threadIdx.x == 0) {
    for (int k = 0; k < kSecondSums; ++k) chunk.part(level.second_sums, kSecondSums)[k] = sums[k];
  }
}

// Turns As(S) in cell_attention into the gradient of loss_bmfi_attention.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) cell_attention_kernel(const __grid_constant__ ForwardParams<acc_t> params) {
  const Place place = locate(params.chunk_blocks, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const int chunks = divide_up(level.cells, kChunkCells), image = place.block / chunks;
  acc_t sums[kSecondSums];
  reduce_parts(level.second_sums + static_cast<int64_t>(image) * chunks * kSecondSums, chunks, acc_t{0}, sums, Plus{});
  const acc_t mean_sign = sums[kAttentionSign] / static_cast<acc_t>(level.cells);
  const int64_t offset = static_cast<int64_t>(image) * level.cells;
  for (int k = threadIdx.x; k < kChunkCells; k += kThreads) {
    const int cell = place.block % chunks * kChunkCells + k;
    if (cell >= level.cells) return;
    const acc_t a = level.cell_attention[offset + cell];
    const acc_t difference = a - level.cell_sums[kTeacherMagnitude][offset + cell];
    level.cell_attention[offset + cell] = a * (sign(difference) - mean_sign) * level.cell_attention_scale;
  }
}

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

// ---------------------------------------------------------------------------------------------------- backward

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

// --------------------------------------------------------------------------------------------------- launchers

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

template <typename scalar_t>
cudaError_t launch_cell_sums(const ForwardParams<acc_type<scalar_t>>& params, cudaStream_t stream) {
  cell_sums_kernel<scalar_t><<<params.tile_blocks.first[params.num_levels], kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename acc_t>
cudaError_t launch_box_masks(const ForwardParams<acc_t>& params, const BoxOffsets& offsets, cudaStream_t stream) {
  box_masks_kernel<acc_t><<<params.chunk_blocks.first[params.num_levels], kThreads, 0, stream>>>(params, offsets);
  return cudaGetLastError();
}

template <typename acc_t>
cudaError_t launch_finish(const ForwardParams<acc_t>& params, int tile, cudaStream_t stream) {
  const int blocks = params.chunk_blocks.first[params.num_levels];
  first_sums_kernel<acc_t><<<blocks, kThreads, 0, stream>>>(params, tile);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  second_sums_kernel<acc_t><<<blocks, kThreads, 0, stream>>>(params, tile);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  if (params.terms.has_attention) {
    cell_attention_kernel<acc_t><<<blocks, kThreads, 0, stream>>>(params);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  losses_kernel<acc_t><<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename scalar_t>
cudaError_t launch_gradient(const BackwardParams<acc_type<scalar_t>>& params, cudaStream_t stream) {
  gradient_kernel<scalar_t><<<params.blocks.first[params.num_levels], kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

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
