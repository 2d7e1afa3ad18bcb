// What crosses from the op to its kernels on the CPU: plain structs of pointers and sizes, and one table of functions
// per element type and instruction set. No torch header, so that the kernels compile in seconds.
#pragma once

#include <cstdint>

#include "../math.h"
#include "../types.h"

namespace gkd_d2 {

// The most cells that one CellSumTask and one GradientTask take: what they keep per cell stays in the cache of a core.
constexpr int64_t kSumCells = 4096;
constexpr int64_t kGradientCells = 32768;
// The most rows that one BoxMaskTask takes.
constexpr int64_t kMaskRows = 64;

template <typename scalar_t>
struct ChannelSumTask {
  const scalar_t* input;  // one image
  int64_t channels, cells;
  bool channels_last, absolute;
  int64_t begin, end;        // channels (contiguous) or cells (channels_last)
  acc_type<scalar_t>* sums;  // of the channels [begin, end), or of all channels over the cells [begin, end)
};

template <typename scalar_t>
struct CellSumTask {
  using acc_t = acc_type<scalar_t>;
  const scalar_t *student, *teacher;  // one image
  int64_t channels, cells;
  bool channels_last;
  int64_t begin, end;  // cells
  bool maps, distance, magnitudes;
  const acc_t *student_alpha, *teacher_alpha, *channel_weight;  // C each, of those asked for
  acc_t* cell_sums[kCellSums];                                  // of the image's cells; null: not wanted
  acc_t *student_channel_sums, *teacher_channel_sums;           // C each: magnitudes over the cells [begin, end)
  acc_t *student_noise, *teacher_noise;                         // of the maps; from the image's first cell
};

// The rows [begin, end) of one image's box context mask.
template <typename acc_t>
struct BoxMaskTask {
  const double* boxes;  // count x 4
  int64_t count;
  int64_t height, width;
  double image_height, image_width;
  int64_t begin, end;
  acc_t* mask;  // H*W, of the image
};

// Everything that is small: from the sums over channels of one image and level to its losses and to backward's state.
template <typename acc_t>
struct FinishTask {
  Terms terms;
  int64_t channels, cells;
  acc_t* cell_sums[kCellSums];                           // overwritten; the results below may lie in their places
  acc_t *student_channel_means, *teacher_channel_means;  // C, of magnitudes; overwritten
  acc_t *gradient_map, *cell_weight, *cell_attention, *channel_attention;  // see StateLayout
  const acc_t* box_mask;
  acc_t student_noise, teacher_noise;
  double losses[4];
};

template <typename scalar_t>
struct GradientTask {
  using acc_t = acc_type<scalar_t>;
  const scalar_t *student, *teacher;  // one image
  scalar_t* gradient;
  int64_t channels, cells;
  bool channels_last;
  int64_t begin, end;                  // cells
  int64_t channel_begin, channel_end;  // where not channels_last
  bool streaming;                      // store past the caches
  Terms terms;
  double loss_gradients[4];
  const acc_t *gradient_map, *cell_weight, *box_mask, *cell_attention;
  const acc_t *alpha, *channel_weight, *channel_attention;
};

template <typename scalar_t>
struct Kernels {
  using acc_t = acc_type<scalar_t>;
  void (*channel_sums)(const ChannelSumTask<scalar_t>&);
  void (*cell_sums)(const CellSumTask<scalar_t>&);
  void (*box_masks)(const BoxMaskTask<acc_t>&);
  void (*attention_weights)(acc_t* values, int64_t count, double temperature);  // in place
  void (*finish)(FinishTask<acc_t>&);
  void (*gradient)(const GradientTask<scalar_t>&);
};

struct KernelSet {
  Kernels<float> float32;
  Kernels<double> float64;
  Kernels<BFloat16> bfloat16;
  Kernels<Float16> float16;
};

const KernelSet& default_kernels();
#if defined(__x86_64__)
const KernelSet& avx2_kernels();
const KernelSet& avx512_kernels();
#endif

}  // namespace gkd_d2
