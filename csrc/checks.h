// The checks of the ops' arguments, and what the kernels on every device derive from them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <numeric>
#include <string>

#include "math.h"

namespace gkd_d2 {

inline at::ScalarType accumulation_type(const at::Tensor& feature) {
  return feature.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// channels_last where a tensor is that and not contiguous as well; everything else is read as contiguous.
inline at::MemoryFormat kernel_format(const at::Tensor& feature) {
  const bool channels_last = !feature.is_contiguous() && feature.is_contiguous(at::MemoryFormat::ChannelsLast);
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

inline int64_t cells_of(const at::Tensor& feature) { return feature.size(2) * feature.size(3); }

// Whether a gradient is the same in all cells: its mean N,C,1,1, or one that was expanded. It need not be summed up.
inline bool is_mean(const at::Tensor& gradient) {
  return cells_of(gradient) == 1 || (gradient.stride(2) == 0 && gradient.stride(3) == 0);
}

// The N,C of such a gradient, contiguous, in the type that kernels sum in.
inline at::Tensor mean_of(const at::Tensor& gradient) {
  return gradient.select(3, 0).select(2, 0).to(accumulation_type(gradient)).contiguous();
}

inline Terms terms_of(at::ArrayRef<double> weights, int64_t images) {
  TORCH_CHECK_VALUE(weights.size() == 4, "weights must hold 4 numbers (gradient, box, attention, image), got ",
                    weights.size());
  for (const double weight : weights) {
    TORCH_CHECK_VALUE(std::isfinite(static_cast<float>(weight)) && weight >= 0, "weights are ", weights,
                      ", but must be finite numbers >= 0 that float32 holds");
  }
  const double scale = 1 / static_cast<double>(images);
  Terms terms{};
  terms.gradient = weights[0] * scale, terms.has_gradient = weights[0] != 0;
  terms.box = weights[1] * scale, terms.has_box = weights[1] != 0;
  terms.attention = weights[2] * scale, terms.has_attention = weights[2] != 0;
  terms.image = weights[3] * scale, terms.has_image = weights[3] != 0;
  terms.temperature = 1;
  terms.weighting = Weighting::kUniform;
  return terms;
}

inline void check_student(at::TensorList student) {
  TORCH_CHECK_VALUE(!student.empty(), "student is an empty list: there is no level to distil");
  const at::Tensor& first = student[0];
  for (size_t level = 0; level < student.size(); ++level) {
    const at::Tensor& feature = student[level];
    TORCH_CHECK_VALUE(feature.dim() == 4 && feature.numel() > 0, "student[", level, "] has shape ", feature.sizes(),
                      ", but must be N,C,H,W without a dimension of 0");
    TORCH_CHECK_VALUE(feature.size(0) == first.size(0), "student[", level, "] holds ", feature.size(0),
                      " images, but student[0] holds ", first.size(0));
    TORCH_CHECK_VALUE(feature.scalar_type() == first.scalar_type() && feature.device() == first.device(), "student[",
                      level, "] is ", feature.scalar_type(), " on ", feature.device(), ", but student[0] is ",
                      first.scalar_type(), " on ", first.device());
  }
  const at::ScalarType dtype = first.scalar_type();
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "student is ", dtype, ", but must be float32, float64, bfloat16 or float16");
}

// Checks shapes, dtypes and devices; `or_mean`: N,C,1,1 will do as well.
inline void check_like_student(at::TensorList student, at::TensorList other, const char* name, bool or_mean = false) {
  TORCH_CHECK_VALUE(other.size() == student.size(), "student has ", student.size(), " levels, but ", name, " has ",
                    other.size());
  for (size_t level = 0; level < student.size(); ++level) {
    const at::Tensor &s = student[level], &o = other[level];
    const bool is_mean_shape = or_mean && o.dim() == 4 && o.sizes() == at::IntArrayRef{s.size(0), s.size(1), 1, 1};
    TORCH_CHECK_VALUE(s.sizes() == o.sizes() || is_mean_shape, "student[", level, "] has shape ", s.sizes(), ", but ",
                      name, "[", level, "] has ", o.sizes(), or_mean ? ", which is not its mean's N,C,1,1 either" : "");
    TORCH_CHECK_VALUE(s.scalar_type() == o.scalar_type(), "student[", level, "] is ", s.scalar_type(), ", but ", name,
                      "[", level, "] is ", o.scalar_type());
    TORCH_CHECK_VALUE(s.device() == o.device(), "student[", level, "] is on ", s.device(), ", but ", name, "[", level,
                      "] is on ", o.device());
  }
}

// Checks all arguments of distillation_losses.
inline Terms check_losses(at::TensorList student, at::TensorList teacher, at::TensorList student_grad,
                          at::TensorList teacher_grad, const at::Tensor& boxes, at::IntArrayRef box_counts,
                          at::IntArrayRef image_size, at::ArrayRef<double> weights, double temperature,
                          const std::string& weighting, const std::string& rectifier, const std::string& map_region) {
  check_student(student);
  check_like_student(student, teacher, "teacher");
  const int64_t images = student[0].size(0);
  Terms terms = terms_of(weights, images);
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature,
                    ", but must be a finite number > 0");
  terms.temperature = temperature;
  if (weighting == "gradient") {
    terms.weighting = Weighting::kGradient;
  } else if (weighting == "attention") {
    terms.weighting = Weighting::kAttention;
  } else if (weighting == "attention_gradient") {
    terms.weighting = Weighting::kAttentionGradient;
  } else {
    TORCH_CHECK_VALUE(weighting == "uniform", "weighting is '", weighting,
                      "', but must be 'gradient', 'attention', 'attention_gradient' or 'uniform'");
    terms.weighting = Weighting::kUniform;
  }
  TORCH_CHECK_VALUE(rectifier == "abs" || rectifier == "relu", "rectifier is '", rectifier,
                    "', but must be 'abs' or 'relu'");
  terms.relu = rectifier == "relu";
  TORCH_CHECK_VALUE(map_region == "image" || map_region == "boxes", "map_region is '", map_region,
                    "', but must be 'image' or 'boxes'");
  terms.map_in_boxes = map_region == "boxes";
  if (terms.needs_student_map()) check_like_student(student, student_grad, "student_grad", true);
  if (terms.needs_teacher_map()) check_like_student(student, teacher_grad, "teacher_grad", true);
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == 4 && boxes.is_floating_point(), "boxes have shape ",
                    boxes.sizes(), " and ", boxes.scalar_type(), ", but must be K,4 and floating");
  TORCH_CHECK_VALUE(boxes.device() == student[0].device(), "boxes are on ", boxes.device(), ", but student is on ",
                    student[0].device());
  TORCH_CHECK_VALUE(static_cast<int64_t>(box_counts.size()) == images, "student holds ", images,
                    " images, but box_counts ", box_counts.size());
  for (const int64_t count : box_counts) {
    TORCH_CHECK_VALUE(count >= 0, "box_counts are ", box_counts, ", but must not be negative");
  }
  int64_t total = 0;
  for (const int64_t count : box_counts) {
    TORCH_CHECK_VALUE(count <= boxes.size(0), "box_counts are ", box_counts, ", but there are ", boxes.size(0),
                      " boxes");
    total += count;
  }
  TORCH_CHECK_VALUE(total == boxes.size(0), "box_counts add up to ", total, ", but there are ", boxes.size(0),
                    " boxes");
  TORCH_CHECK_VALUE(image_size.size() == 2 && image_size[0] > 0 && image_size[1] > 0, "image_size is ", image_size,
                    ", but must be (height, width), both positive");
  return terms;
}

// The number of elements that forward leaves for backward.
inline int64_t state_size(const Terms& terms, at::TensorList student) {
  return std::accumulate(student.begin(), student.end(), int64_t{0}, [&terms](int64_t sum, const at::Tensor& s) {
    return sum + StateLayout(terms, s.size(0), s.size(1), cells_of(s)).size;
  });
}

// Checks all arguments of distillation_losses_backward.
inline Terms check_backward(const at::Tensor& loss_gradients, const at::Tensor& state, at::TensorList student,
                            at::TensorList teacher, at::ArrayRef<double> weights) {
  check_student(student);
  check_like_student(student, teacher, "teacher");
  const Terms terms = terms_of(weights, student[0].size(0));
  const at::ScalarType dtype = accumulation_type(student[0]);
  for (const auto& [name, tensor, count] :
       {std::tuple<const char*, const at::Tensor&, int64_t>{"loss_gradients", loss_gradients, 4},
        std::tuple<const char*, const at::Tensor&, int64_t>{"state", state, state_size(terms, student)}}) {
    TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.numel() == count && tensor.scalar_type() == dtype &&
                          tensor.device() == student[0].device(),
                      name, " is ", tensor.sizes(), " of ", tensor.scalar_type(), " on ", tensor.device(),
                      ", but must be [", count, "] of ", dtype, " on ", student[0].device());
  }
  return terms;
}

}  // namespace gkd_d2
