// Reductions over a warp and over a block. Sums are made in two stages, first within a block and then over blocks in a
// fixed order, without atomics: a repeated call is equal bit by bit.
#pragma once

#include "blocks.cuh"

namespace gkd_d2 {

struct Plus {
  template <typename acc_t>
  __device__ __forceinline__ acc_t operator()(acc_t a, acc_t b) const {
    return a + b;
  }
};
struct Larger {
  template <typename acc_t>
  __device__ __forceinline__ acc_t operator()(acc_t a, acc_t b) const {
    return a > b ? a : b;
  }
};

template <typename acc_t, typename op_t>
__device__ __forceinline__ acc_t reduce_warp(acc_t value, const op_t& op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, offset));
  return value;
}

// Reduces each of `values` over the block; every thread gets the results.
template <int kCount, typename acc_t, typename op_t>
__device__ __forceinline__ void reduce_block(acc_t (&values)[kCount], const op_t& op) {
  __shared__ acc_t of_warps[kCount][kWarps];
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const acc_t value = reduce_warp(values[k], op);
    if (threadIdx.x % kWarp == 0) of_warps[k][threadIdx.x / kWarp] = value;
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    values[k] = of_warps[k][0];
    for (int warp = 1; warp < kWarps; ++warp) values[k] = op(values[k], of_warps[k][warp]);
  }
  __syncthreads();
}

// Reduces `parts` records of kCount values that lie one after the other in memory.
template <int kCount, typename acc_t, typename op_t>
__device__ __forceinline__ void reduce_parts(const acc_t* parts, int num_parts, acc_t identity, acc_t (&values)[kCount],
                                             const op_t& op) {
#pragma unroll
  for (int k = 0; k < kCount; ++k) values[k] = identity;
  for (int part = threadIdx.x; part < num_parts; part += kThreads) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) values[k] = op(values[k], parts[part * kCount + k]);
  }
  reduce_block(values, op);
}

}  // namespace gkd_d2
