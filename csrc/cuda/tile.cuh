// How a warp moves features between memory and registers: 16 bytes a lane where their alignment allows.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "blocks.cuh"

namespace gkd_d2 {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float widen(BFloat16 value) {
  return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

__device__ __forceinline__ void narrow(float value, float& to) { to = value; }
__device__ __forceinline__ void narrow(double value, double& to) { to = value; }
__device__ __forceinline__ void narrow(float value, Float16& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ __forceinline__ void narrow(float value, BFloat16& to) {
  to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// 16 bytes of values.
template <typename value_t>
struct alignas(16) Pack {
  value_t values[kVectorSize<value_t>];
};

// The elements that one lane of a warp has of a tile: successive ones where 16 bytes may be moved at a time, else a
// warp's width apart. Elements at or beyond `count` are 0 and are not stored.
template <typename scalar_t, bool kVectors>
struct Tile {
  using acc_t = acc_type<scalar_t>;
  static constexpr int kSize = kVectorSize<scalar_t>;
  // How many packs a lane reads before it uses the first, so that their loads overlap, and how many pairs of S and T. A
  // pack that is read element by element is several loads by itself.
  static constexpr int kPacksAhead = kVectors ? 4 : 2;
  static constexpr int kPairsAhead = kPacksAhead / 2;
  int lane;

  __device__ __forceinline__ int index(int k) const {
    if constexpr (kVectors) return lane * kSize + k;
    return lane + k * kWarp;
  }

  // As they lie in memory: what is made of them comes after the next loads.
  __device__ __forceinline__ Pack<scalar_t> fetch(const scalar_t* from, int count) const {
    Pack<scalar_t> pack{};
    if constexpr (kVectors) {
      if (index(0) < count) pack = *reinterpret_cast<const Pack<scalar_t>*>(from + index(0));
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (index(k) < count) pack.values[k] = from[index(k)];
      }
    }
    return pack;
  }

  // S and T in the rows first, first + kWarps and so on, which start at start_of(row): `count` elements each, none at
  // or beyond the end.
  template <typename start_t>
  __device__ __forceinline__ void fetch_pairs(const scalar_t* student, const scalar_t* teacher, const start_t& start_of,
                                              int first, int end, int count, Pack<scalar_t> (&S)[kPairsAhead],
                                              Pack<scalar_t> (&T)[kPairsAhead]) const {
#pragma unroll
    for (int j = 0; j < kPairsAhead; ++j) {
      const int row = first + j * kWarps;
      const int64_t start = start_of(row);
      S[j] = fetch(student + start, row < end ? count : 0);
      T[j] = fetch(teacher + start, row < end ? count : 0);
    }
  }

  // Of a vector of factors.
  __device__ __forceinline__ void gather(const acc_t* from, int count, acc_t (&values)[kSize]) const {
    // The features may be aligned where what was summed up of them is not.
    if (kVectors && reinterpret_cast<uintptr_t>(from) % sizeof(Pack<acc_t>) == 0) {
#pragma unroll
      for (int k = 0; k < kSize; k += kVectorSize<acc_t>) {
        Pack<acc_t> pack{};
        if (index(k) < count) pack = *reinterpret_cast<const Pack<acc_t>*>(from + index(k));
#pragma unroll
        for (int i = 0; i < kVectorSize<acc_t>; ++i) values[k + i] = pack.values[i];
      }
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) values[k] = index(k) < count ? from[index(k)] : acc_t{0};
    }
  }

  __device__ __forceinline__ void store(scalar_t* to, int count, const acc_t (&values)[kSize]) const {
    if constexpr (kVectors) {
      Pack<scalar_t> pack;
#pragma unroll
      for (int k = 0; k < kSize; ++k) narrow(values[k], pack.values[k]);
      // As one value, for the members of a struct may be stored one by one; past the caches, for nothing here reads it.
      uint4 bytes;
      memcpy(&bytes, &pack, sizeof(bytes));
      if (index(0) < count) __stcs(reinterpret_cast<uint4*>(to + index(0)), bytes);
    } else {
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        if (index(k) < count) narrow(values[k], to[index(k)]);
      }
    }
  }
};

// What a tile is for the elements of many lanes, for one element that all lanes share.
template <typename value_t>
struct Shared {
  static constexpr int kSize = 1;
  __device__ __forceinline__ void gather(const value_t* from, int, value_t (&values)[1]) const { values[0] = *from; }
};

template <typename scalar_t>
__device__ __forceinline__ void widen(const Pack<scalar_t>& pack, acc_type<scalar_t> (&values)[kVectorSize<scalar_t>]) {
#pragma unroll
  for (int k = 0; k < kVectorSize<scalar_t>; ++k) values[k] = widen(pack.values[k]);
}

// The place of element i of a tile in shared memory. An element of room after each 128 bytes keeps lanes whose elements
// are 2, 4 or 8 apart out of each other's banks.
template <typename acc_t>
__device__ __forceinline__ constexpr int padded(int i) {
  return i + i / (128 / static_cast<int>(sizeof(acc_t)));
}
template <typename scalar_t>
constexpr int kPaddedTile = kTile<scalar_t> + kTile<scalar_t> * static_cast<int>(sizeof(acc_type<scalar_t>)) / 128;

}  // namespace gkd_d2
