// Vectors of as many lanes as the instruction set of the including file has, after GCC's and Clang's vector
// extension. The includer defines GKD_SIMD_BYTES (and GKD_SIMD_F16C where half precision converts in hardware).
// Everything is in an anonymous namespace: no function compiled for one instruction set may stand in for another's.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math.h"
#include "kernels.h"

namespace gkd_d2 {
namespace {

#define GKD_INLINE inline __attribute__((always_inline))

constexpr int kVectorBytes = GKD_SIMD_BYTES;

template <typename acc_t>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};

template <typename acc_t>
using Vector = typename VectorOf<acc_t>::type;
template <typename acc_t>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(acc_t));

// The vectors that 16-bit floats are kept and converted in.
constexpr int kHalfLanes = kLanes<float>;
typedef uint16_t U16 __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kVectorBytes)));

template <typename to_t, typename from_t>
GKD_INLINE to_t bit_cast(const from_t& from) {
  static_assert(sizeof(to_t) == sizeof(from_t), "bit_cast keeps the size");
  to_t to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename acc_t>
GKD_INLINE Vector<acc_t> broadcast(acc_t value) {
  return Vector<acc_t>{} + value;
}

template <typename to_t>
GKD_INLINE to_t load_bytes(const void* from) {
  to_t to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// Register values of the 16-bit types and their conversions.
GKD_INLINE Vector<float> widen(U16 bits, BFloat16) {
  return bit_cast<Vector<float>>(__builtin_convertvector(bits, U32) << 16);
}

GKD_INLINE U16 narrow(Vector<float> value, BFloat16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(value == value ? rounded : U32{} + 0x7fc0u, U16);
}

#if defined(GKD_SIMD_F16C) && GKD_SIMD_BYTES == 64
GKD_INLINE Vector<float> widen(U16 bits, Float16) {
  return bit_cast<Vector<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(bits)));
}
GKD_INLINE U16 narrow(Vector<float> value, Float16) {
  return bit_cast<U16>(_mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(GKD_SIMD_F16C) && GKD_SIMD_BYTES == 32
GKD_INLINE Vector<float> widen(U16 bits, Float16) {
  return bit_cast<Vector<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(bits)));
}
GKD_INLINE U16 narrow(Vector<float> value, Float16) {
  return bit_cast<U16>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Without a conversion instruction: the exponent is moved by a multiplication, which gets subnormals right too.
GKD_INLINE Vector<float> widen(U16 half, Float16) {
  const U32 bits = __builtin_convertvector(half, U32);
  const U32 magnitude = (bits & 0x7fffu) << 13;
  const Vector<float> finite = bit_cast<Vector<float>>(magnitude) * 0x1p112f;
  const U32 special = magnitude | 0x7f800000u;
  const U32 value = magnitude >= (0x7c00u << 13) ? special : bit_cast<U32>(finite);
  return bit_cast<Vector<float>>(value | ((bits & 0x8000u) << 16));
}
GKD_INLINE U16 narrow(Vector<float> value, Float16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 magnitude = bits & 0x7fffffffu;
  const U32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 rounds at the place of the last subnormal bit: 2^-24 = 0.5 * 2^-23.
  const U32 subnormal = bit_cast<U32>(bit_cast<Vector<float>>(magnitude) + 0.5f) - 0x3f000000u;
  U32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? U32{} + 0x7e00u : half;
  return __builtin_convertvector(half | ((bits >> 16) & 0x8000u), U16);
}
#endif

GKD_INLINE Vector<float> load(const float* from) { return load_bytes<Vector<float>>(from); }
GKD_INLINE Vector<double> load(const double* from) { return load_bytes<Vector<double>>(from); }
GKD_INLINE Vector<float> load(const BFloat16* from) { return widen(load_bytes<U16>(from), BFloat16{}); }
GKD_INLINE Vector<float> load(const Float16* from) { return widen(load_bytes<U16>(from), Float16{}); }

GKD_INLINE Vector<float> packed(Vector<float> value, float) { return value; }
GKD_INLINE Vector<double> packed(Vector<double> value, double) { return value; }
GKD_INLINE U16 packed(Vector<float> value, BFloat16 type) { return narrow(value, type); }
GKD_INLINE U16 packed(Vector<float> value, Float16 type) { return narrow(value, type); }

template <typename scalar_t, typename vector_t>
GKD_INLINE void store(scalar_t* to, vector_t value) {
  const auto bytes = packed(value, scalar_t{});
  std::memcpy(to, &bytes, sizeof(bytes));
}

// A store past the caches, to an address aligned to the vector's size in memory.
template <typename scalar_t, typename vector_t>
GKD_INLINE void store_streaming(scalar_t* to, vector_t value) {
  const auto bytes = packed(value, scalar_t{});
#if GKD_SIMD_BYTES == 64
  if (sizeof(bytes) == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_bytes<__m512i>(&bytes));
#endif
#if GKD_SIMD_BYTES >= 32
  if (sizeof(bytes) == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_bytes<__m256i>(&bytes));
#endif
#if defined(__SSE2__)
  if (sizeof(bytes) == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_bytes<__m128i>(&bytes));
#endif
  std::memcpy(to, &bytes, sizeof(bytes));
}

// Streaming stores are ordered before what the thread does next only by a fence.
GKD_INLINE void fence_streaming_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first `count` elements; the other lanes are 0.
template <typename scalar_t>
GKD_INLINE auto load_first(const scalar_t* from, int64_t count) {
  scalar_t lanes[kLanes<acc_type<scalar_t>>] = {};
  std::memcpy(lanes, from, static_cast<size_t>(count) * sizeof(scalar_t));
  return load(lanes);
}

template <typename scalar_t, typename vector_t>
GKD_INLINE void store_first(scalar_t* to, vector_t value, int64_t count) {
  const auto bytes = packed(value, scalar_t{});
  std::memcpy(to, &bytes, static_cast<size_t>(count) * sizeof(scalar_t));
}

// Halves are added until two lanes are left.
template <typename vector_t>
GKD_INLINE auto horizontal_sum(vector_t vector) {
  using value_t = std::decay_t<decltype(vector[0])>;
  if constexpr (sizeof(vector_t) == 2 * sizeof(value_t)) {
    return vector[0] + vector[1];
  } else {
    typedef value_t half_t __attribute__((vector_size(sizeof(vector_t) / 2)));
    half_t halves[2];
    std::memcpy(halves, &vector, sizeof(vector));
    return horizontal_sum(halves[0] + halves[1]);
  }
}

template <typename vector_t>
GKD_INLINE vector_t smaller(vector_t a, vector_t b) {
  return a < b ? a : b;
}
template <typename vector_t>
GKD_INLINE vector_t larger(vector_t a, vector_t b) {
  return a > b ? a : b;
}

template <typename vector_t>
GKD_INLINE vector_t square_root(vector_t x) {
  for (size_t lane = 0; lane < sizeof(x) / sizeof(x[0]); ++lane) x[lane] = std::sqrt(x[lane]);
  return x;
}

// exp(x) for x <= 0 (softmax and Gaussian need no more): 2^k * exp(r) with |r| <= ln(2)/2 and the Taylor polynomial of
// exp(r) to the degree that the type's precision takes. exp(NaN) is NaN; below the smallest normal number it is 0.
GKD_INLINE Vector<float> exp_nonpositive(Vector<float> x) {
  const Vector<float> clamped = x > -87.0f ? x : broadcast(-87.0f);
  const Vector<float> shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer k
  const Vector<float> k = shifted - 12582912.0f;
  const Vector<float> r = clamped - k * 0.693359375f - k * -2.12194440e-4f;
  Vector<float> power = broadcast(1.0f / 5040);
  power = power * r + 1.0f / 720;
  power = power * r + 1.0f / 120;
  power = power * r + 1.0f / 24;
  power = power * r + 1.0f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  const U32 exponent = (bit_cast<U32>(shifted) - 0x4b400000u + 127u) << 23;
  const Vector<float> result = power * bit_cast<Vector<float>>(exponent);
  return x > -87.0f ? result : (x == x ? Vector<float>{} : x);
}

GKD_INLINE Vector<double> exp_nonpositive(Vector<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

}  // namespace
}  // namespace gkd_d2
