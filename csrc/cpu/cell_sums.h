// Everything that is summed over channels, in one reading of S and T.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace gkd_d2 {
namespace {

// What one channel of a contiguous map, or `kChannels` at a time, add to the cells' sums.
template <typename scalar_t, int kChannels>
GKD_INLINE void sum_contiguous(const CellSumTask<scalar_t>& task, int64_t channel,
                               acc_type<scalar_t> (*cell_sums)[kSumCells]) {
  using acc_t = acc_type<scalar_t>;
  const int64_t start = channel * task.cells + task.begin;
  Vector<acc_t> student_alpha[kChannels], teacher_alpha[kChannels], weight[kChannels];
  Vector<acc_t> student_sum[kChannels] = {}, teacher_sum[kChannels] = {};
  for (int k = 0; k < kChannels; ++k) {
    if (task.maps) {
      student_alpha[k] = broadcast(task.student_alpha[channel + k]);
      teacher_alpha[k] = broadcast(task.teacher_alpha[channel + k]);
    }
    if (task.distance) weight[k] = broadcast(task.channel_weight[channel + k]);
  }
  for_each_vector<acc_t>(task.end - task.begin, [&](auto lanes, int64_t i) {
    Vector<acc_t> student[kChannels], teacher[kChannels];
    for (int k = 0; k < kChannels; ++k) {
      student[k] = lanes.load(task.student + start + k * task.cells + i);
      teacher[k] = lanes.load(task.teacher + start + k * task.cells + i);
    }
    if (task.maps) {
      Vector<acc_t> student_map = load(cell_sums[kStudentMap] + i);
      Vector<acc_t> teacher_map = load(cell_sums[kTeacherMap] + i);
      for (int k = 0; k < kChannels; ++k) {
        student_map += student_alpha[k] * student[k];
        teacher_map += teacher_alpha[k] * teacher[k];
      }
      store(cell_sums[kStudentMap] + i, student_map);
      store(cell_sums[kTeacherMap] + i, teacher_map);
    }
    if (task.distance) {
      Vector<acc_t> distance = load(cell_sums[kDistance] + i);
      for (int k = 0; k < kChannels; ++k) {
        const Vector<acc_t> difference = student[k] - teacher[k];
        distance += weight[k] * difference * difference;
      }
      store(cell_sums[kDistance] + i, distance);
    }
    if (task.magnitudes) {
      Vector<acc_t> student_magnitude = load(cell_sums[kStudentMagnitude] + i);
      Vector<acc_t> teacher_magnitude = load(cell_sums[kTeacherMagnitude] + i);
      for (int k = 0; k < kChannels; ++k) {
        student[k] = absolute(student[k]);
        teacher[k] = absolute(teacher[k]);
        student_sum[k] += student[k];
        teacher_sum[k] += teacher[k];
        student_magnitude += student[k];
        teacher_magnitude += teacher[k];
      }
      store(cell_sums[kStudentMagnitude] + i, student_magnitude);
      store(cell_sums[kTeacherMagnitude] + i, teacher_magnitude);
    }
  });
  if (task.magnitudes) {
    for (int k = 0; k < kChannels; ++k) {
      task.student_channel_sums[channel + k] = horizontal_sum(student_sum[k]);
      task.teacher_channel_sums[channel + k] = horizontal_sum(teacher_sum[k]);
    }
  }
}

// What one cell of a channels_last map adds up to, and what it adds to the channels' sums. Memory is read in a straight
// line: several cells at a time would save loads from the caches, but upset the prefetching into them.
template <typename scalar_t>
GKD_INLINE void sum_channels_last(const CellSumTask<scalar_t>& task, int64_t cell) {
  using acc_t = acc_type<scalar_t>;
  Vector<acc_t> sums[kCellSums] = {};
  for_each_vector<acc_t>(task.channels, [&](auto lanes, int64_t c) {
    Vector<acc_t> student = lanes.load(task.student + cell * task.channels + c);
    Vector<acc_t> teacher = lanes.load(task.teacher + cell * task.channels + c);
    if (task.maps) {
      sums[kStudentMap] += lanes.load(task.student_alpha + c) * student;
      sums[kTeacherMap] += lanes.load(task.teacher_alpha + c) * teacher;
    }
    if (task.distance) {
      const Vector<acc_t> difference = student - teacher;
      sums[kDistance] += lanes.load(task.channel_weight + c) * difference * difference;
    }
    if (task.magnitudes) {
      student = absolute(student);
      teacher = absolute(teacher);
      sums[kStudentMagnitude] += student;
      sums[kTeacherMagnitude] += teacher;
      lanes.store(task.student_channel_sums + c, lanes.load(task.student_channel_sums + c) + student);
      lanes.store(task.teacher_channel_sums + c, lanes.load(task.teacher_channel_sums + c) + teacher);
    }
  });
  for (int sum = 0; sum < kCellSums; ++sum) {
    if (task.cell_sums[sum] != nullptr) task.cell_sums[sum][cell] = horizontal_sum(sums[sum]);
  }
}

// What rounding alone may make of the range of a map, from the first cell of its image.
template <typename scalar_t>
acc_type<scalar_t> map_noise(const scalar_t* feature, int64_t stride, const acc_type<scalar_t>* alpha,
                             int64_t channels) {
  using acc_t = acc_type<scalar_t>;
  Vector<acc_t> noise{};
  for_each_vector<acc_t>(channels, [&](auto lanes, int64_t c) {
    scalar_t of_lanes[kLanes<acc_t>] = {};
    const int64_t count = channels - c < kLanes<acc_t> ? channels - c : kLanes<acc_t>;
    for (int64_t lane = 0; lane < count; ++lane) of_lanes[lane] = feature[(c + lane) * stride];
    noise += MapNoise<acc_t>::share(lanes.load(alpha + c), load(of_lanes));
  });
  return horizontal_sum(noise);
}

template <typename scalar_t>
void cell_sums_kernel(const CellSumTask<scalar_t>& task) {
  using acc_t = acc_type<scalar_t>;
  if (task.maps && task.begin == 0) {
    const int64_t stride = task.channels_last ? 1 : task.cells;
    *task.student_noise = map_noise(task.student, stride, task.student_alpha, task.channels);
    *task.teacher_noise = map_noise(task.teacher, stride, task.teacher_alpha, task.channels);
  }
  if (task.channels_last) {
    if (task.magnitudes) {
      for (int64_t c = 0; c < task.channels; ++c) task.student_channel_sums[c] = task.teacher_channel_sums[c] = 0;
    }
    for (int64_t cell = task.begin; cell < task.end; ++cell) sum_channels_last(task, cell);
    return;
  }
  alignas(64) acc_t cell_sums[kCellSums][kSumCells];
  const int64_t cells = task.end - task.begin;
  const int64_t padded = (cells + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>;
  for (int sum = 0; sum < kCellSums; ++sum) {
    for (int64_t i = 0; i < padded; ++i) cell_sums[sum][i] = 0;
  }
  constexpr int kChannels = 4;
  int64_t channel = 0;
  for (; channel + kChannels <= task.channels; channel += kChannels) {
    sum_contiguous<scalar_t, kChannels>(task, channel, cell_sums);
  }
  for (; channel < task.channels; ++channel) sum_contiguous<scalar_t, 1>(task, channel, cell_sums);
  for (int sum = 0; sum < kCellSums; ++sum) {
    if (task.cell_sums[sum] == nullptr) continue;
    std::memcpy(task.cell_sums[sum] + task.begin, cell_sums[sum], static_cast<size_t>(cells) * sizeof(acc_t));
  }
}

}  // namespace
}  // namespace gkd_d2
