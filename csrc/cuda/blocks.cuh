// How the threads of a block form warps, and the blocks of a launch are shared out to the levels.
#pragma once

#include "kernels.h"

namespace gkd_d2 {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

__host__ __device__ __forceinline__ int divide_up(int value, int by) { return (value + by - 1) / by; }

struct Place {
  int level, block;  // block: within the level
};

__device__ __forceinline__ Place locate(const BlockTable& table, int num_levels) {
  int level = 0;
  while (level + 1 < num_levels && static_cast<int>(blockIdx.x) >= table.first[level + 1]) ++level;
  return {level, static_cast<int>(blockIdx.x) - table.first[level]};
}

}  // namespace gkd_d2
