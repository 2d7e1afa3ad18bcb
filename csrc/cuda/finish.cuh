// Everything that is small: from the sums over channels to the losses and to backward's state. Each kernel needs the
// sums over all blocks of one before it.
#pragma once

#include "blocks.cuh"
#include "kernels.h"
#include "reduce.cuh"

namespace gkd_d2 {
namespace {

// What the first two kernels share: a block takes a chunk of the cells of one image and level.
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
  // What a cell's difference of maps counts.
  __device__ __forceinline__ acc_t map_share(const Terms& terms, int64_t cell) const {
    return terms.map_in_boxes ? sqrt(level.box_mask[cell]) : acc_t{1};
  }
  // The teacher's map times its attention, up to a factor that cells share.
  __device__ __forceinline__ acc_t attended(acc_t unit, int64_t cell, acc_t most) const {
    return unit * exp(attended_exponent(level.cell_sums[kTeacherMagnitude][cell], most, level.magnitude_scale));
  }
  __device__ __forceinline__ acc_t student_exp(acc_t magnitude) const {
    return exp((magnitude - extremes[kStudentMost]) * level.magnitude_scale);
  }
  __device__ __forceinline__ acc_t teacher_exp(acc_t magnitude) const {
    return exp((magnitude - extremes[kTeacherMost]) * level.magnitude_scale);
  }
};

// v under Weighting::kAttentionGradient of a cell is its part of `total`: attended() about `most`.
template <typename acc_t>
struct AttendedWeights {
  acc_t most, total;

  // Of a chunk, which is left in its part of attended_sums.
  __device__ __forceinline__ static void sum_chunk(const Chunk<acc_t>& chunk, bool relu) {
    const LevelData<acc_t>& level = chunk.level;
    acc_t most[1] = {-static_cast<acc_t>(HUGE_VAL)}, total[1] = {0};
    chunk.for_each_cell([&](int64_t cell) {
      if (chunk.teacher_unit(level.cell_sums[kTeacherMap][cell], relu) > 0) {
        most[0] = Larger{}(level.cell_sums[kTeacherMagnitude][cell], most[0]);
      }
    });
    reduce_block(most, Larger{});
    chunk.for_each_cell([&](int64_t cell) {
      total[0] += chunk.attended(chunk.teacher_unit(level.cell_sums[kTeacherMap][cell], relu), cell, most[0]);
    });
    reduce_block(total, Plus{});
    if (threadIdx.x != 0) return;
    acc_t* const part = chunk.part(level.attended_sums, kAttendedSums);
    part[kAttendedMost] = most[0];
    part[kAttendedTotal] = total[0];
  }

  // Of an image, from all its chunks.
  __device__ __forceinline__ static AttendedWeights of_image(const Chunk<acc_t>& chunk) {
    const acc_t* parts = chunk.all_parts(chunk.level.attended_sums, kAttendedSums);
    acc_t value[1] = {-static_cast<acc_t>(HUGE_VAL)};
    for (int i = threadIdx.x; i < chunk.chunks; i += kThreads) {
      value[0] = Larger{}(parts[i * kAttendedSums + kAttendedMost], value[0]);
    }
    reduce_block(value, Larger{});
    const acc_t most = value[0];
    value[0] = 0;
    for (int i = threadIdx.x; i < chunk.chunks; i += kThreads) {
      const acc_t* part = parts + i * kAttendedSums;
      // A chunk without a cell that counts has no most either.
      if (part[kAttendedTotal] == 0) continue;
      value[0] += part[kAttendedTotal] * exp((part[kAttendedMost] - most) * chunk.level.magnitude_scale);
    }
    reduce_block(value, Plus{});
    return {most, value[0]};
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
        const acc_t share = chunk.map_share(terms, cell), s = share * sign(student - teacher);
        sums[kMapDistance] += share * absolute(student - teacher);
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
  if (terms.weighs_by(Weighting::kAttentionGradient)) AttendedWeights<acc_t>::sum_chunk(chunk, terms.relu);
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
  const bool attends = terms.weighs_by(Weighting::kAttentionGradient);
  const auto attended = attends ? AttendedWeights<acc_t>::of_image(chunk) : AttendedWeights<acc_t>{};
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
      const acc_t s = chunk.map_share(terms, cell) * sign(chunk.student_unit(g, terms.relu) - teacher_unit);
      level.gradient_map[cell] = gradient_map_slope(g, s, extremes, level.gradient_weight, terms.relu);
    }
    if (terms.imitates()) {
      acc_t weight = 1;
      if (terms.weighting == Weighting::kAttention) weight = teacher_attention;
      if (terms.weighting == Weighting::kGradient && first[kTeacherUnit] != 0) {
        weight = cells * teacher_unit / first[kTeacherUnit];
      }
      if (attends && attended.total != 0) {
        weight = cells * chunk.attended(teacher_unit, cell, attended.most) / attended.total;
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

}  // namespace

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

}  // namespace gkd_d2
