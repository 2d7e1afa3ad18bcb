// The element types of features, and the type that each is summed up in.
#pragma once

#include <cstdint>

namespace gkd_d2 {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename scalar_t>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename scalar_t>
using acc_type = typename AccType<scalar_t>::type;

// The sums over channels that are kept per cell.
enum CellSum { kStudentMap, kTeacherMap, kDistance, kStudentMagnitude, kTeacherMagnitude, kCellSums };

}  // namespace gkd_d2
