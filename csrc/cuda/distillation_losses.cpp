// distillation_losses and its backward on CUDA: pointers and sizes are gathered here, for the kernels of kernels.h.
// Nothing waits for the device, and everything runs on the current stream, so that a CUDA graph may capture it.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace gkd_d2 {
namespace {

template <typename function_t>
auto dispatch(at::ScalarType dtype, const function_t& function) {
  switch (dtype) {
    case at::kDouble:
      return function(double{});
    case at::kBFloat16:
      return function(BFloat16{});
    case at::kHalf:
      return function(Float16{});
    default:
      return function(float{});
  }
}

int divide_up(int64_t value, int64_t by) { return static_cast<int>((value + by - 1) / by); }

// Temporary memory for many small results in one tensor.
template <typename acc_t>
class Scratch {
 public:
  void take(acc_t*& pointer, int64_t count) {
    requests_.emplace_back(&pointer, size_);
    size_ += count;
  }
  at::Tensor allocate(const at::TensorOptions& options) {
    at::Tensor memory = at::empty({size_}, options);
    for (auto& [pointer, offset] : requests_) *pointer = static_cast<acc_t*>(memory.data_ptr()) + offset;
    return memory;
  }

 private:
  std::vector<std::pair<acc_t**, int64_t>> requests_;
  int64_t size_ = 0;
};

void check_sizes(at::TensorList student) {
  TORCH_CHECK_VALUE(student.size() <= kMaxLevels, "student has ", student.size(),
                    " levels, but the CUDA kernels take at most ", kMaxLevels);
  // Loops count in int, and step past their end.
  constexpr int64_t kMost = std::numeric_limits<int>::max() - (1 << 16);
  int64_t cells = 0, channels = 0;
  for (size_t l = 0; l < student.size(); ++l) {
    cells += student[l].numel() / student[l].size(1);
    channels += student[l].numel() / cells_of(student[l]);
    TORCH_CHECK_VALUE(cells <= kMost && channels <= kMost, "student[", l, "] has shape ", student[l].sizes(),
                      ", which is too large for the CUDA kernels, together with the levels before it");
  }
}

// Sets one input of a level; `keep` holds the copy of one that is neither contiguous nor channels_last.
template <typename acc_t>
void set_input(LevelData<acc_t>& level, Input input, const at::Tensor& tensor, at::MemoryFormat format,
               std::vector<at::Tensor>& keep) {
  keep.push_back(tensor.contiguous(format));
  level.inputs[input] = keep.back().const_data_ptr();
  level.channels_last[input] = format == at::MemoryFormat::ChannelsLast;
  const int64_t row = (level.channels_last[input] ? level.channels : level.cells) * tensor.element_size();
  level.vectors[input] = row % 16 == 0 && reinterpret_cast<uintptr_t>(level.inputs[input]) % 16 == 0;
}

// Sets the gradient of a level. One that is a mean already is given as such: nothing of it is left to sum up.
template <typename acc_t>
void set_gradient(LevelData<acc_t>& level, Input input, const at::Tensor& gradient, std::vector<at::Tensor>& keep) {
  if (!is_mean(gradient)) return set_input(level, input, gradient, kernel_format(gradient), keep);
  keep.push_back(mean_of(gradient));
  level.channel_sums[input] = static_cast<acc_t*>(keep.back().data_ptr());
  level.channel_parts[input] = level.summed_cells[input] = 1;
}

template <typename acc_t>
void set_levels(Params<acc_t>& params, const Terms& terms, at::TensorList student, at::TensorList teacher,
                const at::Tensor& state, std::vector<at::Tensor>& keep) {
  params.terms = terms;
  params.box_weight = static_cast<acc_t>(terms.box);
  params.attention_weight = static_cast<acc_t>(terms.attention);
  params.temperature_scale = static_cast<acc_t>(1 / terms.temperature);
  params.images = static_cast<int>(student[0].size(0));
  params.num_levels = static_cast<int>(student.size());
  auto* place = static_cast<acc_t*>(state.data_ptr());
  for (size_t l = 0; l < student.size(); ++l) {
    LevelData<acc_t>& level = params.levels[l];
    level.channels = static_cast<int>(student[l].size(1));
    level.height = static_cast<int>(student[l].size(2));
    level.width = static_cast<int>(student[l].size(3));
    level.cells = level.height * level.width;
    const at::MemoryFormat format = kernel_format(student[l]);
    set_input(level, kStudent, student[l], format, keep);
    set_input(level, kTeacher, teacher[l], format, keep);
    level.gradient_weight = static_cast<acc_t>(terms.map_weight(level.cells));
    level.image_weight = static_cast<acc_t>(terms.image / level.cells);
    level.magnitude_scale = static_cast<acc_t>(1 / (terms.temperature * level.channels));
    level.channel_attention_scale = static_cast<acc_t>(terms.attention / (terms.temperature * level.cells));
    level.cell_attention_scale = static_cast<acc_t>(terms.attention / (terms.temperature * level.channels));
    const StateLayout layout(terms, params.images, level.channels, level.cells);
    level.gradient_map = place + layout.gradient_map;
    level.cell_weight = place + layout.cell_weight;
    level.box_mask = place + layout.box_mask;
    level.cell_attention = place + layout.cell_attention;
    level.alpha = place + layout.alpha;
    level.channel_weight = place + layout.channel_weight;
    level.channel_attention = place + layout.channel_attention;
    place += layout.size;
  }
}

// How many parts channels_last features are cut into, so that all multiprocessors have work.
template <typename scalar_t, typename acc_t>
int channel_parts(const LevelData<acc_t>& level, int images) {
  const int64_t blocks = static_cast<int64_t>(images) * divide_up(level.channels, kTile<scalar_t>);
  return std::min({divide_up(kPartBlocks, blocks), divide_up(level.cells, kPartCells), kMaxParts});
}

// The temporary memory of one level. A sum over channels lies where a later kernel writes what becomes of it, as far as
// backward keeps that.
template <typename scalar_t>
void take_scratch(const ForwardParams<acc_type<scalar_t>>& params, LevelData<acc_type<scalar_t>>& level,
                  Scratch<acc_type<scalar_t>>& scratch) {
  const Terms& terms = params.terms;
  const int64_t images = params.images, map = images * level.cells;
  for (int i = 0; i < params.num_inputs; ++i) {
    const Input input = params.inputs[i];
    if (input == kStudentGrad) {
      level.channel_means[input] = level.alpha;
    } else {
      scratch.take(level.channel_means[input], images * level.channels);
    }
    if (level.channel_sums[input] != nullptr) continue;
    level.channel_parts[input] = level.channels_last[input] ? channel_parts<scalar_t>(level, params.images) : 1;
    level.summed_cells[input] = level.cells;
    scratch.take(level.channel_sums[input], images * level.channel_parts[input] * level.channels);
  }
  if (terms.has_attention) scratch.take(level.channel_distance, images);
  if (terms.needs_student_map()) level.cell_sums[kStudentMap] = level.gradient_map;
  if (terms.imitates()) {
    scratch.take(level.cell_sums[kDistance], map);
    if (terms.needs_teacher_map()) level.cell_sums[kTeacherMap] = level.cell_weight;
  } else if (terms.needs_teacher_map()) {
    scratch.take(level.cell_sums[kTeacherMap], map);
  }
  if (terms.has_attention) level.cell_sums[kStudentMagnitude] = level.cell_attention;
  if (terms.needs_teacher_magnitude()) scratch.take(level.cell_sums[kTeacherMagnitude], map);
  // Backward needs the mask of loss_bmfi_box alone.
  if (terms.needs_mask() && !terms.has_box) scratch.take(level.box_mask, map);
  const int64_t chunks = divide_up(level.cells, kChunkCells);
  if (terms.weighs_by(Weighting::kAttentionGradient)) {
    scratch.take(level.attended_sums, images * chunks * kAttendedSums);
  }
  scratch.take(level.map_noise, images * 2);
  scratch.take(level.extremes, images * divide_up(level.cells, kTile<scalar_t>) * kExtremes);
  scratch.take(level.first_sums, images * chunks * kFirstSums);
  scratch.take(level.second_sums, images * chunks * kSecondSums);
}

template <typename scalar_t>
void set_blocks(ForwardParams<acc_type<scalar_t>>& params) {
  for (int l = 0; l < params.num_levels; ++l) {
    const auto& level = params.levels[l];
    const auto append = [l](BlockTable& table, int blocks) { table.first[l + 1] = table.first[l] + blocks; };
    for (int i = 0; i < params.num_inputs; ++i) {
      const Input input = params.inputs[i];
      int per_image = level.channels_last[input]
                          ? level.channel_parts[input] * divide_up(level.channels, kTile<scalar_t>)
                          : level.channels;
      if (level.inputs[input] == nullptr) per_image = 0;  // a mean
      append(params.channel_blocks[input], params.images * per_image);
    }
    append(params.tile_blocks, params.images * divide_up(level.cells, kTile<scalar_t>));
    append(params.chunk_blocks, params.images * divide_up(level.cells, kChunkCells));
  }
}

template <typename scalar_t>
void forward(const Terms& terms, at::TensorList student, at::TensorList teacher, at::TensorList student_grad,
             at::TensorList teacher_grad, const at::Tensor& boxes, at::IntArrayRef box_counts,
             at::IntArrayRef image_size, const at::Tensor& state, const at::Tensor& losses) {
  using acc_t = acc_type<scalar_t>;
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  std::vector<at::Tensor> keep;
  ForwardParams<acc_t> params{};
  set_levels(params, terms, student, teacher, state, keep);
  if (terms.needs_student_map()) params.inputs[params.num_inputs++] = kStudentGrad;
  if (terms.needs_teacher_map()) params.inputs[params.num_inputs++] = kTeacherGrad;
  if (terms.has_attention) params.inputs[params.num_inputs++] = kStudent;
  if (terms.needs_teacher_magnitude()) params.inputs[params.num_inputs++] = kTeacher;
  Scratch<acc_t> scratch;
  for (int l = 0; l < params.num_levels; ++l) {
    LevelData<acc_t>& level = params.levels[l];
    if (terms.needs_student_map()) set_gradient(level, kStudentGrad, student_grad[l], keep);
    if (terms.needs_teacher_map()) set_gradient(level, kTeacherGrad, teacher_grad[l], keep);
    take_scratch<scalar_t>(params, level, scratch);
  }
  keep.push_back(scratch.allocate(losses.options()));
  set_blocks<scalar_t>(params);
  const at::Tensor double_boxes = boxes.to(at::kDouble).contiguous();
  params.boxes = static_cast<const double*>(double_boxes.const_data_ptr());
  params.image_height = static_cast<double>(image_size[0]);
  params.image_width = static_cast<double>(image_size[1]);
  params.losses = static_cast<acc_t*>(losses.data_ptr());

  if (params.num_inputs > 0) C10_CUDA_CHECK(launch_channel_sums<scalar_t>(params, stream));
  C10_CUDA_CHECK(launch_channel_weights<acc_t>(params, stream));
  C10_CUDA_CHECK(launch_cell_sums<scalar_t>(params, stream));
  if (terms.needs_mask()) {
    BoxOffsets offsets{};
    int first_box = 0;
    for (offsets.first_image = 0; offsets.first_image < params.images; offsets.first_image += kMaxImages) {
      offsets.num_images = std::min(kMaxImages, params.images - offsets.first_image);
      for (int i = 0; i < offsets.num_images; ++i) {
        offsets.offset[i] = first_box;
        first_box += static_cast<int>(box_counts[offsets.first_image + i]);
      }
      offsets.offset[offsets.num_images] = first_box;
      C10_CUDA_CHECK(launch_box_masks<acc_t>(params, offsets, stream));
    }
  }
  C10_CUDA_CHECK(launch_finish<acc_t>(params, kTile<scalar_t>, stream));
}

std::tuple<at::Tensor, at::Tensor> distillation_losses_cuda(
    at::TensorList student, at::TensorList teacher, at::TensorList student_grad, at::TensorList teacher_grad,
    const at::Tensor& boxes, at::IntArrayRef box_counts, at::IntArrayRef image_size, at::ArrayRef<double> weights,
    double temperature, std::string weighting, std::string rectifier, std::string map_region, bool save_state) {
  const Terms terms = check_losses(student, teacher, student_grad, teacher_grad, boxes, box_counts, image_size, weights,
                                   temperature, weighting, rectifier, map_region);
  check_sizes(student);
  const c10::cuda::CUDAGuard guard(student[0].device());
  const at::TensorOptions options = student[0].options().dtype(accumulation_type(student[0]));
  at::Tensor state = at::empty({state_size(terms, student)}, options);
  const at::Tensor losses = terms.any() ? at::empty({4}, options) : at::zeros({4}, options);
  if (terms.any()) {
    dispatch(student[0].scalar_type(), [&](auto scalar) {
      forward<decltype(scalar)>(terms, student, teacher, student_grad, teacher_grad, boxes, box_counts, image_size,
                                state, losses);
    });
  }
  if (!save_state) state = at::empty({0}, options);
  return {losses, state};
}

template <typename scalar_t>
std::vector<at::Tensor> backward(const Terms& terms, const at::Tensor& loss_gradients, const at::Tensor& state,
                                 at::TensorList student, at::TensorList teacher) {
  using acc_t = acc_type<scalar_t>;
  std::vector<at::Tensor> keep, gradients;
  BackwardParams<acc_t> params{};
  set_levels(params, terms, student, teacher, state, keep);
  params.loss_gradients = static_cast<const acc_t*>(loss_gradients.const_data_ptr());
  for (int l = 0; l < params.num_levels; ++l) {
    LevelData<acc_t>& level = params.levels[l];
    gradients.push_back(at::empty_like(student[l], student[l].options(), kernel_format(student[l])));
    level.gradient = gradients.back().data_ptr();
    const int groups = level.channels_last[kStudent] ? 1 : divide_up(level.channels, kGradientChannels);
    params.blocks.first[l + 1] =
        params.blocks.first[l] + params.images * groups * divide_up(level.cells, kTile<scalar_t>);
  }
  C10_CUDA_CHECK(launch_gradient<scalar_t>(params, c10::cuda::getCurrentCUDAStream()));
  return gradients;
}

std::vector<at::Tensor> distillation_losses_backward_cuda(const at::Tensor& loss_gradients, const at::Tensor& state,
                                                          at::TensorList student, at::TensorList teacher,
                                                          at::ArrayRef<double> weights) {
  const Terms terms = check_backward(loss_gradients, state, student, teacher, weights);
  check_sizes(student);
  const c10::cuda::CUDAGuard guard(student[0].device());
  return dispatch(student[0].scalar_type(), [&](auto scalar) {
    return backward<decltype(scalar)>(terms, loss_gradients.contiguous(), state.contiguous(), student, teacher);
  });
}

TORCH_LIBRARY_IMPL(gkd_d2, CUDA, m) {
  m.impl("distillation_losses", distillation_losses_cuda);
  m.impl("distillation_losses_backward", distillation_losses_backward_cuda);
}

}  // namespace
}  // namespace gkd_d2
