// Operands of the products in bfloat16, two per lane: VDPBF16PS. The members are explained in operand_float.h; like
// that, this file is included inside a LOFTQ_TARGET region.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/generic/register_tile.h"
#include "cpu/generic/rows.h"
#include "cpu/simd_avx512.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
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

  // A code book times 1 / unit, rounded to bfloat16 twice: `near`, and `other`, in which an entry lies on the other
  // side of its value where that makes the mean of both come closer. Rounded once, the entries of NF4 have errors whose
  // sum over the codes of a weight is far from zero: with x >= 0, as after a ReLU, 6 to 8 times the error of a weight
  // that is rounded. The unit, of 64 between 1/2 and 1, makes both kinds of error small; taken turn about, the two
  // tables were better than rounded weights for normal, Laplace, Student's t and uniform ones, by every x tried.
  struct TwoRoundings {
    float codebook[16] = {};
    float unit = 1;
    Element near[16] = {}, other[16] = {};

    explicit TwoRoundings(const float* entries, int count) {
      std::memcpy(codebook, entries, count * sizeof(float));
      float best = std::numeric_limits<float>::infinity();
      for (int i = 0; i < 64 && best > 0; ++i) {
        TwoRoundings trial;
        const float error = trial.round(entries, count, 1 + i / 64.0f);
        if (!(error < best)) continue;
        best = error;
        unit = trial.unit;
        std::memcpy(near, trial.near, sizeof near);
        std::memcpy(other, trial.other, sizeof other);
      }
    }

   private:
    TwoRoundings() = default;

    // The root mean squares of the errors of the mean and, counting less, of the entries themselves.
    float round(const float* entries, int count, float factor) {
      float of_mean = 0, of_each = 0;
      unit = 1 / factor;
      for (int i = 0; i < count; ++i) {
        const float value = entries[i] * factor;
        near[i] = float_to_bfloat(value);
        const float first = bfloat_to_float(near[i]);
        other[i] = static_cast<Element>(near[i] + (first == value ? 0 : std::fabs(first) < std::fabs(value) ? 1 : -1));
        float second = bfloat_to_float(other[i]);
        if (std::fabs((first + second) / 2 - value) >= std::fabs(first - value)) {
          other[i] = near[i];
          second = first;
        }
        of_mean += std::pow(((first + second) / 2 - value) * unit, 2.0f);
        of_each += (std::pow((first - value) * unit, 2.0f) + std::pow((second - value) * unit, 2.0f)) / 2;
      }
      return std::sqrt(of_mean) + 0.3f * std::sqrt(of_each);
    }
  };

  // Has the members of TileSteps, but takes four tiles at a time: each 128-bit quarter of a vector takes codes of one
  // tile, so that codes only need shifts before they are looked up, and a quarter of a sum one scale. Products come in
  // the order of the codes' bits; x is brought into the same by arrange().
  template <int kBits, bool kInteger>
  class Steps {
   public:
    static constexpr int kTiles = 4;

    Steps(const float* codebook, int group_shift) {
      static thread_local TwoRoundings rounded(codebook, 1 << kBits);  // of the last code book; costs microseconds
      if (std::memcmp(rounded.codebook, codebook, sizeof(float) << kBits) != 0) {
        rounded = TwoRoundings(codebook, 1 << kBits);
      }
      unit_ = rounded.unit;
      alignas(64) Element entries[2][kWidth];
      for (int i = 0; i < kWidth; ++i) {  // at 2 bits pairs: VPERMD reads four bits, two codes
        const int code = kBits == 4 ? i % 16 : i % 2 == 0 ? i / 2 % 4 : i / 8;
        entries[0][i] = rounded.near[code];
        entries[1][i] = rounded.other[code];
      }
      near_ = load(entries[0]);
      other_ = load(entries[1]);
      alignas(64) int32_t groups[kLanes];
      for (int i = 0; i < kLanes; ++i) groups[i] = static_cast<int32_t>(int64_t{i / 4 * kTile} >> group_shift);
      groups_ = _mm512_load_si512(groups);
    }

    // out[position] = the element of x that the weight at this position of a step is multiplied with. tiles: kTiles of
    // them, `stride` elements apart.
    static void arrange(const Element* tiles, int64_t stride, Element* out) {
      static constexpr Columns columns;
      const Vector index = load(columns.values);
      for (int tile = 0; tile < kTiles; ++tile) {
        for (int half = 0; half < 2; ++half) {
          alignas(64) Element quarters[kWidth];
          store(quarters, _mm512_permutexvar_epi16(index, load(tiles + tile * stride + half * kWidth)));
          for (int i = 0; i < 4; ++i) {
            std::memcpy(out + (2 * i + half) * kWidth + tile * 8, quarters + i * 8, 8 * sizeof(Element));
          }
        }
      }
    }

    template <class Visit>
    LOFTQ_INLINE void visit(const uint8_t* bytes, int64_t tiles, const Visit& visit) const {
      __m512i low = _mm512_setzero_si512(), high = low;
      if (__builtin_expect(tiles >= kTiles, true)) {
        low = _mm512_loadu_si512(bytes);
        if constexpr (kBits == 4) high = _mm512_loadu_si512(bytes + 64);
      } else {  // the row, and perhaps the memory, ends within the step; each bit of the mask stands for 8 bytes
        const uint32_t mask = (1u << tiles * kBits) - 1;
        low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), bytes);
        if constexpr (kBits == 4) high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask >> 8), bytes + 64);
      }
      if constexpr (kBits == 4) {
        // The first sixteen bytes of each tile, and the others.
        const __m512i first = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), high);
        const __m512i second = _mm512_permutex2var_epi64(low, _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15), high);
        LOFTQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          const __m512i words = _mm512_srli_epi16(i < 4 ? first : second, i % 4 * 4);
          visit(i * kWidth, _mm512_permutexvar_epi16(words, entries(i)));
        }
      } else {
        LOFTQ_UNROLL
        for (int i = 0; i < 8; ++i) {
          visit(i * kWidth, _mm512_permutexvar_epi32(_mm512_srli_epi32(low, i * 4), entries(i)));
        }
      }
    }

    Floats scales(const float* groups) const {
      return _mm512_permutexvar_ps(groups_, _mm512_castps128_ps512(_mm_loadu_ps(groups)));
    }

    // The factor that all sums are multiplied with in the end.
    float unit() const { return unit_; }

   private:
    // Each half of the look-ups takes one table, in the order of the Thue-Morse sequence, which matches no period of x.
    __m512i entries(int lookup) const { return 0b01101001 >> lookup & 1 ? near_ : other_; }

    // Of 32 columns, the eight that enter each of look-ups 0, 2, 4 and 6, or of the next 32 into 1, 3, 5 and 7.
    struct alignas(64) Columns {
      Element values[kWidth];

      constexpr Columns() : values() {
        for (int i = 0; i < kWidth; ++i) {
          const int quarter = i / 8, word = i % 8;
          values[i] = static_cast<Element>(kBits == 4 ? quarter / 2 * 16 + quarter % 2 + word * 2
                                                      : word % 2 * 16 + word / 2 * 4 + quarter);
        }
      }
    };

    __m512i near_, other_;  // the code book in bfloat16, twice, or all pairs of it: see TwoRoundings
    __m512i groups_;        // of the lanes, from the step's first on
    float unit_;
  };

  template <bool kInteger>
  class Steps<8, kInteger> : public TileSteps<BfloatOperand, 8, kInteger> {
   public:
    using TileSteps<BfloatOperand, 8, kInteger>::TileSteps;
  };

 private:
  static Floats floats(DType type, const void* src) {
    if (type == DType::kFloat32) return Avx512::load(static_cast<const float*>(src));
    return Avx512::load_half(static_cast<const uint16_t*>(src));
  }
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
