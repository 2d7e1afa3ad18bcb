// Attention over channels or cells: a softmax times their number.
#pragma once

#include "lanes.h"

namespace gkd_d2 {
namespace {

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

}  // namespace
}  // namespace gkd_d2
