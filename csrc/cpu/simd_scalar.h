// The operations the generic kernels are written in, one lane at a time. simd_avx2.h and simd_avx512.h have the same
// members; those whose meaning is not in the name are explained here.
#pragma once

#include "loftq/half.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

struct Scalar {
  static constexpr int kLanes = 1;  // a power of two up to 16
  using Floats = float;             // kLanes float32
  using Ints = int32_t;             // kLanes int32
  using Doubles = double;           // kLanes float64

  static Floats broadcast(float value) { return value; }
  static Floats load(const float* p) { return *p; }
  static Floats load_half(const uint16_t* p) { return half_to_float(*p); }
  static Floats load_bfloat(const uint16_t* p) { return bfloat_to_float(*p); }
  static void load_half_rest(const uint16_t*, int64_t, float*) {}  // fewer than kLanes halfs to floats
  static void store(float* p, Floats v) { *p = v; }
  static void store_half(uint16_t* p, Floats v) { *p = float_to_half(v); }
  static void store_bfloat(uint16_t* p, Floats v) { *p = float_to_bfloat(v); }
  static uint16_t to_half(float value) { return float_to_half(value); }
  static float from_half(uint16_t half) { return half_to_float(half); }

  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }  // in one rounding or two
  static float sum(Floats v) { return v; }                               // of the lanes
  // kLanes x kLanes values: dst[j * dst_stride + i] = src[i * src_stride + j]
  static void transpose(const float* src, int64_t, float* dst, int64_t) { *dst = *src; }
  static Floats min(Floats a, Floats b) { return a < b ? a : b; }  // b where either is NaN
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN
  static float lowest(Floats v) { return v; }                      // of the lanes
  static float highest(Floats v) { return v; }                     // of the lanes

  static Ints zero() { return 0; }
  static Ints bits(Floats v) { return static_cast<int32_t>(bits_of(v)); }
  static Ints magnitude_bits(Floats v) { return bits(v) & 0x7fffffff; }
  static Ints max(Ints a, Ints b) { return a > b ? a : b; }
  static int32_t highest(Ints v) { return v; }
  static Ints load_bytes(const uint8_t* p) { return *p; }
  static void store_bytes(uint8_t* p, Ints v) { *p = static_cast<uint8_t>(v); }  // each lane in [0, 255]
  static Ints or_shifted_left(Ints a, Ints b, int shift) { return a | b << shift; }
  static Ints shift_right(Ints v, int shift) { return v >> shift; }
  static Ints add(Ints v, int32_t addend) { return v + addend; }
  static Floats to_floats(Ints v) { return static_cast<float>(v); }
  static Ints count_if_less(Ints counts, Floats a, Floats b) { return counts + (a < b); }
  static Floats gather(const float* table, Ints index) { return table[index]; }

  static Doubles zero_doubles() { return 0; }
  static Doubles broadcast(double value) { return value; }
  static Doubles widen(Floats v) { return v; }
  static Doubles add(Doubles a, Doubles b) { return a + b; }
  static Doubles sub(Doubles a, Doubles b) { return a - b; }
  static Doubles mul(Doubles a, Doubles b) { return a * b; }
  static Doubles first(Doubles v, int64_t count) { return count > 0 ? v : 0; }  // lanes from `count` on become 0
  static double fold(Doubles v) { return v; }  // lanes 0..7 += 8..15, then 0..3 += 4..7, ...

  // 2^kBits float32 values, looked up by the low kBits bits of each lane; the bits above are ignored.
  template <int kBits>
  struct Table {
    float values[1 << kBits];

    explicit Table(const float* source) {
      for (int i = 0; i < 1 << kBits; ++i) values[i] = source[i];
    }
    Table scaled(float scale, float offset) const {
      Table result = *this;
      for (float& value : result.values) value = value * scale + offset;
      return result;
    }
    Floats operator[](Ints index) const { return values[index & ((1 << kBits) - 1)]; }
  };

  // How many of the 2^kBits - 1 ascending midpoints lie strictly below x, by bisection.
  template <int kBits>
  struct CountBelow {
    const float* midpoints;

    explicit CountBelow(const float* ascending) : midpoints(ascending) {}
    Ints operator()(Floats x) const {
      Ints count = 0;
      // This multiplies instead of branching: a branch on a random bit costs more than the rest.
      for (int step = 1 << (kBits - 1); step > 0; step /= 2) count += step * (midpoints[count + step - 1] < x);
      return count;
    }
  };
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
