// The kernels, compiled once per instruction set: see simd.h for what the includer defines.
#pragma once

#include "attention.h"
#include "box_masks.h"
#include "cell_sums.h"
#include "channel_sums.h"
#include "finish.h"
#include "gradient.h"
#include "kernels.h"

namespace gkd_d2 {
namespace {

template <typename scalar_t>
constexpr Kernels<scalar_t> kernels_of() {
  using acc_t = acc_type<scalar_t>;
  return {channel_sums_kernel<scalar_t>,   cell_sums_kernel<scalar_t>, box_masks_kernel<acc_t>,
          attention_weights_kernel<acc_t>, finish_kernel<acc_t>,       gradient_kernel<scalar_t>};
}

constexpr KernelSet kKernels = {kernels_of<float>(), kernels_of<double>(), kernels_of<BFloat16>(),
                                kernels_of<Float16>()};

}  // namespace
}  // namespace gkd_d2
