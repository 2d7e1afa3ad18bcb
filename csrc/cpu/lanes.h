// How the kernels walk over runs of elements, a vector at a time.
#pragma once

#include "simd.h"

namespace gkd_d2 {
namespace {

// Ways to walk over a run of elements: whole vectors, then the rest in one vector whose last lanes are void.
template <typename acc_t>
struct AllLanes {
  template <typename scalar_t>
  GKD_INLINE Vector<acc_t> load(const scalar_t* from) const {
    return gkd_d2::load(from);
  }
  GKD_INLINE void store(acc_t* to, Vector<acc_t> value) const { gkd_d2::store(to, value); }
  GKD_INLINE Vector<acc_t> keep(Vector<acc_t> value, Vector<acc_t> = Vector<acc_t>{}) const { return value; }
};

template <typename acc_t>
struct FirstLanes {
  int64_t count;

  template <typename scalar_t>
  GKD_INLINE Vector<acc_t> load(const scalar_t* from) const {
    return load_first(from, count);
  }
  GKD_INLINE void store(acc_t* to, Vector<acc_t> value) const { store_first(to, value, count); }
  // `value` in the lanes that count, `other` in the void ones.
  GKD_INLINE Vector<acc_t> keep(Vector<acc_t> value, Vector<acc_t> other = Vector<acc_t>{}) const {
    for (int64_t lane = count; lane < kLanes<acc_t>; ++lane) value[lane] = other[lane];
    return value;
  }
};

template <typename acc_t, typename function_t>
GKD_INLINE void for_each_vector(int64_t count, const function_t& function) {
  int64_t i = 0;
  for (; i + kLanes<acc_t> <= count; i += kLanes<acc_t>) function(AllLanes<acc_t>{}, i);
  if (i < count) function(FirstLanes<acc_t>{count - i}, i);
}

// A long sum: vectors are added up in acc_t for a while, and the totals of these runs in double.
template <typename acc_t>
class LongSum {
 public:
  GKD_INLINE void add(Vector<acc_t> value) {
    run_ += value;
    if (++length_ == kRun) flush();
  }
  GKD_INLINE double total() {
    flush();
    return total_;
  }

 private:
  static constexpr int kRun = 64;
  GKD_INLINE void flush() {
    total_ += static_cast<double>(horizontal_sum(run_));
    run_ = Vector<acc_t>{};
    length_ = 0;
  }
  Vector<acc_t> run_{};
  double total_ = 0;
  int length_ = 0;
};

}  // namespace
}  // namespace gkd_d2
