// The CUDA kernels. Sums are made in two stages, first within a block and then over blocks in a fixed order, without
// atomics: a repeated call is equal bit by bit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

template <typename scalar_t>
struct alignas(16) Pack {
  scalar_t values[kVectorSize<scalar_t>];
};

// The elements that one lane of a warp has of a tile: successive ones where 16 bytes may be moved at a time, else a
// warp's width apart. Elements at or beyond `count` are 0 and are not stored.
template <typename scalar_t>
struct Tile {
  using acc_t = acc_type<scalar_t>;
  static constexpr int kSize = kVectorSize<scalar_t>;
  int lane;
  bool vectors;

  __device__ __forceinline__ int index(int k) const { return vectors ? lane * kSize + k : lane + k * kWarp; }

  __device__ __forceinline__ void load(const scalar_t* from, int count, acc_t (&values)[kSize]) const {
    if (vectors) {
      Pack<scalar_t> pack{};
      if (index(0) < count) pack = *reinterpret_cast<const Pack<scalar_t>*>(from + index(0));
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[k] = widen(pack.values[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[k] = index(k) < count ? widen(from[index(k)]) : acc_t{0};
    }
  }

  __device__ __forceinline__ void store(scalar_t* to, int count, const acc_t (&values)[kSize]) const {
    if (vectors) {
      Pack<scalar_t> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) narrow(values[k], pack.values[k]);
      if (index(0) < count) *reinterpret_cast<Pack<scalar_t>*>(to + index(0)) = pack;
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (index(k) < count) narrow(values[k], to[index(k)]);
      }
    }
  }
};

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

// A block sums up one channel of one image of contiguous features, or a tile of channels over a part of the cells of
// channels_last ones.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    channel_sums_kernel(const __grid_constant__ ForwardParams<acc_type<scalar_t>> params) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = kVectorSize<scalar_t>;
  const Input input = params.inputs[blockIdx.y];
  const BlockTable& table = params.channel_blocks[input];
  if (static_cast<int>(blockIdx.x) >= table.first[params.num_levels]) return;
  const Place place = locate(table, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const bool magnitudes = input == kStudent || input == kTeacher;
  const auto* features = static_cast<const scalar_t*>(level.inputs[input]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Tile<scalar_t> tile{lane, level.vectors[input]};
  acc_t sums[kSize] = {};
  const auto add = [&](const scalar_t* from, int count) {
    acc_t values[kSize];
    tile.load(from, count, values);
#pragma unroll
    for (int k = 0; k < kSize; ++k) sums[k] += magnitudes ? absolute(values[k]) : values[k];
  };
  if (!level.channels_last[input]) {
    const scalar_t* row = features + static_cast<int64_t>(place.block) * level.cells;
#pragma unroll 4
    for (int start = warp * kTile<scalar_t>; start < level.cells; start += kWarps * kTile<scalar_t>) {
      add(row + start, level.cells - start);
    }
    acc_t sum[1] = {0};
#pragma unroll
    for (int k = 0; k < kSize; ++k) sum[0] += sums[k];
    reduce_block(sum, Plus{});
    if (threadIdx.x == 0) level.channel_sums[input][place.block] = sum[0];
    return;
  }
  __shared__ acc_t of_warps[kWarps][kTile<scalar_t>];
  const int tiles = divide_up(level.channels, kTile<scalar_t>), parts = level.channel_parts[input];
  const int first_channel = place.block % tiles * kTile<scalar_t>;
  const int part = place.block / tiles % parts, image = place.block / tiles / parts;
  const int cells = divide_up(level.cells, parts);
  const int end = min(level.cells, (part + 1) * cells);
#pragma unroll 4
  for (int cell = part * cells + warp; cell < end; cell += kWarps) {
    const int64_t start = (static_cast<int64_t>(image) * level.cells + cell) * level.channels + first_channel;
    add(features + start, level.channels - first_channel);
  }
#pragma unroll
  for (int k = 0; k < kSize; ++k) of_warps[warp][tile.index(k)] = sums[k];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile<scalar_t> && first_channel + i < level.channels; i += kThreads) {
    acc_t sum = of_warps[0][i];
    for (int other = 1; other < kWarps; ++other) sum += of_warps[other][i];
    level.channel_sums[input][(static_cast<int64_t>(image) * parts + part) * level.channels + first_channel + i] = sum;
  }
}

// The mean over cells of one channel of one image, from the sums of its parts.
template <typename acc_t>
__device__ __forceinline__ acc_t channel_mean(const LevelData<acc_t>& level, Input input, int image, int channel) {
  const int parts = level.channel_parts[input];
  const acc_t* sums = level.channel_sums[input] + static_cast<int64_t>(image) * parts * level.channels + channel;
  acc_t sum = 0;
  for (int part = 0; part < parts; ++part) sum += sums[static_cast<int64_t>(part) * level.channels];
  return sum / static_cast<acc_t>(level.cells);
}

// The maximum over channels of the means of magnitudes, and the sum of exp((mean - maximum) / temperature).
template <typename acc_t>
struct ChannelSoftmax {
  acc_t most, sum;

  __device__ __forceinline__ ChannelSoftmax(const LevelData<acc_t>& level, Input input, int image, acc_t scale) {
    acc_t value[1] = {channel_mean(level, input, image, 0)};
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      value[0] = Larger{}(channel_mean(level, input, image, c), value[0]);
    }
    reduce_block(value, Larger{});
    most = value[0];
    value[0] = 0;
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      value[0] += exp((channel_mean(level, input, image, c) - most) * scale);
    }
    reduce_block(value, Plus{});
    sum = value[0];
  }
  // Ac
  __device__ __forceinline__ acc_t attention(const LevelData<acc_t>& level, Input input, int image, int c,
                                             acc_t scale) const {
    const acc_t channels = static_cast<acc_t>(level.channels);
    return channels * exp((channel_mean(level, input, image, c) - most) * scale) / sum;
  }
};

// A block turns the channel sums of one image and level into alpha, u and the channels' share of loss_bmfi_attention.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads)
    channel_weights_kernel(const __grid_constant__ ForwardParams<acc_t> params) {
  const Terms& terms = params.terms;
  const LevelData<acc_t>& level = params.levels[blockIdx.x / params.images];
  const int image = static_cast<int>(blockIdx.x) % params.images;
  const int64_t offset = static_cast<int64_t>(image) * level.channels;
  const acc_t scale = static_cast<acc_t>(1 / terms.temperature);
  acc_t total[1] = {0};
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    if (terms.needs_student_map()) level.alpha[offset + c] = channel_mean(level, kStudentGrad, image, c);
    if (terms.needs_teacher_map()) {
      const acc_t alpha = channel_mean(level, kTeacherGrad, image, c);
      level.teacher_alpha[offset + c] = alpha;
      total[0] += absolute(alpha);
    }
    if (terms.weighs_by(Weighting::kUniform)) level.channel_weight[offset + c] = 1;
  }
  if (terms.weighs_by(Weighting::kGradient)) {
    reduce_block(total, Plus{});
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      level.channel_weight[offset + c] =
          total[0] == 0 ? acc_t{1}
                        : static_cast<acc_t>(level.channels) * absolute(level.teacher_alpha[offset + c]) / total[0];
    }
  }
  if (!terms.needs_teacher_magnitude()) return;
  const ChannelSoftmax<acc_t> teacher(level, kTeacher, image, scale);
  if (terms.weighs_by(Weighting::kAttention)) {
    for (int c = threadIdx.x; c < level.channels; c += kThreads) {
      level.channel_weight[offset + c] = teacher.attention(level, kTeacher, image, c, scale);
    }
  }
  if (terms.attention == 0) return;
  const ChannelSoftmax<acc_t> student(level, kStudent, image, scale);
  acc_t sums[2] = {0, 0};  // of |Ac(S) - Ac(T)| and of Ac(S) * sign(Ac(S) - Ac(T))
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    const acc_t a = student.attention(level, kStudent, image, c, scale);
    const acc_t difference = a - teacher.attention(level, kTeacher, image, c, scale);
    sums[0] += absolute(difference);
    sums[1] += a * sign(difference);
  }
  reduce_block(sums, Plus{});
  if (threadIdx.x == 0) level.channel_distance[image] = sums[0];
  const acc_t mean_sign = sums[1] / static_cast<acc_t>(level.channels);
  const acc_t slope = static_cast<acc_t>(terms.attention / (terms.temperature * level.cells));
  for (int c = threadIdx.x; c < level.channels; c += kThreads) {
    const acc_t a = student.attention(level, kStudent, image, c, scale);
    const acc_t difference = a - teacher.attention(level, kTeacher, image, c, scale);
    level.channel_attention[offset + c] = a * (sign(difference) - mean_sign) * slope;
  }
}

// The alphas and u of a channel, as far as the losses need them.
template <typename acc_t>
struct ChannelFactors {
  acc_t student_alpha, teacher_alpha, weight;

  __device__ __forceinline__ ChannelFactors(const Terms& terms, const LevelData<acc_t>& level, int64_t channel)
      : student_alpha(terms.needs_student_map() ? level.alpha[channel] : acc_t{0}),
        teacher_alpha(terms.needs_teacher_map() ? level.teacher_alpha[channel] : acc_t{0}),
        weight(terms.imitates() ? level.channel_weight[channel] : acc_t{0}) {}

  __device__ __forceinline__ void add(acc_t student, acc_t teacher, acc_t (&sums)[kCellSums]) const {
    const acc_t difference = student - teacher;
    sums[kStudentMap] += student_alpha * student;
    sums[kTeacherMap] += teacher_alpha * teacher;
    sums[kDistance] += weight * difference * difference;
    sums[kStudentMagnitude] += absolute(student);
    sums[kTeacherMagnitude] += absolute(teacher);
  }
};

// A block sums up a tile of cells over all channels, and finds the extremes of the tile.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    cell_sums_kernel(const __grid_constant__ ForwardParams<acc_type<scalar_t>> params) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = kVectorSize<scalar_t>;
  __shared__ acc_t tile_sums[kWarps][kTile<scalar_t>];
  const Place place = locate(params.tile_blocks, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const Terms& terms = params.terms;
  const int tiles = divide_up(level.cells, kTile<scalar_t>);
  const int image = place.block / tiles, first_cell = place.block % tiles * kTile<scalar_t>;
  const int count = min(kTile<scalar_t>, level.cells - first_cell);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first_channel = static_cast<int64_t>(image) * level.channels;
  const auto* student = static_cast<const scalar_t*>(level.inputs[kStudent]) + first_channel * level.cells;
  const auto* teacher = static_cast<const scalar_t*>(level.inputs[kTeacher]) + first_channel * level.cells;
  const Tile<scalar_t> tile{lane, level.vectors[kStudent] && level.vectors[kTeacher]};

  acc_t cell_sums[kCellSums] = {};  // of the cell first_cell + threadIdx.x, where it is in the tile
  if (!level.channels_last[kStudent]) {
    acc_t sums[kSize][kCellSums] = {};
#pragma unroll 2
    for (int c = warp; c < level.channels; c += kWarps) {
      const ChannelFactors<acc_t> factors(terms, level, first_channel + c);
      const int64_t start = static_cast<int64_t>(c) * level.cells + first_cell;
      acc_t S[kSize], T[kSize];
      tile.load(student + start, count, S);
      tile.load(teacher + start, count, T);
#pragma unroll
      for (int k = 0; k < kSize; ++k) factors.add(S[k], T[k], sums[k]);
    }
#pragma unroll
    for (int sum = 0; sum < kCellSums; ++sum) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kSize; ++k) tile_sums[warp][tile.index(k)] = sums[k][sum];
      __syncthreads();
      if (threadIdx.x < kTile<scalar_t>) {
        for (int other = 0; other < kWarps; ++other) cell_sums[sum] += tile_sums[other][threadIdx.x];
      }
    }
  } else {
    static_assert(kCellSums <= kWarps, "the sums of a tile share the memory of its warps");
    for (int cell = warp; cell < count; cell += kWarps) {
      acc_t sums[kCellSums] = {};
      const int64_t row = static_cast<int64_t>(first_cell + cell) * level.channels;
      for (int c = 0; c < level.channels; c += kTile<scalar_t>) {
        acc_t S[kSize], T[kSize];
        tile.load(student + row + c, level.channels - c, S);
        tile.load(teacher + row + c, level.channels - c, T);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          if (c + tile.index(k) >= level.channels) continue;
          ChannelFactors<acc_t>(terms, level, first_channel + c + tile.index(k)).add(S[k], T[k], sums);
        }
      }
#pragma unroll
      for (int sum = 0; sum < kCellSums; ++sum) {
        sums[sum] = reduce_warp(sums[sum], Plus{});
        if (lane == 0) tile_sums[sum][cell] = sums[sum];
      }
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < count) {
      for (int sum = 0; sum < kCellSums; ++sum) cell_sums[sum] = tile_sums[sum][threadIdx.x];
    }
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
}

// A box on the feature grid, relative to the first cell of its context.
template <typename acc_t>
struct ContextBox {
  int top, bottom, left, right;  // the context, clipped to the map
  double first_x, last_x, first_y, last_y;
  acc_t start_x, start_y, extent_x, extent_y, scale;

  __device__ __forceinline__ acc_t value(int y, int x) const {
    if (y < top || y >= bottom || x < left || x >= right) return 0;
    if (first_y <= y && y < last_y && first_x <= x && x < last_x) return scale;
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
      box.first_x = grid.x.first, box.last_x = grid.x.last, box.first_y = grid.y.first, box.last_y = grid.y.last;
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
  acc_t magnitude_scale;  // 1 / (C * temperature)

  __device__ __forceinline__ Chunk(const ForwardParams<acc_t>& params, const Place& place, int tile)
      : level(params.levels[place.level]),
        chunks(divide_up(level.cells, kChunkCells)),
        image(place.block / chunks),
        first_cell(place.block % chunks * kChunkCells),
        image_offset(static_cast<int64_t>(image) * level.cells),
        magnitude_scale(static_cast<acc_t>(1 / (params.terms.temperature * level.channels))) {
    const int tiles = divide_up(level.cells, tile);
    reduce_parts(level.extremes + static_cast<int64_t>(image) * tiles * kExtremes, tiles, -static_cast<acc_t>(HUGE_VAL),
                 extremes, Larger{});
    extremes[kStudentLow] = -extremes[kStudentLow];
    extremes[kTeacherLow] = -extremes[kTeacherLow];
    student_range = extremes[kStudentHigh] - extremes[kStudentLow];
    teacher_range = extremes[kTeacherHigh] - extremes[kTeacherLow];
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
    return exp((magnitude - extremes[kStudentMost]) * magnitude_scale);
  }
  __device__ __forceinline__ acc_t teacher_exp(acc_t magnitude) const {
    return exp((magnitude - extremes[kTeacherMost]) * magnitude_scale);
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
      if (terms.gradient != 0) {
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
    if (terms.attention != 0) sums[kStudentExp] += chunk.student_exp(level.cell_sums[kStudentMagnitude][cell]);
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
  const MapExtremes<acc_t> extremes{chunk.extremes[kStudentLow], chunk.extremes[kStudentHigh],
                                    first[kThroughLow] / first[kLows], -first[kThroughHigh] / first[kHighs]};
  const acc_t cells = static_cast<acc_t>(level.cells);
  const acc_t map_weight = static_cast<acc_t>(terms.gradient / level.cells);
  acc_t sums[kSecondSums] = {};
  chunk.for_each_cell([&](int64_t cell) {
    const acc_t teacher_unit =
        terms.needs_teacher_map() ? chunk.teacher_unit(level.cell_sums[kTeacherMap][cell], terms.relu) : acc_t{0};
    const acc_t teacher_attention =
        terms.needs_teacher_magnitude()
            ? cells * chunk.teacher_exp(level.cell_sums[kTeacherMagnitude][cell]) / first[kTeacherExp]
            : acc_t{0};
    if (terms.gradient != 0) {
      const acc_t g = level.cell_sums[kStudentMap][cell];
      const acc_t s = sign(chunk.student_unit(g, terms.relu) - teacher_unit);
      level.gradient_map[cell] = gradient_map_slope(g, s, extremes, map_weight, terms.relu);
    }
    if (terms.imitates()) {
      acc_t weight = 1;
      if (terms.weighting == Weighting::kAttention) weight = teacher_attention;
      if (terms.weighting == Weighting::kGradient && first[kTeacherUnit] != 0) {
        weight = cells * teacher_unit / first[kTeacherUnit];
      }
      const acc_t distance = weight * level.cell_sums[kDistance][cell];
      level.cell_weight[cell] = weight;
      if (terms.image != 0) sums[kImageDistance] += distance;
      if (terms.box != 0) sums[kBoxDistance] += distance * level.box_mask[cell];
    }
    if (terms.attention != 0) {
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
  const acc_t slope = static_cast<acc_t>(params.terms.attention / (params.terms.temperature * level.channels));
  const int64_t offset = static_cast<int64_t>(image) * level.cells;
  for (int k = threadIdx.x; k < kChunkCells; k += kThreads) {
    const int cell = place.block % chunks * kChunkCells + k;
    if (cell >= level.cells) return;
    const acc_t a = level.cell_attention[offset + cell];
    const acc_t difference = a - level.cell_sums[kTeacherMagnitude][offset + cell];
    level.cell_attention[offset + cell] = a * (sign(difference) - mean_sign) * slope;
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
    if (terms.attention != 0) {
      for (int image = threadIdx.x; image < params.images; image += kThreads) {
        second[kAttentionDistance] += level.channel_distance[image];
      }
    }
    reduce_block(first, Plus{});
    reduce_block(second, Plus{});
    losses[0] += static_cast<acc_t>(terms.gradient / level.cells) * first[0];
    losses[1] += static_cast<acc_t>(terms.box) * second[kBoxDistance];
    losses[2] += static_cast<acc_t>(terms.attention) * second[kAttentionDistance];
    losses[3] += static_cast<acc_t>(terms.image / level.cells) * second[kImageDistance];
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 4; ++k) params.losses[k] = losses[k];
}

// ---------------------------------------------------------------------------------------------------- backward

template <typename acc_t>
struct FactorSource {
  const Terms& terms;
  const LevelData<acc_t>& level;
  acc_t map, box, image;

  __device__ __forceinline__ FactorSource(const BackwardParams<acc_t>& params, const LevelData<acc_t>& level_data)
      : terms(params.terms),
        level(level_data),
        map(params.loss_gradients[0]),
        box(static_cast<acc_t>(2 * terms.box) * params.loss_gradients[1]),
        image(static_cast<acc_t>(2 * terms.image / level.cells) * params.loss_gradients[3]) {}

  __device__ __forceinline__ GradientFactors<acc_t> of_cell(int64_t cell) const {
    GradientFactors<acc_t> factors{};
    if (terms.imitates()) {
      factors.imitation = (image + (terms.box != 0 ? box * level.box_mask[cell] : acc_t{0})) * level.cell_weight[cell];
    }
    if (terms.gradient != 0) factors.map = map * level.gradient_map[cell];
    if (terms.attention != 0) factors.attention = level.cell_attention[cell];
    return factors;
  }

  __device__ __forceinline__ GradientFactors<acc_t> of_channel(int64_t channel) const {
    GradientFactors<acc_t> factors{};
    if (terms.imitates()) factors.imitation = level.channel_weight[channel];
    if (terms.gradient != 0) factors.map = level.alpha[channel];
    if (terms.attention != 0) factors.attention = level.channel_attention[channel];
    return factors;
  }
};

// A block writes a tile of cells of a group of channels, or a tile of cells of all channels of channels_last features.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 3)
    gradient_kernel(const __grid_constant__ BackwardParams<acc_type<scalar_t>> params) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = kVectorSize<scalar_t>;
  const Place place = locate(params.blocks, params.num_levels);
  const LevelData<acc_t>& level = params.levels[place.level];
  const FactorSource<acc_t> source(params, level);
  const acc_t attention = params.loss_gradients[2];
  const int tiles = divide_up(level.cells, kTile<scalar_t>);
  const int groups = level.channels_last[kStudent] ? 1 : divide_up(level.channels, kGradientChannels);
  const int first_cell = place.block % tiles * kTile<scalar_t>;
  const int group = place.block / tiles % groups, image = place.block / tiles / groups;
  const int count = min(kTile<scalar_t>, level.cells - first_cell);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t channel_offset = static_cast<int64_t>(image) * level.channels;
  const int64_t cell_offset = static_cast<int64_t>(image) * level.cells + first_cell;
  const int64_t image_offset = channel_offset * level.cells;
  const auto* student = static_cast<const scalar_t*>(level.inputs[kStudent]) + image_offset;
  const auto* teacher = static_cast<const scalar_t*>(level.inputs[kTeacher]) + image_offset;
  auto* gradient = static_cast<scalar_t*>(level.gradient) + image_offset;
  const Tile<scalar_t> tile{lane, level.vectors[kStudent] && level.vectors[kTeacher]};
  const auto write = [&](int64_t start, int limit, const auto& channel_factors, const auto& cell_factors) {
    acc_t S[kSize], T[kSize] = {};
    tile.load(student + start, limit, S);
    if (params.terms.imitates()) tile.load(teacher + start, limit, T);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      S[k] = feature_gradient(params.terms, S[k], T[k], channel_factors(k), cell_factors(k), attention);
    }
    tile.store(gradient + start, limit, S);
  };
  if (!level.channels_last[kStudent]) {
    GradientFactors<acc_t> of_cells[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      of_cells[k] = tile.index(k) < count ? source.of_cell(cell_offset + tile.index(k)) : GradientFactors<acc_t>{};
    }
    const int end = min(level.channels, (group + 1) * kGradientChannels);
#pragma unroll 2
    for (int c = group * kGradientChannels + warp; c < end; c += kWarps) {
      const GradientFactors<acc_t> of_channel = source.of_channel(channel_offset + c);
      write(
          static_cast<int64_t>(c) * level.cells + first_cell, count, [&](int) { return of_channel; },
          [&](int k) { return of_cells[k]; });
    }
  } else {
    for (int cell = warp; cell < count; cell += kWarps) {
      const GradientFactors<acc_t> of_cell = source.of_cell(cell_offset + cell);
      for (int c = 0; c < level.channels; c += kTile<scalar_t>) {
        write(
            static_cast<int64_t>(first_cell + cell) * level.channels + c, level.channels - c,
            [&](int k) {
              const int channel = c + tile.index(k);
              return channel < level.channels ? source.of_channel(channel_offset + channel) : GradientFactors<acc_t>{};
            },
            [&](int) { return of_cell; });
      }
    }
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
  if (params.terms.attention != 0) {
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
