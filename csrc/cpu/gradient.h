// Backward: the gradient with respect to S.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace gkd_d2 {
namespace {

// Where backward's factors of cells and of channels come from: the state, and the losses' incoming gradients.
template <typename scalar_t>
struct FactorSource {
  using acc_t = acc_type<scalar_t>;
  using Factors = GradientFactors<Vector<acc_t>>;
  const GradientTask<scalar_t>& task;
  Terms terms;
  Vector<acc_t> box, image, map, attention;

  explicit FactorSource(const GradientTask<scalar_t>& gradient_task)
      : task(gradient_task),
        terms(task.terms),
        box(broadcast(static_cast<acc_t>(2 * terms.box * task.loss_gradients[1]))),
        image(
            broadcast(static_cast<acc_t>(2 * terms.image / static_cast<double>(task.cells) * task.loss_gradients[3]))),
        map(broadcast(static_cast<acc_t>(task.loss_gradients[0]))),
        attention(broadcast(static_cast<acc_t>(task.loss_gradients[2]))) {}

  // `load` gives a vector of successive values, or one value in all lanes.
  template <typename load_t>
  GKD_INLINE Factors of_cell(const load_t& load) const {
    Factors factors{};
    if (terms.imitates()) {
      factors.imitation = image;
      if (terms.has_box) factors.imitation += load(task.box_mask) * box;
      factors.imitation *= load(task.cell_weight);
    }
    if (terms.has_gradient) factors.map = load(task.gradient_map) * map;
    if (terms.has_attention) factors.attention = load(task.cell_attention) * attention;
    return factors;
  }

  template <typename load_t>
  GKD_INLINE Factors of_channel(const load_t& load) const {
    Factors factors{};
    if (terms.imitates()) factors.imitation = load(task.channel_weight);
    if (terms.has_gradient) factors.map = load(task.alpha);
    if (terms.has_attention) factors.attention = load(task.channel_attention) * attention;
    return factors;
  }
};

// Rows of the gradient, `stride` elements apart: `count` elements each in memory order. The elements of row k share the
// factors row_factors[k]; those of a column share column_factors(lanes, i), which is evaluated once for all rows.
template <typename scalar_t, int kRows, typename function_t>
GKD_INLINE void gradient_rows(const GradientTask<scalar_t>& task, int64_t start, int64_t stride, int64_t count,
                              const GradientFactors<Vector<acc_type<scalar_t>>>* row_factors,
                              const function_t& column_factors) {
  using acc_t = acc_type<scalar_t>;
  constexpr int64_t kStep = kLanes<acc_t>;
  const Terms terms = task.terms;
  const scalar_t* student = task.student + start;
  const scalar_t* teacher = task.teacher + start;
  scalar_t* gradient = task.gradient + start;
  const auto compute = [&](auto lanes, int64_t i, const auto& write) {
    const GradientFactors<Vector<acc_t>> shared = column_factors(lanes, i);
    for (int k = 0; k < kRows; ++k) {
      const Vector<acc_t> S = lanes.load(student + k * stride + i);
      const Vector<acc_t> T = terms.imitates() ? lanes.load(teacher + k * stride + i) : Vector<acc_t>{};
      write(gradient + k * stride + i, feature_gradient(terms, S, T, row_factors[k], shared));
    }
  };
  const auto store_vector = [](scalar_t* to, Vector<acc_t> value) { store(to, value); };
  if (count < kStep) {
    return compute(FirstLanes<acc_t>{count}, 0,
                   [&](scalar_t* to, Vector<acc_t> value) { store_first(to, value, count); });
  }
  // Whole vectors at both ends may overlap those between them: they store the same values.
  constexpr uintptr_t kBytes = kStep * sizeof(scalar_t);
  int64_t i = 0;
  if (task.streaming && static_cast<uintptr_t>(stride) * sizeof(scalar_t) % kBytes == 0) {
    const uintptr_t past = reinterpret_cast<uintptr_t>(gradient) % kBytes;
    if (past != 0) {
      compute(AllLanes<acc_t>{}, 0, store_vector);
      i = static_cast<int64_t>((kBytes - past) / sizeof(scalar_t));
    }
    for (; i + kStep <= count; i += kStep) {
      compute(AllLanes<acc_t>{}, i, [](scalar_t* to, Vector<acc_t> value) { store_streaming(to, value); });
    }
  } else {
    for (; i + kStep <= count; i += kStep) compute(AllLanes<acc_t>{}, i, store_vector);
  }
  if (i < count) compute(AllLanes<acc_t>{}, count - kStep, store_vector);
}

template <typename scalar_t>
void gradient_kernel(const GradientTask<scalar_t>& task) {
  using acc_t = acc_type<scalar_t>;
  const FactorSource<scalar_t> source(task);
  const auto one = [](int64_t i) { return [i](const acc_t* values) { return broadcast(values[i]); }; };
  if (task.channels_last) {
    const auto of_channels = [&](auto lanes, int64_t c) {
      return source.of_channel([&](const acc_t* values) { return lanes.load(values + c); });
    };
    // One row at a time, for memory is best read and written in a straight line.
    for (int64_t cell = task.begin; cell < task.end; ++cell) {
      const GradientFactors<Vector<acc_t>> factors = source.of_cell(one(cell));
      gradient_rows<scalar_t, 1>(task, cell * task.channels, 0, task.channels, &factors, of_channels);
    }
  } else {
    const auto of_cells = [&](auto lanes, int64_t i) {
      return source.of_cell([&](const acc_t* values) { return lanes.load(values + task.begin + i); });
    };
    const int64_t cells = task.end - task.begin;
    constexpr int kRows = 4;
    int64_t c = task.channel_begin;
    for (; c + kRows <= task.channel_end; c += kRows) {
      const GradientFactors<Vector<acc_t>> factors[kRows] = {source.of_channel(one(c)), source.of_channel(one(c + 1)),
                                                             source.of_channel(one(c + 2)),
                                                             source.of_channel(one(c + 3))};
      gradient_rows<scalar_t, kRows>(task, c * task.cells + task.begin, task.cells, cells, factors, of_cells);
    }
    for (; c < task.channel_end; ++c) {
      const GradientFactors<Vector<acc_t>> factors = source.of_channel(one(c));
      gradient_rows<scalar_t, 1>(task, c * task.cells + task.begin, 0, cells, &factors, of_cells);
    }
  }
  if (task.streaming) fence_streaming_stores();
}

}  // namespace
}  // namespace gkd_d2
