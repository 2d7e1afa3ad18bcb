// The arithmetic of docs/method.md that the CPU and the CUDA kernels share. Its functions take scalars, and the
// elementwise ones also GCC vectors, for which `?:` selects lane by lane.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define GKD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GKD_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace gkd_d2 {

enum class Weighting : int { kGradient, kAttention, kAttentionGradient, kUniform };

// Everything the kernels need to know about the losses. The four weights are already divided by N.
struct Terms {
  double gradient, box, attention, image;
  // Which weights are not 0: kernels ask for it in their inner loops, where most GPUs are slow to compare doubles.
  bool has_gradient, has_box, has_attention, has_image;
  double temperature;
  Weighting weighting;
  bool relu, map_in_boxes;

  GKD_HOST_DEVICE bool any() const { return has_gradient || has_attention || imitates(); }
  GKD_HOST_DEVICE bool imitates() const { return has_box || has_image; }
  GKD_HOST_DEVICE bool weighs_by(Weighting kind) const { return imitates() && weighting == kind; }
  GKD_HOST_DEVICE bool weighs_by_map() const {
    return weighs_by(Weighting::kGradient) || weighs_by(Weighting::kAttentionGradient);
  }
  GKD_HOST_DEVICE bool weighs_by_attention() const {
    return weighs_by(Weighting::kAttention) || weighs_by(Weighting::kAttentionGradient);
  }
  // Of loss_gkd_gradient, for a sum over the cells.
  GKD_HOST_DEVICE double map_weight(int64_t cells) const {
    return map_in_boxes ? gradient : gradient / static_cast<double>(cells);
  }
  // Which statistics of the inputs enter any loss.
  GKD_HOST_DEVICE bool needs_student_map() const { return has_gradient; }
  GKD_HOST_DEVICE bool needs_teacher_map() const { return has_gradient || weighs_by_map(); }
  GKD_HOST_DEVICE bool needs_student_magnitude() const { return has_attention; }
  GKD_HOST_DEVICE bool needs_teacher_magnitude() const { return has_attention || weighs_by_attention(); }
  GKD_HOST_DEVICE bool needs_mask() const { return has_box || (has_gradient && map_in_boxes); }
};

// What forward leaves for backward at one level: maps of N,H*W and vectors of N,C, each only where a loss needs it.
// `offset` counts elements from the level's start; the order is that of the members.
struct StateLayout {
  int64_t gradient_map = 0;       // dloss/dg_S of loss_gkd_gradient, in alpha's unit
  int64_t cell_weight = 0;        // v
  int64_t box_mask = 0;           // M
  int64_t cell_attention = 0;     // dloss/d(mean over c of |S|), times 1/C, of loss_bmfi_attention
  int64_t alpha = 0;              // alpha_S, in its own unit
  int64_t channel_weight = 0;     // u
  int64_t channel_attention = 0;  // dloss/d(mean over h,w of |S|), times 1/(H*W), of loss_bmfi_attention
  int64_t size = 0;

  StateLayout(const Terms& terms, int64_t images, int64_t channels, int64_t cells) {
    const auto take = [this](bool needed, int64_t count) {
      const int64_t offset = size;
      size += needed ? count : 0;
      return offset;
    };
    gradient_map = take(terms.has_gradient, images * cells);
    cell_weight = take(terms.imitates(), images * cells);
    box_mask = take(terms.has_box, images * cells);
    cell_attention = take(terms.has_attention, images * cells);
    alpha = take(terms.has_gradient, images * channels);
    channel_weight = take(terms.imitates(), images * channels);
    channel_attention = take(terms.has_attention, images * channels);
  }
};

template <typename value_t>
GKD_HOST_DEVICE value_t absolute(value_t x) {
  return x < 0 ? -x : x;
}
// One instruction, or none at all, for a scalar.
GKD_HOST_DEVICE float absolute(float x) { return std::fabs(x); }
GKD_HOST_DEVICE double absolute(double x) { return std::fabs(x); }

// sign(0) = 0
template <typename value_t>
GKD_HOST_DEVICE value_t sign(value_t x) {
  const value_t zero{};
  return x > 0 ? zero + 1 : (x < 0 ? zero - 1 : zero);
}

// G from g
template <typename value_t>
GKD_HOST_DEVICE value_t rectified(value_t g, bool relu) {
  if (relu) return g < 0 ? value_t{} : g;
  return absolute(g);
}

// dG/dg
template <typename value_t>
GKD_HOST_DEVICE value_t rectifier_slope(value_t g, bool relu) {
  const value_t slope = sign(g);
  if (relu) return slope < 0 ? value_t{} : slope;
  return slope;
}

// The unit that the alphas of an image are divided by: the power of two at or below the largest magnitude among them.
// Maps and u don't depend on it, but without it they would not survive alphas near the ends of the type's range. 1
// where all are 0, NaN where one is infinite.
template <typename acc_t>
GKD_HOST_DEVICE acc_t alpha_unit(acc_t largest) {
  if (largest == 0) return 1;
  int exponent;
  return largest / (2 * std::frexp(largest, &exponent));
}

// What max - min of G may be from rounding alone, which must not become a map: some units in the last place of the sum
// over c of |alpha F|, at the image's first cell, for where a map is flat all cells have about the same sum.
template <typename acc_t>
struct MapNoise {
  static constexpr acc_t kUnits = 16 * std::numeric_limits<acc_t>::epsilon();
  // Below it sums of |alpha F| lose bits to underflow, and what is divided by a range may overflow.
  static constexpr acc_t kLeast = std::numeric_limits<acc_t>::min() / std::numeric_limits<acc_t>::epsilon();

  // A channel's share. This order of the factors does not overflow.
  template <typename value_t>
  GKD_HOST_DEVICE static value_t share(value_t alpha, value_t feature) {
    return absolute(kUnits * alpha * feature);
  }
};

// max - min of G, 0 where it is noise. A NaN stays NaN.
template <typename acc_t>
GKD_HOST_DEVICE acc_t map_range(acc_t low, acc_t high, acc_t noise) {
  const acc_t range = high - low;
  return range < noise || range < MapNoise<acc_t>::kLeast ? acc_t{0} : range;
}

// Ghat from G; a division, so that the extremes are 0 and 1 exactly. What is not finite stays NaN, in a flat map too.
template <typename value_t, typename acc_t>
GKD_HOST_DEVICE value_t unit_range(value_t G, acc_t low, acc_t range) {
  return range == 0 ? G - G : (G - low) / range;
}

// The extremes of G of one image and level, and what loss_gkd_gradient's gradient takes through them.
template <typename acc_t>
struct MapExtremes {
  acc_t low, high, range;
  acc_t low_share, high_share;  // what each cell at the minimum and at the maximum adds to p
};

// The logarithm of a cell's weight under Weighting::kAttentionGradient beside that of its map, for the most that is
// over cells where the map is not 0: there it is at most 0, and elsewhere of no matter. A NaN stays NaN.
template <typename value_t, typename acc_t>
GKD_HOST_DEVICE value_t attended_exponent(value_t magnitude, acc_t most, acc_t scale) {
  const value_t exponent = (magnitude - most) * scale;
  return exponent > 0 ? value_t{} : exponent;
}

// dloss/dg_S of one cell, loss weight included: q of docs/method.md
template <typename value_t, typename acc_t>
GKD_HOST_DEVICE value_t gradient_map_slope(value_t g, value_t s, const MapExtremes<acc_t>& extremes, acc_t weight,
                                           bool relu) {
  const value_t G = rectified(g, relu);
  const value_t zero{};
  value_t p = s;
  p += G == extremes.low ? zero + extremes.low_share : zero;
  p += G == extremes.high ? zero + extremes.high_share : zero;
  return extremes.range == 0 ? zero : rectifier_slope(g, relu) * p * (weight / extremes.range);
}

// The factors of one channel, or of one cell, in the gradient with respect to S. The losses' incoming gradients are
// part of the cell's, that of loss_bmfi_attention of both.
template <typename value_t>
struct GradientFactors {
  value_t imitation;  // channel: u;  cell: 2 * (kbox * M + kimage) * v
  value_t map;        // channel: alpha_S;  cell: q
  value_t attention;  // channel: a/(H*W);  cell: b/C
};

// The gradient of one element of S; the factors of a channel and of a cell meet alike, so either may be the vector.
template <typename value_t, typename a_t, typename b_t>
GKD_HOST_DEVICE value_t feature_gradient(const Terms& terms, value_t student, value_t teacher,
                                         const GradientFactors<a_t>& a, const GradientFactors<b_t>& b) {
  value_t gradient{};
  if (terms.imitates()) gradient += a.imitation * b.imitation * (student - teacher);
  if (terms.has_gradient) gradient += a.map * b.map;
  if (terms.has_attention) gradient += sign(student) * (a.attention + b.attention);
  return gradient;
}

// One side of a box on the feature grid: cells [first, last), and the doubled side, its context.
struct GridSpan {
  double first, last;

  GKD_HOST_DEVICE GridSpan(double low, double high, double cells, double pixels)
      : first(std::floor(low * cells / pixels)), last(std::ceil(high * cells / pixels)) {}
  GKD_HOST_DEVICE double extent() const { return last - first; }
  GKD_HOST_DEVICE double centre() const { return (first + last) / 2; }
  // The cells of the box, clipped to the map.
  GKD_HOST_DEVICE int64_t begin(int64_t cells) const { return clipped(first + 0.5, cells); }
  GKD_HOST_DEVICE int64_t end(int64_t cells) const { return clipped(last + 0.5, cells); }
  // The cells with a centre inside the context, clipped to the map.
  GKD_HOST_DEVICE int64_t context_begin(int64_t cells) const { return clipped(centre() - extent(), cells); }
  GKD_HOST_DEVICE int64_t context_end(int64_t cells) const { return clipped(centre() + extent(), cells); }
  GKD_HOST_DEVICE bool holds(int64_t cell) const { return first <= cell && cell < last; }
  // -((x - centre) / extent)^2 / 2 at the centre of a cell
  GKD_HOST_DEVICE double exponent(int64_t cell) const {
    const double distance = (static_cast<double>(cell) + 0.5 - centre()) / extent();
    return -distance * distance / 2;
  }

 private:
  // The first cell whose centre is at or after `position`.
  GKD_HOST_DEVICE static int64_t clipped(double position, int64_t cells) {
    const double cell = std::ceil(position - 0.5);
    if (!(cell > 0)) return 0;
    return cell < static_cast<double>(cells) ? static_cast<int64_t>(cell) : cells;
  }
};

// A box of the ground truth on the feature grid.
struct GridBox {
  GridSpan x, y;

  GKD_HOST_DEVICE GridBox(const double* xyxy, int64_t height, int64_t width, double image_height, double image_width)
      : x(xyxy[0], xyxy[2], static_cast<double>(width), image_width),
        y(xyxy[1], xyxy[3], static_cast<double>(height), image_height) {}

  // Empty boxes and boxes with a coordinate that is not finite are skipped; `x - x` is NaN where x is not finite.
  GKD_HOST_DEVICE static bool usable(const double* xyxy) {
    for (int i = 0; i < 4; ++i) {
      if (!(xyxy[i] - xyxy[i] == 0)) return false;
    }
    return xyxy[2] > xyxy[0] && xyxy[3] > xyxy[1];
  }
  GKD_HOST_DEVICE double scale() const { return 1 / (4 * x.extent() * y.extent()); }
};

}  // namespace gkd_d2
