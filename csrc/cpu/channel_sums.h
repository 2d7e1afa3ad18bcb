// The sums over cells of every channel.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace gkd_d2 {
namespace {

template <typename scalar_t>
acc_type<scalar_t> sum_row(const scalar_t* row, int64_t count, bool absolute_values) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kChains = 4;
  const auto value_of = [absolute_values](Vector<acc_t> x) { return absolute_values ? absolute(x) : x; };
  Vector<acc_t> chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes<acc_t> <= count; i += kChains * kLanes<acc_t>) {
    for (int k = 0; k < kChains; ++k) chains[k] += value_of(load(row + i + k * kLanes<acc_t>));
  }
  for_each_vector<acc_t>(count - i, [&](auto lanes, int64_t j) { chains[0] += value_of(lanes.load(row + i + j)); });
  return horizontal_sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
}

template <typename scalar_t>
void channel_sums_kernel(const ChannelSumTask<scalar_t>& task) {
  using acc_t = acc_type<scalar_t>;
  if (!task.channels_last) {
    for (int64_t c = task.begin; c < task.end; ++c) {
      task.sums[c - task.begin] = sum_row(task.input + c * task.cells, task.cells, task.absolute);
    }
    return;
  }
  const auto value_of = [&task](Vector<acc_t> x) { return task.absolute ? absolute(x) : x; };
  for (int64_t c = 0; c < task.channels; ++c) task.sums[c] = 0;
  for (int64_t cell = task.begin; cell < task.end; ++cell) {
    const scalar_t* input = task.input + cell * task.channels;
    for_each_vector<acc_t>(task.channels, [&](auto lanes, int64_t c) {
      lanes.store(task.sums + c, lanes.load(task.sums + c) + value_of(lanes.load(input + c)));
    });
  }
}

}  // namespace
}  // namespace gkd_d2
