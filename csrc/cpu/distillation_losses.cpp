// distillation_losses and its backward on the CPU: the work is cut into tasks here, for the kernels of kernels.h.
// The cut depends on shapes alone and every task writes its own results, so the number of threads changes no bit.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace gkd_d2 {
namespace {

// Cells of a channels_last map that one task takes, channels of a contiguous one's gradient, and elements of a task
// that sums channels.
constexpr int64_t kChannelsLastBlockCells = 256;
constexpr int64_t kGradientChannels = 16;
constexpr int64_t kChannelSumElements = 1 << 18;
constexpr int64_t kMaskCells = 4096;
// A level's gradient of at least so many bytes is stored past the caches, which could not hold it anyway.
constexpr int64_t kStreamingBytes = 4 << 20;

const KernelSet& kernel_set() {
#if defined(__x86_64__)
  static const KernelSet& best = [&]() -> const KernelSet& {
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) return avx512_kernels();
    return capability == "AVX2" ? avx2_kernels() : default_kernels();
  }();
  return best;
#else
  return default_kernels();
#endif
}

template <typename function_t>
auto dispatch(at::ScalarType dtype, const function_t& function) {
  const KernelSet& kernels = kernel_set();
  switch (dtype) {
    case at::kDouble:
      return function(kernels.float64);
    case at::kBFloat16:
      return function(kernels.bfloat16);
    case at::kHalf:
      return function(kernels.float16);
    default:
      return function(kernels.float32);
  }
}

// Runs tasks on all threads, each taking the next one when it is done, for tasks differ in size.
template <typename function_t>
void run_tasks(size_t count, const function_t& run) {
  std::atomic<size_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), static_cast<int64_t>(count));
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t task = next++; task < count; task = next++) run(task);
  });
}

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// One level's features as the kernels read them.
template <typename scalar_t>
struct Level {
  int64_t channels, height, width, cells;
  bool channels_last;
  at::Tensor student, teacher;
  StateLayout layout;
  acc_type<scalar_t>* state;

  Level(const Terms& terms, const at::Tensor& student_feature, const at::Tensor& teacher_feature)
      : channels(student_feature.size(1)),
        height(student_feature.size(2)),
        width(student_feature.size(3)),
        cells(height * width),
        channels_last(kernel_format(student_feature) == at::MemoryFormat::ChannelsLast),
        student(student_feature.contiguous(kernel_format(student_feature))),
        teacher(teacher_feature.contiguous(kernel_format(student_feature))),
        layout(terms, student_feature.size(0), channels, cells),
        state(nullptr) {}

  int64_t block_cells() const { return channels_last ? kChannelsLastBlockCells : kSumCells; }
  int64_t blocks() const { return divide_up(cells, block_cells()); }
  const scalar_t* image(const at::Tensor& feature, int64_t n) const {
    return static_cast<const scalar_t*>(feature.const_data_ptr()) + n * channels * cells;
  }
  acc_type<scalar_t>* map(int64_t offset, int64_t n) const { return state + offset + n * cells; }
  acc_type<scalar_t>* vector(int64_t offset, int64_t n) const { return state + offset + n * channels; }
};

template <typename scalar_t>
std::vector<Level<scalar_t>> levels_of(const Terms& terms, at::TensorList student, at::TensorList teacher,
                                       const at::Tensor& state) {
  std::vector<Level<scalar_t>> levels;
  auto* place = static_cast<acc_type<scalar_t>*>(state.data_ptr());
  for (size_t l = 0; l < student.size(); ++l) {
    levels.emplace_back(terms, student[l], teacher[l]);
    levels.back().state = place;
    place += levels.back().layout.size;
  }
  return levels;
}

// The means over cells of every channel of one input of one level, N,C.
template <typename scalar_t>
class ChannelMeans {
 public:
  using acc_t = acc_type<scalar_t>;

  ChannelMeans(const at::Tensor& input, bool absolute, std::vector<ChannelSumTask<scalar_t>>& tasks)
      : channels_(input.size(1)),
        cells_(cells_of(input)),
        channels_last_(kernel_format(input) == at::MemoryFormat::ChannelsLast) {
    if (!absolute && is_mean(input)) {
      sums_ = mean_of(input);
      parts_ = cells_ = 1;
      return;
    }
    input_ = input.contiguous(kernel_format(input));
    const int64_t length = channels_last_ ? cells_ : channels_, other = channels_last_ ? channels_ : cells_;
    const int64_t step = std::max<int64_t>(1, kChannelSumElements / other), parts = divide_up(length, step);
    parts_ = channels_last_ ? parts : 1;
    sums_ = at::empty({input.size(0), parts_, channels_}, input.options().dtype(accumulation_type(input)));
    for (int64_t n = 0; n < input.size(0); ++n) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * step;
        tasks.push_back({static_cast<const scalar_t*>(input_.const_data_ptr()) + n * channels_ * cells_, channels_,
                         cells_, channels_last_, absolute, begin, std::min(length, begin + step),
                         sums(n) + (channels_last_ ? part * channels_ : begin)});
      }
    }
  }

  // After the tasks: the means of image n.
  void write(int64_t n, acc_t* means) const {
    for (int64_t c = 0; c < channels_; ++c) {
      acc_t sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += sums(n)[part * channels_ + c];
      means[c] = sum / static_cast<acc_t>(cells_);
    }
  }

 private:
  acc_t* sums(int64_t n) const { return static_cast<acc_t*>(sums_.data_ptr()) + n * parts_ * channels_; }

  at::Tensor input_, sums_;
  int64_t channels_, cells_;
  bool channels_last_;
  int64_t parts_;
};

// Divides the alphas of one image by their unit.
template <typename acc_t>
void scale_alphas(acc_t* alpha, int64_t channels) {
  acc_t largest = 0;
  for (int64_t c = 0; c < channels; ++c) largest = std::max(largest, std::abs(alpha[c]));
  const acc_t unit = alpha_unit(largest);
  for (int64_t c = 0; c < channels; ++c) alpha[c] /= unit;
}

// u where it comes from the teacher's channel gradients; all ones where they are all 0.
template <typename acc_t>
void normalize_magnitudes(const acc_t* alpha, int64_t channels, acc_t* weights) {
  double total = 0;
  for (int64_t c = 0; c < channels; ++c) total += std::abs(static_cast<double>(alpha[c]));
  for (int64_t c = 0; c < channels; ++c) {
    weights[c] = total == 0 ? acc_t{1} : std::abs(alpha[c]) * static_cast<acc_t>(static_cast<double>(channels) / total);
  }
}

template <typename scalar_t>
class Forward {
 public:
  using acc_t = acc_type<scalar_t>;

  Forward(const Kernels<scalar_t>& kernels, const Terms& terms, at::TensorList student, at::TensorList teacher,
          const at::Tensor& state)
      : kernels_(kernels),
        terms_(terms),
        images_(student[0].size(0)),
        options_(student[0].options().dtype(accumulation_type(student[0]))),
        levels_(levels_of<scalar_t>(terms, student, teacher, state)) {}

  void run(at::TensorList student_grad, at::TensorList teacher_grad, const at::Tensor& boxes,
           at::IntArrayRef box_counts, at::IntArrayRef image_size, acc_t* losses) {
    weigh_channels(student_grad, teacher_grad);
    sum_cells(boxes, box_counts, image_size);
    finish(losses);
  }

 private:
  // alpha_S, alpha_T and u
  void weigh_channels(at::TensorList student_grad, at::TensorList teacher_grad) {
    std::vector<ChannelSumTask<scalar_t>> tasks;
    std::vector<ChannelMeans<scalar_t>> student_means, teacher_means, magnitudes;
    for (size_t l = 0; l < levels_.size(); ++l) {
      const Level<scalar_t>& level = levels_[l];
      if (terms_.needs_student_map()) student_means.emplace_back(student_grad[l], false, tasks);
      if (terms_.needs_teacher_map()) {
        teacher_means.emplace_back(teacher_grad[l], false, tasks);
        teacher_alpha_.push_back(at::empty({images_, level.channels}, options_));
      }
      if (terms_.weighs_by_attention()) magnitudes.emplace_back(level.teacher, true, tasks);
    }
    run_tasks(tasks.size(), [&](size_t i) { kernels_.channel_sums(tasks[i]); });
    run_tasks(levels_.size() * images_, [&](size_t i) {
      const size_t l = i / images_;
      const int64_t n = static_cast<int64_t>(i % images_);
      const Level<scalar_t>& level = levels_[l];
      if (terms_.needs_student_map()) {
        student_means[l].write(n, level.vector(level.layout.alpha, n));
        scale_alphas(level.vector(level.layout.alpha, n), level.channels);
      }
      if (terms_.needs_teacher_map()) {
        teacher_means[l].write(n, row(teacher_alpha_[l], n));
        scale_alphas(row(teacher_alpha_[l], n), level.channels);
      }
      if (!terms_.imitates()) return;
      acc_t* const weight = level.vector(level.layout.channel_weight, n);
      if (terms_.weighting == Weighting::kGradient) {
        normalize_magnitudes(row(teacher_alpha_[l], n), level.channels, weight);
      } else if (terms_.weighs_by_attention()) {
        magnitudes[l].write(n, weight);
        kernels_.attention_weights(weight, level.channels, terms_.temperature);
      } else {
        std::fill_n(weight, level.channels, acc_t{1});
      }
    });
  }

  // Everything that is summed over channels, in one reading of S and T; and the masks beside it.
  void sum_cells(const at::Tensor& boxes, at::IntArrayRef box_counts, at::IntArrayRef image_size) {
    std::vector<CellSumTask<scalar_t>> sums;
    std::vector<BoxMaskTask<acc_t>> masks;
    for (size_t l = 0; l < levels_.size(); ++l) {
      const Level<scalar_t>& level = levels_[l];
      spare_maps_.push_back(at::empty({images_, num_spare_maps(), level.cells}, options_));
      channel_sums_.push_back(at::empty({images_, level.blocks(), 2, level.channels}, options_));
      noises_.push_back(at::empty({images_, 2}, options_));
      for (int64_t n = 0; n < images_; ++n) {
        CellSumTask<scalar_t> task{};
        task.student = level.image(level.student, n);
        task.teacher = level.image(level.teacher, n);
        task.channels = level.channels;
        task.cells = level.cells;
        task.channels_last = level.channels_last;
        task.maps = terms_.needs_teacher_map();
        task.distance = terms_.imitates();
        task.magnitudes = terms_.needs_teacher_magnitude();
        if (task.maps) task.teacher_alpha = row(teacher_alpha_[l], n);
        task.student_alpha = terms_.needs_student_map() ? level.vector(level.layout.alpha, n) : task.teacher_alpha;
        if (task.distance) task.channel_weight = level.vector(level.layout.channel_weight, n);
        task.student_noise = row(noises_[l], n);
        task.teacher_noise = task.student_noise + 1;
        place_cell_sums(l, n, task.cell_sums);
        for (int64_t block = 0; block < level.blocks(); ++block) {
          task.begin = block * level.block_cells();
          task.end = std::min(level.cells, task.begin + level.block_cells());
          task.student_channel_sums = row(channel_sums_[l], (n * level.blocks() + block) * 2);
          task.teacher_channel_sums = task.student_channel_sums + level.channels;
          sums.push_back(task);
        }
      }
      if (terms_.needs_mask()) add_masks(l, boxes, box_counts, image_size, masks);
    }
    run_tasks(sums.size() + masks.size(), [&](size_t i) {
      i < sums.size() ? kernels_.cell_sums(sums[i]) : kernels_.box_masks(masks[i - sums.size()]);
    });
  }

  // A sum lies where finish() writes what becomes of it, as far as backward keeps that; else in a spare map.
  void place_cell_sums(size_t l, int64_t n, acc_t** cell_sums) const {
    const Level<scalar_t>& level = levels_[l];
    acc_t* const spare = spare_map(l, n, 0);
    acc_t* const cell_weight = terms_.imitates() ? level.map(level.layout.cell_weight, n) : spare;
    const bool attention = terms_.has_attention;
    cell_sums[kStudentMap] = terms_.needs_student_map() ? level.map(level.layout.gradient_map, n) : nullptr;
    cell_sums[kTeacherMap] = terms_.needs_teacher_map() ? cell_weight : nullptr;
    cell_sums[kDistance] = terms_.imitates() ? spare : nullptr;
    cell_sums[kStudentMagnitude] = attention ? level.map(level.layout.cell_attention, n) : nullptr;
    cell_sums[kTeacherMagnitude] = terms_.needs_teacher_magnitude() ? spare_map(l, n, 1) : nullptr;
  }

  // Backward needs the mask of loss_bmfi_box alone.
  acc_t* box_mask(size_t l, int64_t n) const {
    return terms_.has_box ? levels_[l].map(levels_[l].layout.box_mask, n) : spare_map(l, n, 2);
  }

  void add_masks(size_t l, const at::Tensor& boxes, at::IntArrayRef box_counts, at::IntArrayRef image_size,
                 std::vector<BoxMaskTask<acc_t>>& tasks) const {
    const Level<scalar_t>& level = levels_[l];
    const int64_t rows = std::clamp<int64_t>(kMaskCells / level.width, 1, kMaskRows);
    const double* place = static_cast<const double*>(boxes.const_data_ptr());
    for (int64_t n = 0; n < images_; ++n) {
      for (int64_t begin = 0; begin < level.height; begin += rows) {
        tasks.push_back({place, box_counts[n], level.height, level.width, static_cast<double>(image_size[0]),
                         static_cast<double>(image_size[1]), begin, std::min(level.height, begin + rows),
                         box_mask(l, n)});
      }
      place += 4 * box_counts[n];
    }
  }

  void finish(acc_t* losses) {
    std::vector<FinishTask<acc_t>> tasks(levels_.size() * images_);
    run_tasks(tasks.size(), [&](size_t i) {
      const size_t l = i / images_;
      const int64_t n = static_cast<int64_t>(i % images_);
      const Level<scalar_t>& level = levels_[l];
      FinishTask<acc_t>& task = tasks[i];
      task.terms = terms_;
      task.channels = level.channels;
      task.cells = level.cells;
      place_cell_sums(l, n, task.cell_sums);
      task.student_noise = row(noises_[l], n)[0];
      task.teacher_noise = row(noises_[l], n)[1];
      task.gradient_map = level.map(level.layout.gradient_map, n);
      task.cell_weight = level.map(level.layout.cell_weight, n);
      task.box_mask = terms_.needs_mask() ? box_mask(l, n) : nullptr;
      task.cell_attention = level.map(level.layout.cell_attention, n);
      task.channel_attention = level.vector(level.layout.channel_attention, n);
      // The blocks' sums are added up in the first block's place.
      acc_t* const means = row(channel_sums_[l], n * level.blocks() * 2);
      task.student_channel_means = means;
      task.teacher_channel_means = means + level.channels;
      if (terms_.has_attention) {
        for (int64_t c = 0; c < 2 * level.channels; ++c) {
          for (int64_t block = 1; block < level.blocks(); ++block) means[c] += means[block * 2 * level.channels + c];
          means[c] /= static_cast<acc_t>(level.cells);
        }
      }
      kernels_.finish(task);
    });
    for (int k = 0; k < 4; ++k) {
      double loss = 0;
      for (const FinishTask<acc_t>& task : tasks) loss += task.losses[k];
      // What float can't hold becomes inf.
      losses[k] = static_cast<acc_t>(loss);
    }
  }

  int64_t num_spare_maps() const { return terms_.needs_mask() && !terms_.has_box ? 3 : 2; }
  acc_t* spare_map(size_t l, int64_t n, int64_t map) const { return row(spare_maps_[l], n * num_spare_maps() + map); }

  // Row `index` of a tensor, all dimensions but the last taken as one.
  static acc_t* row(const at::Tensor& tensor, int64_t index) {
    return static_cast<acc_t*>(tensor.data_ptr()) + index * tensor.size(-1);
  }

  const Kernels<scalar_t>& kernels_;
  const Terms& terms_;
  int64_t images_;
  at::TensorOptions options_;
  std::vector<Level<scalar_t>> levels_;
  std::vector<at::Tensor> teacher_alpha_, spare_maps_, channel_sums_, noises_;
};

std::tuple<at::Tensor, at::Tensor> distillation_losses_cpu(
    at::TensorList student, at::TensorList teacher, at::TensorList student_grad, at::TensorList teacher_grad,
    const at::Tensor& boxes, at::IntArrayRef box_counts, at::IntArrayRef image_size, at::ArrayRef<double> weights,
    double temperature, std::string weighting, std::string rectifier, std::string map_region, bool save_state) {
  const Terms terms = check_losses(student, teacher, student_grad, teacher_grad, boxes, box_counts, image_size, weights,
                                   temperature, weighting, rectifier, map_region);
  const at::TensorOptions options = student[0].options().dtype(accumulation_type(student[0]));
  at::Tensor state = at::empty({state_size(terms, student)}, options);
  at::Tensor losses = at::zeros({4}, options);
  if (terms.any()) {
    const at::Tensor double_boxes = boxes.to(at::kDouble).contiguous();
    dispatch(student[0].scalar_type(), [&](const auto& kernels) {
      Forward forward(kernels, terms, student, teacher, state);
      forward.run(student_grad, teacher_grad, double_boxes, box_counts, image_size,
                  static_cast<typename decltype(forward)::acc_t*>(losses.data_ptr()));
    });
  }
  if (!save_state) state = at::empty({0}, options);
  return {losses, state};
}

// Fresh memory of the operating system comes in pages of 4 KiB, each at the price of a fault, which together cost
// more than the gradient itself. Large pages are asked for where the system leaves that to the program.
void advise_large_pages(const at::Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t begin = (start + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t end = (start + tensor.nbytes()) / kLargePage * kLargePage;
  // It is advice: where it is not taken, nothing but speed changes.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <typename scalar_t>
std::vector<at::Tensor> backward(const Kernels<scalar_t>& kernels, const Terms& terms, const at::Tensor& loss_gradients,
                                 const at::Tensor& state, at::TensorList student, at::TensorList teacher) {
  const std::vector<Level<scalar_t>> levels = levels_of<scalar_t>(terms, student, teacher, state);
  const auto* incoming = static_cast<const acc_type<scalar_t>*>(loss_gradients.const_data_ptr());
  std::vector<GradientTask<scalar_t>> tasks;
  std::vector<at::Tensor> gradients;
  for (const Level<scalar_t>& level : levels) {
    const at::Tensor gradient = at::empty_like(level.student);
    advise_large_pages(gradient);
    gradients.push_back(gradient);
    for (int64_t n = 0; n < gradient.size(0); ++n) {
      GradientTask<scalar_t> task{};
      task.student = level.image(level.student, n);
      task.teacher = level.image(level.teacher, n);
      task.gradient = static_cast<scalar_t*>(gradient.data_ptr()) + n * level.channels * level.cells;
      task.channels = level.channels;
      task.cells = level.cells;
      task.channels_last = level.channels_last;
      task.streaming = static_cast<int64_t>(gradient.nbytes()) >= kStreamingBytes;
      task.terms = terms;
      std::copy_n(incoming, 4, task.loss_gradients);
      task.gradient_map = level.map(level.layout.gradient_map, n);
      task.cell_weight = level.map(level.layout.cell_weight, n);
      task.box_mask = level.map(level.layout.box_mask, n);
      task.cell_attention = level.map(level.layout.cell_attention, n);
      task.alpha = level.vector(level.layout.alpha, n);
      task.channel_weight = level.vector(level.layout.channel_weight, n);
      task.channel_attention = level.vector(level.layout.channel_attention, n);
      const int64_t cells = level.channels_last ? kChannelsLastBlockCells : kGradientCells;
      const int64_t channels = level.channels_last ? level.channels : kGradientChannels;
      for (task.begin = 0; task.begin < level.cells; task.begin += cells) {
        task.end = std::min(level.cells, task.begin + cells);
        for (task.channel_begin = 0; task.channel_begin < level.channels; task.channel_begin += channels) {
          task.channel_end = std::min(level.channels, task.channel_begin + channels);
          tasks.push_back(task);
        }
      }
    }
  }
  // Backwards, for what forward read last may still be in the caches.
  run_tasks(tasks.size(), [&](size_t i) { kernels.gradient(tasks[tasks.size() - 1 - i]); });
  return gradients;
}

std::vector<at::Tensor> distillation_losses_backward_cpu(const at::Tensor& loss_gradients, const at::Tensor& state,
                                                         at::TensorList student, at::TensorList teacher,
                                                         at::ArrayRef<double> weights) {
  const Terms terms = check_backward(loss_gradients, state, student, teacher, weights);
  return dispatch(student[0].scalar_type(), [&](const auto& kernels) {
    return backward(kernels, terms, loss_gradients.contiguous(), state.contiguous(), student, teacher);
  });
}

TORCH_LIBRARY_IMPL(gkd_d2, CPU, m) {
  m.impl("distillation_losses", distillation_losses_cpu);
  m.impl("distillation_losses_backward", distillation_losses_backward_cpu);
}

}  // namespace
}  // namespace gkd_d2
