// The box context masks.
#pragma once

#include "kernels.h"
#include "lanes.h"

namespace gkd_d2 {
namespace {

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
void box_masks_kernel(const BoxMaskTask<acc_t>& task) {
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

}  // namespace
}  // namespace gkd_d2
