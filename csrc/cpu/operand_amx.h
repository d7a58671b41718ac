// Operands of the products in bfloat16, multiplied by AMX. TDPBF16PS multiplies a tile of 16 rows of 32 elements, which
// is what a left panel holds, with one of 16 steps of a block of a right panel, and adds to a tile of 16 x 16 sums.
// Like operand_bfloat.h, this file is included inside a LOFTQ_TARGET region.
#pragma once

#include "cpu/operand_bfloat.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

// The eight tile registers, all of 16 rows of 64 bytes. In assembly: the intrinsics of GCC take no register number but
// a literal one, do not tell the compiler that they read memory (it may move the stores that fill a panel past them),
// and came only with GCC 11.
struct Tiles {
  static constexpr int kRows = 16;
  static constexpr int kRowBytes = 64;

  static void configure() {
    static constexpr Configuration configuration;
    __asm__ volatile("ldtilecfg %0" : : "m"(configuration));
  }
  static void release() { __asm__ volatile("tilerelease"); }

  template <int kTile>
  static LOFTQ_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // stride: bytes from one row to the next
  template <int kTile>
  static LOFTQ_INLINE void load(const void* rows, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static LOFTQ_INLINE void store(void* rows, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
  }
  // tile kC += tile kA x tile kB
  template <int kC, int kA, int kB>
  static LOFTQ_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
  }

 private:
  struct alignas(64) Configuration {  // as LDTILECFG reads it
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes, kRowBytes};
    uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
  };
};

struct AmxOperand : BfloatOperand {
  static constexpr bool kFewRows = false;  // BfloatOperand serves few rows: a tile would be mostly empty

  // Two tiles of rows by two of columns: each operand that is loaded enters two products, and four sums that do not
  // wait for each other hide the 52 cycles that a product takes (one can start every 16).
  static constexpr int kVectors = 2;
  static constexpr int rows(int) { return 2 * Tiles::kRows; }
  static constexpr int kPanelRows = 2 * Tiles::kRows;
  static constexpr int kDepth = Tiles::kRows * kStep;  // elements per row of a tile

  struct Session {
    Session() { Tiles::configure(); }
    ~Session() { Tiles::release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // steps: a multiple of kDepth / kStep.
  static void multiply(int rows, int vectors, const Element* a, const Element* b, int64_t b_stride, int64_t steps,
                       float* c, int64_t c_stride, bool accumulate) {
    if (rows > Tiles::kRows) {
      (vectors == 2 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)(a, b, b_stride, steps, c, c_stride, accumulate);
    } else {
      (vectors == 2 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>)(a, b, b_stride, steps, c, c_stride, accumulate);
    }
  }

 private:
  static constexpr int kSteps = Tiles::kRows;  // steps per tile
  static constexpr int64_t kLeftBytes = (kPanelColumns<BfloatOperand> + kWidth) * sizeof(Element);
  static_assert(kWidth * sizeof(Element) == Tiles::kRowBytes && kLanes * sizeof(float) == Tiles::kRowBytes, "");
  static_assert(kTile / kStep % kSteps == 0, "a tile of weights is whole tiles of operands");

  // Sums in tiles 0 to 3, left operands in 4 and 5, right ones in 6 and 7.
  template <int kRowTiles, int kColumnTiles>
  static void multiply_tiles(const Element* a, const Element* b, int64_t b_stride, int64_t steps, float* c,
                             int64_t c_stride, bool accumulate) {
    Tiles::zero<0>();
    if constexpr (kColumnTiles == 2) Tiles::zero<1>();
    if constexpr (kRowTiles == 2) Tiles::zero<2>();
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) Tiles::zero<3>();
    for (int64_t step = 0; step < steps; step += kSteps, a += kSteps * kStep, b += kSteps * kWidth) {
      Tiles::load<6>(b, Tiles::kRowBytes);
      Tiles::load<4>(a, kLeftBytes);
      Tiles::multiply<0, 4, 6>();
      if constexpr (kColumnTiles == 2) {
        Tiles::load<7>(b + b_stride, Tiles::kRowBytes);
        Tiles::multiply<1, 4, 7>();
      }
      if constexpr (kRowTiles == 2) {
        Tiles::load<5>(a + Tiles::kRows * kLeftBytes / sizeof(Element), kLeftBytes);
        Tiles::multiply<2, 5, 6>();
      }
      if constexpr (kRowTiles == 2 && kColumnTiles == 2) Tiles::multiply<3, 5, 7>();
    }
    float* const lower = c + Tiles::kRows * c_stride;
    write<0>(c, c_stride, accumulate);
    if constexpr (kColumnTiles == 2) write<1>(c + kLanes, c_stride, accumulate);
    if constexpr (kRowTiles == 2) write<2>(lower, c_stride, accumulate);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) write<3>(lower + kLanes, c_stride, accumulate);
  }

  // Stores a tile of sums to c, or adds it to c. c is not loaded into the tile beforehand, because sums of sums (see
  // register_tile.h) round less.
  template <int kTile>
  static void write(float* c, int64_t c_stride, bool accumulate) {
    if (!accumulate) return Tiles::store<kTile>(c, c_stride * sizeof(float));
    alignas(64) float sums[Tiles::kRows][kLanes];
    Tiles::store<kTile>(sums, sizeof sums[0]);
    for (int r = 0; r < Tiles::kRows; ++r, c += c_stride) {
      Simd::store(c, Simd::add(Simd::load(c), Simd::load(sums[r])));
    }
  }
};

static_assert(kPanelStride<AmxOperand> == kPanelStride<BfloatOperand>, "");

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
