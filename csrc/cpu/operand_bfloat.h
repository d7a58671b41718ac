// Operands of the products in bfloat16, two to a lane: VDPBF16PS. The members are explained in operand_float.h; like
// that, this file is included inside a LOFTQ_TARGET region.
#pragma once

#include "cpu/generic/register_tile.h"
#include "cpu/generic/rows.h"
#include "cpu/simd_avx512.h"

namespace loftq {
namespace {

struct BfloatOperand {
  using Simd = Avx512;
  using Element = uint16_t;
  using Vector = __m512i;
  using Floats = __m512;

  static constexpr int kLanes = 16;
  static constexpr int kStep = 2;
  static constexpr int kWidth = kLanes * kStep;

  static constexpr bool kFewRows = true;

  static constexpr int kVectors = 4;
  static constexpr int rows(int vectors) { return 24 / vectors; }
  static constexpr int kPanelRows = 24;

  static constexpr int kSumSteps = kPanelColumns<BfloatOperand> / kStep;  // float32 sums of rounded operands: no need

  static constexpr int kDepth = kStep;

  static constexpr DType kType = DType::kBFloat16;

  struct Session {};

  static void multiply(int rows, int vectors, const Element* a, const Element* b, int64_t b_stride, int64_t steps,
                       float* c, int64_t c_stride, bool accumulate) {
    multiply_tile<BfloatOperand>(rows, vectors, a, b, b_stride, steps, c, c_stride, accumulate);
  }

  static Vector load(const Element* p) { return _mm512_loadu_si512(p); }
  static void store(Element* p, Vector v) { _mm512_storeu_si512(p, v); }
  static Vector broadcast(const Element* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Floats dot(Vector a, Vector b, Floats sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Vector narrow(Floats low, Floats high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

  static void store_result(DType, Floats v, void* out) {  // y is bfloat16, as x
    _mm256_storeu_si256(static_cast<__m256i*>(out), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
  static void convert(DType type, const void* src, int64_t count, Element* out) {
    if (type == DType::kBFloat16) {
      if (count > 0) std::memcpy(out, src, count * sizeof(Element));
      return;
    }
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) {
      store(out + i, narrow(floats(type, advance(src, type, i)), floats(type, advance(src, type, i + kLanes))));
    }
    alignas(64) float rest[kWidth];
    to_float<Avx512>(type, advance(src, type, i), count - i, rest);
    for (int64_t j = 0; i + j < count; ++j) out[i + j] = float_to_bfloat(rest[j]);
  }

  static void interleave(const Element* rows, int64_t stride, Element* out) {
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows)));
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + stride)));
    store(out, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
  }

  // Up to 4 bits: VPERMW reads five bits of each word, so that neither the table (the code book, repeated to 32
  // entries) needs a mask for its index, nor the fields of a byte more than a shift.
  template <int kBits, bool kInteger>
  class Weights {
   public:
    using Group = __m512i;  // the 32 entries, scaled, in bfloat16

    explicit Weights(const float* codebook)
        : codebook_(kBits == 2 ? _mm512_broadcast_f32x4(_mm_loadu_ps(codebook)) : _mm512_loadu_ps(codebook)) {}

    Group group(float scale, float offset) const {
      const Floats scaled = _mm512_mul_ps(codebook_, _mm512_set1_ps(scale));
      const Floats values = _mm512_add_ps(scaled, _mm512_set1_ps(offset));
      return narrow(values, values);
    }

    template <class Visit>
    static LOFTQ_INLINE void visit_tile(Group first, Group second, const uint8_t* bytes, const Visit& visit) {
      if constexpr (kBits == 4) {
        const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
        visit(0, _mm512_permutexvar_epi16(words, first));
        visit(32, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), second));
      } else {
        // The sixteen bytes twice, as words: the lower half of a vector takes the even fields, the upper the odd ones.
        const __m128i source = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
        const __m512i words = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(source), bytes_to_words());
        visit(0, _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, halves(0, 2)), first));
        visit(32, _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, halves(4, 6)), second));
      }
    }

   private:
    static __m512i bytes_to_words() {
      const __m128i low = _mm_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1);
      const __m128i high = _mm_setr_epi8(8, -1, 9, -1, 10, -1, 11, -1, 12, -1, 13, -1, 14, -1, 15, -1);
      return _mm512_broadcast_i64x4(_mm256_set_m128i(high, low));
    }
    static __m512i halves(int16_t low, int16_t high) {
      return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
    }

    Floats codebook_;
  };

  template <bool kInteger>
  class Weights<8, kInteger> {
   public:
    using Group = Decoder<Avx512, 8, kInteger>;

    explicit Weights(const float* codebook) : codebook_(codebook) {}

    Group group(float scale, float offset) const { return Group(codebook_, scale, offset); }

    template <class Visit>
    static LOFTQ_INLINE void visit_tile(const Group& first, const Group& second, const uint8_t* bytes,
                                        const Visit& visit) {
      visit(0, narrow(first(Avx512::load_bytes(bytes)), first(Avx512::load_bytes(bytes + 16))));
      visit(32, narrow(second(Avx512::load_bytes(bytes + 32)), second(Avx512::load_bytes(bytes + 48))));
    }

   private:
    Group codebook_;
  };

 private:
  static Floats floats(DType type, const void* src) {
    if (type == DType::kFloat32) return Avx512::load(static_cast<const float*>(src));
    return Avx512::load_half(static_cast<const uint16_t*>(src));
  }
};

}  // namespace
}  // namespace loftq
