// The kernels, compiled once per instruction set: see simd.h for what the includer defines.
#pragma once

#include "simd.h"

namespace gkd_d2 {
namespace {

// Ways to walk over a run of elements: whole vectors, then the rest in one vector whose last lanes are void.
template <typename acc_t>
struct AllLanes {
  template <typename scalar_t>
  GKD_INLINE Vector<acc_t> load(const scalar_t* from) const {
    return gkd_d2::load(from);
  }
  GKD_INLINE void store(acc_t* to, Vector<acc_t> value) const { gkd_d2::store(to, value); }
  GKD_INLINE Vector<acc_t> keep(Vector<acc_t> value, Vector<acc_t> = Vector<acc_t>{}) const { return value; }
};

template <typename acc_t>
struct FirstLanes {
  int64_t count;

  template <typename scalar_t>
  GKD_INLINE Vector<acc_t> load(const scalar_t* from) const {
    return load_first(from, count);
  }
  GKD_INLINE void store(acc_t* to, Vector<acc_t> value) const { store_first(to, value, count); }
  // `value` in the lanes that count, `other` in the void ones.
  GKD_INLINE Vector<acc_t> keep(Vector<acc_t> value, Vector<acc_t> other = Vector<acc_t>{}) const {
    for (int64_t lane = count; lane < kLanes<acc_t>; ++lane) value[lane] = other[lane];
    return value;
  }
};

template <typename acc_t, typename function_t>
GKD_INLINE void for_each_vector(int64_t count, const function_t& function) {
  int64_t i = 0;
  for (; i + kLanes<acc_t> <= count; i += kLanes<acc_t>) function(AllLanes<acc_t>{}, i);
  if (i < count) function(FirstLanes<acc_t>{count - i}, i);
}

// A long sum: vectors are added up in acc_t for a while, and the totals of these runs in double.
template <typename acc_t>
class LongSum {
 public:
  GKD_INLINE void add(Vector<acc_t> value) {
    run_ += value;
    if (++length_ == kRun) flush();
  }
  GKD_INLINE double total() {
    flush();
    return total_;
  }

 private:
  static constexpr int kRun = 64;
  GKD_INLINE void flush() {
    total_ += static_cast<double>(horizontal_sum(run_));
    run_ = Vector<acc_t>{};
    length_ = 0;
  }
  Vector<acc_t> run_{};
  double total_ = 0;
  int length_ = 0;
};

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
void sum_channels_kernel(const ChannelSumTask<scalar_t>& task) {
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

// What one channel of a contiguous map, or `kChannels` at a time, add to the cells' sums.
template <typename scalar_t, int kChannels>
GKD_INLINE void sum_contiguous(const SumTask<scalar_t>& task, int64_t channel,
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
GKD_INLINE void sum_channels_last(const SumTask<scalar_t>& task, int64_t cell) {
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
void sum_kernel(const SumTask<scalar_t>& task) {
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

// The cells of a mask that are worked on together along x.
constexpr int64_t kMaskColumns = 512;

// exp(-((x - centre)/extent)^2 / 2) at the centres of the cells [begin, end), then zeros up to a whole vector.
template <typename acc_t>
GKD_INLINE void fill_gaussian(const GridSpan& span, int64_t begin, int64_t end, acc_t* values) {
  const acc_t start = static_cast<acc_t>(static_cast<double>(begin) + 0.5 - span.centre());
  const acc_t extent = static_cast<acc_t>(span.extent());
  Vector<acc_t> lane;
  for (int i = 0; i < kLanes<acc_t>; ++i) lane[i] = static_cast<acc_t>(i);
  for (int64_t i = 0; i < end - begin; i += kLanes<acc_t>) {
    const Vector<acc_t> distance = (lane + (start + static_cast<acc_t>(i))) / extent;
    const Vector<acc_t> value = exp_nonpositive(distance * distance * static_cast<acc_t>(-0.5));
    store(values + i, lane + static_cast<acc_t>(i) < static_cast<acc_t>(end - begin) ? value : Vector<acc_t>{});
  }
}

template <typename acc_t>
void fill_mask_kernel(const MaskTask<acc_t>& task) {
  for (int64_t i = task.begin * task.width; i < task.end * task.width; ++i) task.mask[i] = 0;
  acc_t* const mask_end = task.mask + task.end * task.width;
  alignas(64) acc_t gauss_y[kMaskRows], gauss_x[kMaskColumns], inside_x[kMaskColumns];
  for (int64_t index = 0; index < task.count; ++index) {
    const double* xyxy = task.boxes + 4 * index;
    if (!GridBox::usable(xyxy)) continue;
    const GridBox box(xyxy, task.height, task.width, task.image_height, task.image_width);
    const int64_t context_top = box.y.context_begin(task.height), context_bottom = box.y.context_end(task.height);
    const int64_t top = context_top > task.begin ? context_top : task.begin;
    const int64_t bottom = context_bottom < task.end ? context_bottom : task.end;
    if (top >= bottom) continue;
    fill_gaussian(box.y, top, bottom, gauss_y);
    const int64_t right = box.x.context_end(task.width);
    for (int64_t x = box.x.context_begin(task.width); x < right; x += kMaskColumns) {
      const int64_t columns = right - x < kMaskColumns ? right - x : kMaskColumns;
      fill_gaussian(box.x, x, x + columns, gauss_x);
      for (int64_t i = 0; i < (columns + kLanes<acc_t> - 1) / kLanes<acc_t> * kLanes<acc_t>; ++i) {
        inside_x[i] = i < columns && box.x.holds(x + i) ? 1 : 0;
      }
      const acc_t scale = static_cast<acc_t>(box.scale());
      for (int64_t y = top; y < bottom; ++y) {
        // Inside the box the Gaussian, which is at most 1, gives way to 1. The lanes beyond the context hold 0, so a
        // whole vector may cover cells beside it.
        const bool inside_y = box.y.holds(y);
        const acc_t row = gauss_y[y - top] * scale;
        acc_t* const mask = task.mask + y * task.width + x;
        const auto raise = [&](auto lanes, int64_t i) {
          Vector<acc_t> value = load(gauss_x + i) * row;
          if (inside_y) value = larger(value, load(inside_x + i) * scale);
          lanes.store(mask + i, larger(lanes.load(mask + i), value));
        };
        for (int64_t i = 0; i < columns; i += kLanes<acc_t>) {
          if (mask + i + kLanes<acc_t> <= mask_end) {
            raise(AllLanes<acc_t>{}, i);
          } else {
            raise(FirstLanes<acc_t>{mask_end - (mask + i)}, i);
          }
        }
      }
    }
  }
}

// exp((x - max) * scale) of `values` in place; returns the sum.
template <typename acc_t>
double exponentials(acc_t* values, int64_t count, double scale) {
  Vector<acc_t> most = broadcast(values[0]);
  for_each_vector<acc_t>(count,
                         [&](auto lanes, int64_t i) { most = larger(lanes.keep(lanes.load(values + i), most), most); });
  acc_t highest = most[0];
  for (int lane = 1; lane < kLanes<acc_t>; ++lane) highest = most[lane] > highest ? most[lane] : highest;
  LongSum<acc_t> sum;
  for_each_vector<acc_t>(count, [&](auto lanes, int64_t i) {
    const Vector<acc_t> value = exp_nonpositive((lanes.load(values + i) - highest) * static_cast<acc_t>(scale));
    lanes.store(values + i, value);
    sum.add(lanes.keep(value));
  });
  return sum.total();
}

// count * softmax(values / temperature), in place
template <typename acc_t>
void attention_weights_kernel(acc_t* values, int64_t count, double temperature) {
  const acc_t factor = static_cast<acc_t>(static_cast<double>(count) / exponentials(values, count, 1 / temperature));
  for_each_vector<acc_t>(count,
                         [&](auto lanes, int64_t i) { lanes.store(values + i, lanes.load(values + i) * factor); });
}

// sum of |A(S) - A(T)| with A(F) = count * softmax(F * scale), and `slopes`, its gradient with respect to `student`
// times `weight`. `student` and `teacher` are overwritten with A.
template <typename acc_t>
double attention_distance(acc_t* student, acc_t* teacher, int64_t count, double scale, double weight, acc_t* slopes) {
  const acc_t student_factor = static_cast<acc_t>(static_cast<double>(count) / exponentials(student, count, scale));
  const acc_t teacher_factor = static_cast<acc_t>(static_cast<double>(count) / exponentials(teacher, count, scale));
  LongSum<acc_t> distance, mean_sign;
  for_each_vector<acc_t>(count, [&](auto lanes, int64_t i) {
    const Vector<acc_t> a = lanes.load(student + i) * student_factor;
    const Vector<acc_t> b = lanes.load(teacher + i) * teacher_factor;
    lanes.store(student + i, a);
    lanes.store(teacher + i, b);
    distance.add(absolute(a - b));
    mean_sign.add(a * sign(a - b));
  });
  const acc_t mean = static_cast<acc_t>(mean_sign.total() / static_cast<double>(count));
  const acc_t slope = static_cast<acc_t>(weight * scale);
  for_each_vector<acc_t>(count, [&](auto lanes, int64_t i) {
    const Vector<acc_t> a = lanes.load(student + i);
    lanes.store(slopes + i, a * (sign(a - lanes.load(teacher + i)) - mean) * slope);
  });
  return distance.total();
}

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
  const bool relu = task.terms.relu;
  const double weight = task.terms.gradient / static_cast<double>(task.cells);
  LongSum<acc_t> distance, through_low, through_high, lows, highs;
  const Vector<acc_t> zero{}, one = zero + 1;
  for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
    const Vector<acc_t> G = rectified(lanes.load(student_map + i), relu);
    const Vector<acc_t> unit = unit_range(G, student.low, student.range);
    const Vector<acc_t> difference =
        lanes.keep(unit - unit_range(rectified(lanes.load(teacher_map + i), relu), teacher.low, teacher.range));
    const Vector<acc_t> s = sign(difference);
    distance.add(absolute(difference));
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
                                 unit_range(rectified(lanes.load(teacher_map + i), relu), teacher.low, teacher.range));
    lanes.store(task.gradient_map + i, gradient_map_slope(g, s, student, static_cast<acc_t>(weight), relu));
  });
  return weight * distance.total();
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
  if (task.terms.weighting == Weighting::kGradient) {
    const acc_t* map = task.cell_sums[kTeacherMap];
    LongSum<acc_t> sum;
    for_each_vector<acc_t>(task.cells, [&](auto lanes, int64_t i) {
      const Vector<acc_t> G = rectified(lanes.load(map + i), task.terms.relu);
      const Vector<acc_t> unit = lanes.keep(unit_range(G, extremes.low, extremes.range));
      lanes.store(weights + i, unit);
      sum.add(unit);
    });
    total = sum.total();
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

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels_of() {
  using acc_t = acc_type<scalar_t>;
  return {sum_channels_kernel<scalar_t>,   sum_kernel<scalar_t>, fill_mask_kernel<acc_t>,
          attention_weights_kernel<acc_t>, finish_kernel<acc_t>, gradient_kernel<scalar_t>};
}

constexpr KernelSet kKernels = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(),
                                kernels_of<Float16>()};

}  // namespace
}  // namespace gkd_d2
