// Operands of the products in float32, for any instruction set. S is the class of one of the simd_*.h files.
//
// An operand type says what the elements are that products multiply (Element), how many consecutive ones enter one
// lane of an accumulator at a time (kStep), and how packed weights become such elements. operand_bfloat.h has the same
// members; those whose meaning is not in the name are explained here.
#pragma once

#include "cpu/generic/register_tile.h"
#include "cpu/generic/rows.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

template <class S>
struct FloatOperand {
  using Simd = S;
  using Element = float;
  using Vector = typename S::Floats;  // kWidth elements
  using Floats = typename S::Floats;  // kLanes float32 accumulators

  static constexpr int kLanes = S::kLanes;
  static constexpr int kStep = 1;
  static constexpr int kWidth = kLanes * kStep;

  static constexpr bool kFewRows = true;  // whether it serves linear_small.h

  // Shape of the register tile: rows(v) x v accumulators fit in the registers, v up to kVectors.
  static constexpr int kVectors = kLanes == 8 ? 2 : 4;
  static constexpr int rows(int vectors) { return kLanes == 1 ? 4 : (kLanes == 8 ? 12 : 24) / vectors; }
  static constexpr int kPanelRows =
      24;  // a multiple of every rows(v); few, so that a left panel stays in the first-level cache

  // Products are summed over so many steps at a time, and then those sums are summed: the rounding errors of one sum
  // over a whole panel were 2.8 times those of the BLAS that users compare with.
  static constexpr int kSumSteps = 64;

  static constexpr int kDepth = kStep;  // elements that enter a register tile at a time

  static constexpr DType kType = DType::kFloat32;

  struct Session {};  // what a thread holds while it multiplies tiles

  // Does what multiply_tile of register_tile.h does.
  static void multiply(int rows, int vectors, const Element* a, const Element* b, int64_t b_stride, int64_t steps,
                       float* c, int64_t c_stride, bool accumulate) {
    multiply_tile<FloatOperand>(rows, vectors, a, b, b_stride, steps, c, c_stride, accumulate);
  }

  static Vector load(const Element* p) { return S::load(p); }
  static void store(Element* p, Vector v) { S::store(p, v); }
  static Vector broadcast(const Element* p) { return S::broadcast(*p); }  // kStep elements, kLanes times
  static Floats dot(Vector a, Vector b, Floats sum) { return S::fma(a, b, sum); }
  // kLanes results, rounded to the type of y.
  static void store_result(DType type, Floats v, void* out) {
    if (type == DType::kFloat32) return S::store(static_cast<float*>(out), v);
    if (type == DType::kFloat16) return S::store_half(static_cast<uint16_t*>(out), v);
    S::store_bfloat(static_cast<uint16_t*>(out), v);
  }
  static void convert(DType type, const void* src, int64_t count, Element* out) { to_float<S>(type, src, count, out); }

  // kStep rows of kLanes elements, `stride` apart, to kLanes groups of kStep: the elements that share a column.
  static void interleave(const Element* rows, int64_t, Element* out) { store(out, load(rows)); }

  // Weights to elements: a `Group` decodes the codes of one group.
  template <int kBits, bool kInteger>
  class Weights {
   public:
    using Group = Decoder<S, kBits, kInteger>;

    explicit Weights(const float* codebook) : codebook_(codebook) {}

    Group group(float scale, float offset) const { return Group(codebook_, scale, offset); }

    // visit(column, vector) for all kWidth-wide slices of a tile; first and second decode columns 0..31 and 32..63.
    template <class Visit>
    static LOFTQ_INLINE void visit_tile(const Group& first, const Group& second, const uint8_t* bytes,
                                        const Visit& visit) {
      decode_fields<S, kBits>(first, second, bytes, visit);
    }

   private:
    Group codebook_;
  };

  template <int kBits, bool kInteger>
  using Steps = TileSteps<FloatOperand, kBits, kInteger>;
};

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
