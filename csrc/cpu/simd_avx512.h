// The operations of simd_scalar.h in AVX-512 (F, BW, DQ, VL), sixteen lanes at a time.
#pragma once

#include <immintrin.h>

#include "cpu/target.h"
#include "loftq/half.h"

LOFTQ_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using Floats = __m512;
  using Ints = __m512i;
  struct Doubles {
    __m512d low, high;
  };

  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Floats load_half(const uint16_t* p) { return _mm512_cvtph_ps(load_words(p)); }
  static Floats load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p)), 16));
  }
  static void load_half_rest(const uint16_t* p, int64_t count, float* out) {
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    _mm512_mask_storeu_ps(out, mask, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)));
  }
  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store_half(uint16_t* p, Floats v) { store_words(p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_bfloat(uint16_t* p, Floats v) {
    const Ints bits = _mm512_castps_si512(v);
    const Ints odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const Ints rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const Ints words = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), is_nan, _mm512_set1_epi32(0x7fc0));
    store_words(p, _mm512_cvtepi32_epi16(words));
  }
  static uint16_t to_half(float value) {
    return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(value), _MM_FROUND_TO_NEAREST_INT)));
  }
  static float from_half(uint16_t half) { return _cvtsh_ss(half); }

  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
    Floats rows[16], pairs[16];
    for (int i = 0; i < 16; ++i) rows[i] = load(src + i * src_stride);
    for (int i = 0; i < 16; i += 2) {  // 2 x 2 blocks of values
      pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // 4 x 4: each 128-bit part of rows[i + j] is part of one column
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(pairs[i + j]), high = _mm512_castps_pd(pairs[i + j + 2]);
        rows[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        rows[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {  // 4 x 4 blocks of 128-bit parts
      const Floats even0 = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0x88);
      const Floats odd0 = _mm512_shuffle_f32x4(rows[j], rows[4 + j], 0xdd);
      const Floats even1 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0x88);
      const Floats odd1 = _mm512_shuffle_f32x4(rows[8 + j], rows[12 + j], 0xdd);
      store(dst + j * dst_stride, _mm512_shuffle_f32x4(even0, even1, 0x88));
      store(dst + (4 + j) * dst_stride, _mm512_shuffle_f32x4(odd0, odd1, 0x88));
      store(dst + (8 + j) * dst_stride, _mm512_shuffle_f32x4(even0, even1, 0xdd));
      store(dst + (12 + j) * dst_stride, _mm512_shuffle_f32x4(odd0, odd1, 0xdd));
    }
  }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static float lowest(Floats v) { return _mm512_reduce_min_ps(v); }
  static float highest(Floats v) { return _mm512_reduce_max_ps(v); }

  static Ints zero() { return _mm512_setzero_si512(); }
  static Ints bits(Floats v) { return _mm512_castps_si512(v); }
  static Ints magnitude_bits(Floats v) { return _mm512_and_si512(bits(v), _mm512_set1_epi32(0x7fffffff)); }
  static Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static int32_t highest(Ints v) { return _mm512_reduce_max_epi32(v); }
  static Ints load_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store_bytes(uint8_t* p, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static Ints or_shifted_left(Ints a, Ints b, int shift) { return _mm512_or_si512(a, _mm512_slli_epi32(b, shift)); }
  static Ints shift_right(Ints v, int shift) { return _mm512_srli_epi32(v, shift); }
  static Ints add(Ints v, int32_t addend) { return _mm512_add_epi32(v, _mm512_set1_epi32(addend)); }
  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static Ints count_if_less(Ints counts, Floats a, Floats b) { return add_if_less(counts, a, b, 1); }
  static Floats gather(const float* table, Ints index) { return _mm512_i32gather_ps(index, table, 4); }

  static Doubles zero_doubles() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static Doubles broadcast(double value) { return {_mm512_set1_pd(value), _mm512_set1_pd(value)}; }
  static Doubles widen(Floats v) {
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
  }
  static Doubles add(Doubles a, Doubles b) { return {_mm512_add_pd(a.low, b.low), _mm512_add_pd(a.high, b.high)}; }
  static Doubles sub(Doubles a, Doubles b) { return {_mm512_sub_pd(a.low, b.low), _mm512_sub_pd(a.high, b.high)}; }
  static Doubles mul(Doubles a, Doubles b) { return {_mm512_mul_pd(a.low, b.low), _mm512_mul_pd(a.high, b.high)}; }
  static Doubles first(Doubles v, int64_t count) {
    const unsigned lanes = count >= kLanes ? 0xffffu : (1u << count) - 1;
    return {_mm512_maskz_mov_pd(static_cast<__mmask8>(lanes), v.low),
            _mm512_maskz_mov_pd(static_cast<__mmask8>(lanes >> 8), v.high)};
  }
  static double fold(Doubles v) {
    const __m512d eight = _mm512_add_pd(v.low, v.high);
    const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(eight), _mm512_extractf64x4_pd(eight, 1));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

  template <int kBits>
  struct Table {
    static_assert(kBits == 2 || kBits == 4, "");
    Floats values;  // at 2 bits the four values four times, as VPERMPS reads four bits

    explicit Table(const float* source) {
      values = kBits == 2 ? _mm512_broadcast_f32x4(_mm_loadu_ps(source)) : load(source);
    }
    Table scaled(float scale, float offset) const {
      Table result = *this;
      result.values = Avx512::add(mul(values, broadcast(scale)), broadcast(offset));
      return result;
    }
    Floats operator[](Ints index) const { return _mm512_permutexvar_ps(index, values); }
  };

  template <int kBits>
  struct CountBelow;

 private:
  static __m256i load_words(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store_words(uint16_t* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static Ints add_if_less(Ints v, Floats a, Floats b, int32_t addend) {
    return _mm512_mask_add_epi32(v, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), v, _mm512_set1_epi32(addend));
  }
};

template <>
struct Avx512::CountBelow<2> {
  Floats midpoints[3];

  explicit CountBelow(const float* source) {
    for (int i = 0; i < 3; ++i) midpoints[i] = broadcast(source[i]);
  }
  Ints operator()(Floats x) const {
    const Ints first = count_if_less(zero(), midpoints[0], x);
    return count_if_less(count_if_less(first, midpoints[1], x), midpoints[2], x);
  }
};

// Bisection. The count found so far is itself the index into the midpoints, shifted so that the next one to compare
// with stands at that index.
template <>
struct Avx512::CountBelow<4> {
  Floats middle, next4, next2, next1;

  explicit CountBelow(const float* source) {
    middle = broadcast(source[7]);
    next4 = shifted(source, 3);
    next2 = shifted(source, 1);
    next1 = shifted(source, 0);
  }
  Ints operator()(Floats x) const {
    Ints count = add_if_less(zero(), middle, x, 8);
    count = add_if_less(count, _mm512_permutexvar_ps(count, next4), x, 4);
    count = add_if_less(count, _mm512_permutexvar_ps(count, next2), x, 2);
    return add_if_less(count, _mm512_permutexvar_ps(count, next1), x, 1);
  }

 private:
  static Floats shifted(const float* source, int by) {  // only 15 - by are there, and only they are ever compared with
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(0x7fffu >> by), source + by);
  }
};

template <>
struct Avx512::CountBelow<8> {
  const float* midpoints;

  explicit CountBelow(const float* source) : midpoints(source) {}
  Ints operator()(Floats x) const {
    Ints count = zero();
    for (int step = 128; step > 0; step /= 2) {
      count = add_if_less(count, gather(midpoints + step - 1, count), x, step);
    }
    return count;
  }
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq

LOFTQ_TARGET_END
