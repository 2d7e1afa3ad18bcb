// Everything that is small: from the sums over channels to the losses and to backward's state.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "lanes.h"

namespace gkd_d2 {
namespace {

// min and max of G, and its range
template <typename acc_t>
MapExtremes<acc_t> map_extremes(const acc_t* map, int64_t count, bool relu, acc_t noise) {
  Vector<acc_t> low = broadcast(rectified(map[0], relu)), high = low;
  for_each_vector<acc_t>(count, [&](auto lanes, int64_t i) {
    const Vector<acc_t> value = lanes.keep(rectified(lanes.load(map + i), relu), low);
    low = smaller(value, low);
    high = larger(lanes.keep(value, high), high);
  });
  MapExtremes<acc_t> extremes{low[0], high[0], 0, 0, 0};
  for (int lane = 1; lane < kLanes<acc_t>; ++lane) {
    extremes.low = low[lane] < extremes.low ? low[lane] : extremes.low;
    extremes.high = high[lane] > extremes.high ? high[lane] : extremes.high;
  }
  extremes.range = map_range(extremes.low, extremes.high, noise);
  return extremes;
}

// loss_gkd_gradient and its gradient with respect to g_S.
template <typename acc_t>
double finish_maps(const FinishTask<acc_t>& task, MapExtremes<acc_t>& student, const MapExtremes<acc_t>& teacher) {
  const acc_t* student_map = task.cell_sums[kStudentMap];
  const acc_t* teacher_map = task.cell_sums[kTeacherMap];
  const bool relu = task.terms.relu, in_boxes = task.terms.map_in_boxes;
  const double weight = task.terms.map_weight(task.cells);
  LongSum<acc_t> distance, through_low, through_high, lows, highs;
  const Vector<acc_t> zero{}, one = zero + 1;
  const auto share = [&](auto lanes, int64_t i) { return in_boxes ? square_root(lanes.load(task.box_mask + i)) : one; };
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    const Vector<acc_t> G = rectified(lanes.load(student_map + i), relu);
    const Vector<acc_t> unit = unit_range(G, student.low, student.range);
    const Vector<acc_t> difference =
        lanes.keep(unit - unit_range(rectified(lanes.load(teacher_map + i), relu), teacher.low, teacher.range));
    const Vector<acc_t> of_cell = share(lanes, i), s = sign(difference) * of_cell;
    distance.add(absolute(difference) * of_cell);
    through_low.add(s * (unit - one));
    through_high.add(s * unit);
    lows.add(lanes.keep(G == student.low ? one : zero));
    highs.add(lanes.keep(G == student.high ? one : zero));
  });
  student.low_share = static_cast<acc_t>(through_low.total() / lows.total());
  student.high_share = static_cast<acc_t>(-through_high.total() / highs.total());
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    const Vector<acc_t> g = lanes.load(student_map + i);
    const Vector<acc_t> s = sign(unit_range(rectified(g, relu), student.low, student.range) -
                                 unit_range(rectified(lanes.load(teacher_map + i), relu), teacher.low, teacher.range)) *
                            share(lanes, i);
    lanes.store(task.gradient_map + i, gradient_map_slope(g, s, student, static_cast<acc_t>(weight), relu));
  });
  return weight * distance.total();
}

// Multiplies the teacher's map in `weights` by its attention, up to a factor; returns the sum.
template <typename acc_t>
double attend(const FinishTask<acc_t>& task, acc_t* weights) {
  const acc_t* magnitudes = task.cell_sums[kTeacherMagnitude];
  const acc_t scale = static_cast<acc_t>(1 / (task.terms.temperature * static_cast<double>(task.channels)));
  const Vector<acc_t> nothing = broadcast(-std::numeric_limits<acc_t>::infinity());
  Vector<acc_t> largest = nothing;
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    largest = larger(lanes.load(weights + i) > 0 ? lanes.load(magnitudes + i) : nothing, largest);
  });
  acc_t most = largest[0];
  for (int lane = 1; lane < kLanes<acc_t>; ++lane) most = largest[lane] > most ? largest[lane] : most;
  LongSum<acc_t> sum;
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    const Vector<acc_t> exponent = attended_exponent(lanes.load(magnitudes + i), most, scale);
    const Vector<acc_t> value = lanes.load(weights + i) * exp_nonpositive(exponent);
    lanes.store(weights + i, value);
    sum.add(lanes.keep(value));
  });
  return sum.total();
}

// v
template <typename acc_t>
void finish_cell_weights(const FinishTask<acc_t>& task, const MapExtremes<acc_t>& extremes) {
  acc_t* const weights = task.cell_weight;
  if (task.terms.weighting == Weighting::kAttention) {
    std::memcpy(weights, task.cell_sums[kTeacherMagnitude], static_cast<size_t>(task.cells) * sizeof(acc_t));
    attention_weights_kernel(weights, task.cells, task.terms.temperature * static_cast<double>(task.channels));
    return;
  }
  double total = 0;
  if (task.terms.weighs_by_map()) {
    const acc_t* map = task.cell_sums[kTeacherMap];
    LongSum<acc_t> sum;
    for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
      const Vector<acc_t> G = rectified(lanes.load(map + i), task.terms.relu);
      const Vector<acc_t> unit = lanes.keep(unit_range(G, extremes.low, extremes.range));
      lanes.store(weights + i, unit);
      sum.add(unit);
    });
    total = task.terms.weighting == Weighting::kGradient ? sum.total() : attend(task, weights);
  }
  const acc_t factor = static_cast<acc_t>(static_cast<double>(task.cells) / total);
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    lanes.store(weights + i, total == 0 ? Vector<acc_t>{} + 1 : lanes.load(weights + i) * factor);
  });
}

template <typename acc_t>
void finish_kernel(FinishTask<acc_t>& task) {
  const Terms& terms = task.terms;
  const double cells = static_cast<double>(task.cells), channels = static_cast<double>(task.channels);
  for (double& loss : task.losses) loss = 0;
  MapExtremes<acc_t> teacher{};
  if (terms.needs_teacher_map()) {
    teacher = map_extremes(task.cell_sums[kTeacherMap], task.cells, terms.relu, task.teacher_noise);
  }
  if (terms.has_gradient) {
    MapExtremes<acc_t> student = map_extremes(task.cell_sums[kStudentMap], task.cells, terms.relu, task.student_noise);
    task.losses[0] = finish_maps(task, student, teacher);
  }
  if (terms.imitates()) {
    finish_cell_weights(task, teacher);
    LongSum<acc_t> box, image;
    for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
      const Vector<acc_t> weighted = lanes.load(task.cell_sums[kDistance] + i) * lanes.load(task.cell_weight + i);
      if (terms.has_image) image.add(weighted);
      if (terms.has_box) box.add(weighted * lanes.load(task.box_mask + i));
    });
    task.losses[1] = terms.box * box.total();
    task.losses[3] = terms.image / cells * image.total();
  }
  if (terms.has_attention) {
    const double in_channels =
        attention_distance(task.student_channel_means, task.teacher_channel_means, task.channels, 1 / terms.temperature,
                           terms.attention / cells, task.channel_attention);
    const double in_cells =
        attention_distance(task.cell_sums[kStudentMagnitude], task.cell_sums[kTeacherMagnitude], task.cells,
                           1 / (terms.temperature * channels), terms.attention, task.cell_attention);
    task.losses[2] = terms.attention * (in_channels + in_cells);
  }
}

}  // namespace
}  // namespace gkd_d2
