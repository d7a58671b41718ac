// The operations of simd_scalar.h in AVX2 and F16C, eight lanes at a time.
#pragma once

#include <immintrin.h>

#include "cpu/target.h"
#include "loftq/half.h"

LOFTQ_TARGET_BEGIN("avx2,fma,f16c")

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  using Floats = __m256;
  using Ints = __m256i;
  struct Doubles {
    __m256d low, high;
  };

  static Floats broadcast(float value) { return _mm256_set1_ps(value); }
  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Floats load_half(const uint16_t* p) { return _mm256_cvtph_ps(load_words(p)); }
  static Floats load_bfloat(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_words(p)), 16));
  }
  static void load_half_rest(const uint16_t* p, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = _cvtsh_ss(p[i]);
  }
  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static void store_half(uint16_t* p, Floats v) { store_words(p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_bfloat(uint16_t* p, Floats v) {
    const Ints bits = _mm256_castps_si256(v);
    const Ints odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const Ints rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const Ints is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const Ints words = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    store_words(p, narrow_to_words(words));
  }
  static uint16_t to_half(float value) {
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
  }
  static float from_half(uint16_t half) { return _cvtsh_ss(half); }

  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    Floats rows[8], pairs[8];
    for (int i = 0; i < 8; ++i) rows[i] = load(src + i * src_stride);
    for (int i = 0; i < 8; i += 2) {  // 2 x 2 blocks of values
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {  // 4 x 4: each half of rows[i + j] is part of one column
      for (int j = 0; j < 2; ++j) {
        const __m256d low = _mm256_castps_pd(pairs[i + j]), high = _mm256_castps_pd(pairs[i + j + 2]);
        rows[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        rows[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {
      store(dst + j * dst_stride, _mm256_permute2f128_ps(rows[j], rows[4 + j], 0x20));
      store(dst + (4 + j) * dst_stride, _mm256_permute2f128_ps(rows[j], rows[4 + j], 0x31));
    }
  }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static float lowest(Floats v) {
    __m128 half = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_min_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
  }
  static float highest(Floats v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }

  static Ints zero() { return _mm256_setzero_si256(); }
  static Ints bits(Floats v) { return _mm256_castps_si256(v); }
  static Ints magnitude_bits(Floats v) { return _mm256_and_si256(bits(v), _mm256_set1_epi32(0x7fffffff)); }
  static Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static int32_t highest(Ints v) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
  }
  static Ints load_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(uint8_t* p, Ints v) {
    const __m128i words = narrow_to_words(v);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static Ints or_shifted_left(Ints a, Ints b, int shift) { return _mm256_or_si256(a, _mm256_slli_epi32(b, shift)); }
  static Ints shift_right(Ints v, int shift) { return _mm256_srli_epi32(v, shift); }
  static Ints add(Ints v, int32_t addend) { return _mm256_add_epi32(v, _mm256_set1_epi32(addend)); }
  static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  static Ints count_if_less(Ints counts, Floats a, Floats b) {
    return _mm256_sub_epi32(counts, _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)));  // true is -1
  }
  static Floats gather(const float* table, Ints index) { return _mm256_i32gather_ps(table, index, 4); }

  static Doubles zero_doubles() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static Doubles broadcast(double value) { return {_mm256_set1_pd(value), _mm256_set1_pd(value)}; }
  static Doubles widen(Floats v) {
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
  }
  static Doubles add(Doubles a, Doubles b) { return {_mm256_add_pd(a.low, b.low), _mm256_add_pd(a.high, b.high)}; }
  static Doubles sub(Doubles a, Doubles b) { return {_mm256_sub_pd(a.low, b.low), _mm256_sub_pd(a.high, b.high)}; }
  static Doubles mul(Doubles a, Doubles b) { return {_mm256_mul_pd(a.low, b.low), _mm256_mul_pd(a.high, b.high)}; }
  static Doubles first(Doubles v, int64_t count) {
    const __m256i limit = _mm256_set1_epi64x(count);
    const __m256i low = _mm256_cmpgt_epi64(limit, _mm256_setr_epi64x(0, 1, 2, 3));
    const __m256i high = _mm256_cmpgt_epi64(limit, _mm256_setr_epi64x(4, 5, 6, 7));
    return {_mm256_and_pd(v.low, _mm256_castsi256_pd(low)), _mm256_and_pd(v.high, _mm256_castsi256_pd(high))};
  }
  static double fold(Doubles v) {
    const __m256d four = _mm256_add_pd(v.low, v.high);
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

  template <int kBits>
  struct Table {
    static_assert(kBits == 2 || kBits == 4, "");
    Floats low, high;  // values 0..7 and 8..15; at 2 bits both are the four values twice, as VPERMPS reads three bits

    explicit Table(const float* source) {
      if constexpr (kBits == 2) {
        low = high = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(source));
      } else {
        low = load(source);
        high = load(source + 8);
      }
    }
    Table scaled(float scale, float offset) const {
      Table result = *this;
      result.low = Avx2::add(mul(low, broadcast(scale)), broadcast(offset));
      result.high = kBits == 2 ? result.low : Avx2::add(mul(high, broadcast(scale)), broadcast(offset));
      return result;
    }
    Floats operator[](Ints index) const {
      const Floats from_low = _mm256_permutevar8x32_ps(low, index);
      if constexpr (kBits == 2) return from_low;
      const Floats from_high = _mm256_permutevar8x32_ps(high, index);
      return _mm256_blendv_ps(from_low, from_high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
    }
  };

  template <int kBits>
  struct CountBelow;

 private:
  static __m128i load_words(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static void store_words(uint16_t* p, __m128i v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), v); }
  static __m128i narrow_to_words(Ints v) {
    return _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  }
};

template <>
struct Avx2::CountBelow<2> {
  Floats midpoints[3];

  explicit CountBelow(const float* source) {
    for (int i = 0; i < 3; ++i) midpoints[i] = broadcast(source[i]);
  }
  Ints operator()(Floats x) const {
    const Ints first = count_if_less(zero(), midpoints[0], x);
    return count_if_less(count_if_less(first, midpoints[1], x), midpoints[2], x);
  }
};

// Bisection; the midpoints of each level, at most eight, fill one register: the code found so far is the index.
template <>
struct Avx2::CountBelow<4> {
  Floats middle, level1, level2, level3;

  explicit CountBelow(const float* source) {
    float levels[3][8];
    for (int i = 0; i < 8; ++i) {
      levels[0][i] = source[3 + 8 * (i % 2)];
      levels[1][i] = source[1 + 4 * (i % 4)];
      levels[2][i] = source[2 * i];
    }
    middle = broadcast(source[7]);
    level1 = load(levels[0]);
    level2 = load(levels[1]);
    level3 = load(levels[2]);
  }
  Ints operator()(Floats x) const {
    return deeper(level3, deeper(level2, deeper(level1, count_if_less(zero(), middle, x), x), x), x);
  }

 private:
  static Ints deeper(Floats level, Ints code, Floats x) {
    return count_if_less(_mm256_add_epi32(code, code), _mm256_permutevar8x32_ps(level, code), x);
  }
};

template <>
struct Avx2::CountBelow<8> {
  const float* midpoints;

  explicit CountBelow(const float* source) : midpoints(source) {}
  Ints operator()(Floats x) const {
    Ints count = zero();
    for (int step = 128; step > 0; step /= 2) {
      const Ints below = _mm256_castps_si256(_mm256_cmp_ps(gather(midpoints + step - 1, count), x, _CMP_LT_OQ));
      count = _mm256_add_epi32(count, _mm256_and_si256(below, _mm256_set1_epi32(step)));
    }
    return count;
  }
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq

LOFTQ_TARGET_END
