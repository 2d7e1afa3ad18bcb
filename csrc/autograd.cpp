// The ops under autograd. It is registered here and not in Python, where a call would cost the host far more time.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace gkd_d2 {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The ops as the dispatcher calls them; sizes may be symbolic, for torch.compile.
using Losses = std::tuple<at::Tensor, at::Tensor>(at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                                                  const at::Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef,
                                                  at::ArrayRef<double>, double, std::string, std::string, std::string,
                                                  bool);
using LossesBackward = std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&, at::TensorList, at::TensorList,
                                               at::ArrayRef<double>);

template <typename signature_t>
c10::TypedOperatorHandle<signature_t> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<signature_t>();
}

bool needs_grad(at::TensorList tensors) {
  return at::GradMode::is_enabled() &&
         std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

// What distillation_losses is given beside the student's features: constants, whatever they require.
struct Constants {
  at::TensorList teacher, student_grad, teacher_grad;
  const at::Tensor& boxes;
  c10::SymIntArrayRef box_counts, image_size;
  at::ArrayRef<double> weights;
  double temperature;
  const std::string &weighting, &rectifier, &map_region;

  // Calls the kernels.
  std::tuple<at::Tensor, at::Tensor> losses(at::TensorList student, at::TensorList of_teacher, bool save_state) const {
    static const auto op = find_op<Losses>("gkd_d2::distillation_losses");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(student, of_teacher, student_grad, teacher_grad, boxes, box_counts, image_size, weights, temperature,
                   weighting, rectifier, map_region, save_state);
  }
};

// Features in the layout in which the kernels read them beside the student's. Backward reads them again, so what has to
// be copied is copied here, once for both. What is no feature is left for the op to refuse.
std::vector<at::Tensor> in_kernel_layout(at::TensorList features, at::TensorList student) {
  std::vector<at::Tensor> result;
  for (size_t level = 0; level < features.size(); ++level) {
    const at::Tensor& feature = features[level];
    const bool known = level < student.size() && student[level].dim() == 4 && feature.dim() == 4;
    result.push_back(known ? feature.contiguous(kernel_format(student[level])) : feature);
  }
  return result;
}

struct DistillationLosses : torch::autograd::Function<DistillationLosses> {
  // `state` is set, but no output: nothing can be differentiated through it.
  static variable_list forward(AutogradContext* ctx, at::TensorList student, const Constants& constants,
                               at::Tensor* state) {
    variable_list saved(student.begin(), student.end());
    std::vector<at::Tensor> read = in_kernel_layout(student, student), teacher;
    for (const at::Tensor& feature : in_kernel_layout(constants.teacher, student)) teacher.push_back(feature.detach());
    at::Tensor losses;
    std::tie(losses, *state) = constants.losses(read, teacher, /*save_state=*/true);
    ctx->set_materialize_grads(false);
    ctx->saved_data["weights"] = constants.weights.vec();
    saved.insert(saved.end(), teacher.begin(), teacher.end());
    saved.push_back(*state);
    for (size_t level = 0; level < student.size(); ++level) {
      if (!read[level].is_same(student[level])) saved.push_back(read[level]);
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["levels"] = static_cast<int64_t>(student.size());
    return {losses};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    static const auto op = find_op<LossesBackward>("gkd_d2::distillation_losses_backward");
    const auto levels = static_cast<size_t>(ctx->saved_data["levels"].toInt());
    constexpr size_t kOthers = 2;  // the constants and the state
    if (!gradients[0].defined()) return variable_list(levels + kOthers);
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList features(saved);
    std::vector<at::Tensor> student = features.slice(0, levels).vec();
    // A second derivative fails through what requires a gradient; without, it would be missing without a word.
    if (!at::GradMode::is_enabled()) {
      size_t copy = 2 * levels + 1;
      for (at::Tensor& feature : student) {
        if (!feature.is_contiguous(kernel_format(feature))) feature = saved[copy++];
      }
    }
    variable_list result = op.call(gradients[0], saved[2 * levels], student, features.slice(levels, levels),
                                   ctx->saved_data["weights"].toDoubleVector());
    result.resize(levels + kOthers);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> distillation_losses_autograd(
    at::TensorList student, at::TensorList teacher, at::TensorList student_grad, at::TensorList teacher_grad,
    const at::Tensor& boxes, c10::SymIntArrayRef box_counts, c10::SymIntArrayRef image_size,
    at::ArrayRef<double> weights, double temperature, std::string weighting, std::string rectifier,
    std::string map_region, bool save_state) {
  const Constants constants{teacher, student_grad, teacher_grad, boxes,     box_counts, image_size,
                            weights, temperature,  weighting,    rectifier, map_region};
  if (!needs_grad(student)) return constants.losses(student, teacher, save_state);
  TORCH_CHECK(save_state, "gkd_d2::distillation_losses needs save_state=True where a gradient is to be computed");
  at::Tensor state;
  const variable_list losses = DistillationLosses::apply(student, constants, &state);
  return {losses[0], state};
}

struct DistillationLossesBackward : torch::autograd::Function<DistillationLossesBackward> {
  static variable_list forward(AutogradContext*, const at::Tensor& loss_gradients, const at::Tensor& state,
                               at::TensorList student, at::TensorList teacher, at::ArrayRef<double> weights) {
    static const auto op = find_op<LossesBackward>("gkd_d2::distillation_losses_backward");
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return op.call(loss_gradients, state, student, teacher, weights);
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false,
                "the fused losses can be differentiated once: higher derivatives need the implementation 'reference'");
  }
};

std::vector<at::Tensor> distillation_losses_backward_autograd(const at::Tensor& loss_gradients, const at::Tensor& state,
                                                              at::TensorList student, at::TensorList teacher,
                                                              at::ArrayRef<double> weights) {
  return DistillationLossesBackward::apply(loss_gradients, state, student, teacher, weights);
}

TORCH_LIBRARY_IMPL(gkd_d2, Autograd, m) {
  m.impl("distillation_losses", distillation_losses_autograd);
  m.impl("distillation_losses_backward", distillation_losses_backward_autograd);
}

}  // namespace
}  // namespace gkd_d2
