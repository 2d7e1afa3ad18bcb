// The kernels for AVX-512.
#if defined(__x86_64__)
// Headers of the system come first, so that no function of theirs is compiled for AVX-512.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define GKD_SIMD_BYTES 64
#define GKD_SIMD_F16C
#include "kernels_impl.h"

namespace gkd_d2 {
const KernelSet& avx512_kernels() { return kKernels; }
}  // namespace gkd_d2

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
