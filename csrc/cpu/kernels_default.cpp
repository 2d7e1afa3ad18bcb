// The kernels for the instruction set that every machine of the architecture has.
#define GKD_SIMD_BYTES 16
#include "kernels_impl.h"

namespace gkd_d2 {
const KernelSet& default_kernels() { return kKernels; }
}  // namespace gkd_d2
