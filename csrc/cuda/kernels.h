// What crosses from the op to its CUDA kernels: plain structs of pointers and sizes, passed to the kernels by value.
// No torch header, so that the kernels compile in seconds.
#pragma once

#include <cuda_runtime_api.h>

#include "../math.h"
#include "../types.h"

namespace gkd_d2 {

// Levels that one launch takes, and images whose boxes it takes.
constexpr int kMaxLevels = 10;
constexpr int kMaxImages = 48;

constexpr int kThreads = 256;
// Cells of a map that a block takes where everything per cell is at hand already.
constexpr int kChunkCells = 1024;
// Channels of a contiguous map's gradient that a block takes.
constexpr int kGradientChannels = 64;
// channels_last features are cut into parts of at least so many cells, about so many blocks a level, and at most so
// many parts, which one block of the next kernel adds up.
constexpr int kPartCells = 64;
constexpr int kPartBlocks = 512;
constexpr int kMaxParts = 256;

template <typename scalar_t>
constexpr int kVectorSize = 16 / static_cast<int>(sizeof(scalar_t));
// Cells that a block takes of features, and channels of channels_last features that it sums up: a vector a lane.
template <typename scalar_t>
constexpr int kTile = 32 * kVectorSize<scalar_t>;

enum Input { kStudentGrad, kTeacherGrad, kStudent, kTeacher, kInputs };

// The extremes over a tile or image: of the maps G (minima are negated, so that all are maxima) and of magnitudes.
enum Extreme { kStudentLow, kStudentHigh, kTeacherLow, kTeacherHigh, kStudentMost, kTeacherMost, kExtremes };

// First sums over the cells of a chunk or image, for which the extremes must be known.
enum FirstSum {
  kMapDistance,
  kThroughLow,
  kThroughHigh,
  kLows,
  kHighs,
  kTeacherUnit,
  kStudentExp,
  kTeacherExp,
  kFirstSums
};

// First sums over the cells of a chunk for v under Weighting::kAttentionGradient: the most of the teacher's magnitudes
// where its map is not 0, and the sum of the map times its attention about it.
enum AttendedSum { kAttendedMost, kAttendedTotal, kAttendedSums };

// Second sums, for which the first must be known.
enum SecondSum { kBoxDistance, kImageDistance, kAttentionDistance, kAttentionSign, kSecondSums };

template <typename acc_t>
struct LevelData {
  int channels, height, width, cells;
  // Each N,C,H,W, or N,H,W,C where channels_last; `vectors` tells whether 16 bytes may be read at a time.
  const void* inputs[kInputs];
  bool channels_last[kInputs], vectors[kInputs];
  void* gradient;  // like inputs[kStudent]

  // Made on the host, for most GPUs are slow to divide doubles.
  acc_t gradient_weight;          // of the loss, / (H*W) where it is over the whole image
  acc_t image_weight;             // of the loss, / (H*W)
  acc_t magnitude_scale;          // 1 / (C * temperature)
  acc_t channel_attention_scale;  // attention / (temperature * H*W)
  acc_t cell_attention_scale;     // attention / (temperature * C)

  acc_t* channel_sums[kInputs];  // N, parts, C: of gradients and of magnitudes over a part of the cells
  int channel_parts[kInputs];
  int summed_cells[kInputs];  // the cells of all parts; 1 where the sums are means already, given in the input's place
  acc_t* channel_means[kInputs];  // N,C; that of kStudentGrad is alpha
  acc_t* channel_distance;        // N: sum over c of |Ac(S) - Ac(T)|
  acc_t* cell_sums[kCellSums];    // N,H*W each; null: not wanted
  acc_t* map_noise;               // N,2: of the student's map and of the teacher's
  acc_t* extremes;                // N, tiles, kExtremes
  acc_t* first_sums;              // N, chunks, kFirstSums
  acc_t* attended_sums;           // N, chunks, kAttendedSums
  acc_t* second_sums;             // N, chunks, kSecondSums

  // See StateLayout.
  acc_t *gradient_map, *cell_weight, *box_mask, *cell_attention;
  acc_t *alpha, *channel_weight, *channel_attention;
};

// The blocks of a launch are numbered through; those of level l start at first[l].
struct BlockTable {
  int first[kMaxLevels + 1];
};

template <typename acc_t>
struct Params {
  Terms terms;
  acc_t box_weight, attention_weight;
  acc_t temperature_scale;  // 1 / temperature
  int images, num_levels;
  LevelData<acc_t> levels[kMaxLevels];
};

template <typename acc_t>
struct ForwardParams : Params<acc_t> {
  int num_inputs;
  Input inputs[kInputs];  // those whose channels are summed up
  BlockTable channel_blocks[kInputs], tile_blocks, chunk_blocks;
  const double* boxes;  // K,4, the images' one after the other
  double image_height, image_width;
  acc_t* losses;  // 4
};

// Where the boxes of the images [first_image, first_image + kMaxImages) start, and after the last of them.
struct BoxOffsets {
  int first_image, num_images;
  int offset[kMaxImages + 1];
};

// What a kernel may be passed.
static_assert(sizeof(ForwardParams<double>) + sizeof(BoxOffsets) <= 4096, "the parameters of a launch are too large");

template <typename acc_t>
struct BackwardParams : Params<acc_t> {
  BlockTable blocks;
  const acc_t* loss_gradients;  // 4
};

// The kernels of forward, in this order, each in the file of its stage; instantiated for float, double, BFloat16 and
// Float16.
template <typename scalar_t>
cudaError_t launch_channel_sums(const ForwardParams<acc_type<scalar_t>>& params, cudaStream_t stream);
template <typename acc_t>
cudaError_t launch_channel_weights(const ForwardParams<acc_t>& params, cudaStream_t stream);
template <typename scalar_t>
cudaError_t launch_cell_sums(const ForwardParams<acc_type<scalar_t>>& params, cudaStream_t stream);
template <typename acc_t>
cudaError_t launch_box_masks(const ForwardParams<acc_t>& params, const BoxOffsets& offsets, cudaStream_t stream);
template <typename acc_t>
cudaError_t launch_finish(const ForwardParams<acc_t>& params, int tile, cudaStream_t stream);

template <typename scalar_t>
cudaError_t launch_gradient(const BackwardParams<acc_type<scalar_t>>& params, cudaStream_t stream);

}  // namespace gkd_d2
