// y = x D^T for a few rows x: one pass over the packed weight, decoded in registers.
#pragma once

#include <algorithm>

#include "cpu/generic/panels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int kMostSmallRows = 8;  // rows of x: the accumulators of one more would not fit in the registers

template <class O, int kBits, bool kInteger, int kM>
class SmallLinear {
  using S = typename O::Simd;
  using Element = typename O::Element;
  using Floats = typename O::Floats;
  using Weights = typename O::template Weights<kBits, kInteger>;
  using Steps = typename O::template Steps<kBits, kInteger>;

  // Scaling the sums of a step costs kM operations, scaling the table of a group three and, with 2 bits, another table.
  static constexpr bool kMayScaleSums = kBits < 8 && (Steps::kTiles > 1 || kM <= 2);
  template <bool kScaleSums>
  static constexpr bool kWide = kScaleSums && Steps::kTiles > 1;
  // Rows of the weight that share the part of x in the first-level cache: as many as leave registers for their sums.
  static constexpr int kRowsOfTiles = O::kLanes < 16 || kM == 1 ? 1 : kM <= 5 ? 4 : kM == 6 ? 3 : 2;
  // With few rows of x it is one, because processors prefetch a single stream of codes best. With more, the sums of
  // four rows are worth keeping in memory: they change once per step.
  static constexpr int kRowsOfSteps = kM <= 2 ? 1 : 4;
  template <bool kScaleSums>
  static constexpr int kRows = kWide<kScaleSums> ? kRowsOfSteps : kRowsOfTiles;
  // The codes of the next rows are prefetched, so that no core waits for memory as it decodes. From eight rows on,
  // where decoding them takes less time than fetching them, they go into the second-level cache, which has room for
  // them.
  static constexpr bool kFetchFar = kWide<true> && kM <= 4;
  static constexpr int64_t kBlockRows = 16;
  static constexpr int64_t kStepColumns = Steps::kTiles * kTile;
  // A sum over all of a wide row would lose more to rounding than a library's matrix product does. So after this many
  // tiles a lane's sum, of about 128 products, is put aside. Wide steps sum sixteen products, and then the scaled sums
  // of those.
  static constexpr int64_t kSumTiles = S::kLanes == 1 ? 1 : 2 * S::kLanes;
  static constexpr int64_t kSumTilesOfSteps = 32 * Steps::kTiles;
  static constexpr int64_t kFirstLevelCache = 32 << 10;

 public:
  explicit SmallLinear(const LinearParams& p)
      : p_(p),
        weight_(p.weight),
        decoder_(p.weight.codebook),
        scale_sums_(kMayScaleSums && p.weight.group_size != 32),
        shift_(group_shift(weight_.group_size)),
        steps_(p.weight.codebook, shift_),
        tiles_(padded_k(weight_.k) / kTile),
        row_groups_(num_groups(weight_.k, weight_.group_size)),
        groups_(ceil_div(row_groups_ + 1, 16) * 16),
        rank_(ceil_div(p.lora_A.data ? p.lora_A.rows : 0, 16) * 16) {}

  Status run(int threads) {
    const int64_t k = ceil_div(weight_.k, kStepColumns) * kStepColumns;
    // The rows of the weight are divided among threads; where there are too few rows, the columns are divided as well.
    row_parts_ =
        std::max(parts_for(threads, weight_.n / kBlockRows), std::min<int64_t>(threads, ceil_div(weight_.n, 4)));
    column_parts_ = std::max<int64_t>(1, std::min<int64_t>(threads / row_parts_, tiles_ / 16));
    const Scratch<Element> x(kM * k), steps(Steps::kTiles > 1 && scale_sums_ ? kM * k : 1);
    const Scratch<float> group_sums(kM * groups_), hidden(kM * rank_ + 1);
    const Scratch<float> partial(column_parts_ > 1 ? column_parts_ * kM * weight_.n : 1);
    const int64_t of_thread = 2 * groups_ * kBlockRows + rank_ + kM * kBlockRows;
    const Scratch<float> scratch(threads * of_thread);
    if (!x.data() || !steps.data() || !group_sums.data() || !hidden.data() || !partial.data() || !scratch.data()) {
      return kOutOfMemory;
    }
    x_ = x.data();
    x_steps_ = Steps::kTiles > 1 && scale_sums_ ? steps.data() : x.data();
    group_sums_ = group_sums.data();
    hidden_ = hidden.data();
    convert_x();
    std::fill(hidden_, hidden_ + kM * rank_, 0.0f);
    partial_ = partial.data();
    threads_ = threads;
    parallel_phases(
        threads, kPhases, [&](int64_t phase) { return parts_of_phase(phase); },
        [&](int64_t phase, int64_t part, int slot) { run_part(phase, part, scratch.data() + slot * of_thread); });
    return nullptr;
  }

 private:
  static constexpr int64_t kPhases = 3;  // x A^T, the products, and their sums where columns are divided

  int64_t parts_of_phase(int64_t phase) const {
    if (phase == 0) return rank_ > 0 ? std::min<int64_t>(threads_, p_.lora_A.rows) : 0;
    if (phase == 1) return row_parts_ * column_parts_;
    return column_parts_ > 1 ? parts_for(threads_, ceil_div(weight_.n, 16)) : 0;
  }

  void run_part(int64_t phase, int64_t part, float* scratch) const {
    if (phase == 0) {
      const Range rank = part_of(p_.lora_A.rows, 1, part, parts_of_phase(phase));
      for (int64_t r = rank.begin; r < rank.end; ++r) hidden_row(r);
    } else if (phase == 1) {
      const int64_t column_part = part % column_parts_;
      const Range rows = part_of(weight_.n, 4, part / column_parts_, row_parts_);
      const Range tiles = part_of(tiles_, Steps::kTiles, column_part, column_parts_);
      float* const sums = column_parts_ > 1 ? partial_ + column_part * kM * weight_.n : nullptr;
      rows_of(rows, tiles, column_part == 0, scratch, sums);
    } else {
      add_parts(part_of(weight_.n, 16, part, parts_of_phase(phase)), scratch);
    }
  }

  void convert_x() {
    const DenseRows<O> rows(p_.x);
    for (int64_t t = 0; t < tiles_; t += Steps::kTiles) {
      for (int i = 0; i < Steps::kTiles; ++i) rows.fill(0, kM, t + i, 1, x_ + (t + i) * kM * kTile, kTile);
      if constexpr (Steps::kTiles > 1) {
        if (!scale_sums_) continue;
        Element* const step = x_steps_ + t * kM * kTile;
        for (int m = 0; m < kM; ++m) Steps::arrange(x_at(m, t), kM * kTile, step + m * kStepColumns);
      }
    }
    std::fill(group_sums_, group_sums_ + kM * groups_, 0.0f);
    if (!scale_sums_ || !weight_.offset) return;
    alignas(64) float values[kTile];
    for (int m = 0; m < kM; ++m) {
      for (int64_t t = 0; t < tiles_; ++t) {
        to_float<S>(O::kType, x_at(m, t), kTile, values);
        Floats sum = S::broadcast(0.0f);
        for (int64_t i = 0; i < kTile; i += S::kLanes) sum = S::add(sum, S::load(values + i));
        group_sums_[m * groups_ + group_of(t)] += S::sum(sum);
      }
    }
  }

  LOFTQ_INLINE const Element* x_at(int m, int64_t tile) const { return x_ + (tile * kM + m) * kTile; }

  // Returns p in a way that the compiler cannot see through. It must not keep what it loads from p for one row of the
  // weight in registers for the next row, because it would spill the sums instead.
  static LOFTQ_INLINE const Element* reloaded(const Element* p) {
    __asm__ volatile("" : "+r"(p));
    return p;
  }

  // The group of a tile, for groups of 64 columns and more.
  int64_t group_of(int64_t tile) const { return tile * kTile >> shift_; }

  // hidden[m][r] = scaling * sum_k x[m, k] A[r, k]
  void hidden_row(int64_t r) const {
    const DenseRows<O> rows(p_.lora_A);
    Floats sums[kM], aside[kM];
    for (Floats& sum : sums) sum = S::broadcast(0.0f);
    for (Floats& sum : aside) sum = S::broadcast(0.0f);
    alignas(64) Element values[kTile];
    for (int64_t t = 0; t < tiles_; ++t) {
      rows.fill(r, 1, t, 1, values, kTile);
      for (int64_t i = 0; i < kTile; i += O::kWidth) {
        const auto a = O::load(values + i);
        LOFTQ_UNROLL
        for (int m = 0; m < kM; ++m) sums[m] = O::dot(a, O::load(x_at(m, t) + i), sums[m]);
      }
      if ((t + 1) % kSumTiles != 0) continue;
      for (int m = 0; m < kM; ++m) {
        aside[m] = S::add(aside[m], sums[m]);
        sums[m] = S::broadcast(0.0f);
      }
    }
    for (int m = 0; m < kM; ++m) hidden_[m * rank_ + r] = p_.scaling * S::sum(S::add(aside[m], sums[m]));
  }

  // Rows of y, or with `partial` [kM][n] this part's sums of them. The first part adds what is not split.
  void rows_of(Range rows, Range tiles, bool first_part, float* scratch, float* partial) const {
    float* const results = scratch + 2 * groups_ * kBlockRows + rank_;
    for (int64_t row = 0; row < kBlockRows; ++row) clear_groups(scratch + 2 * row * groups_);
    for (int64_t n = rows.begin; n < rows.end; n += kBlockRows) {
      const int64_t count = std::min(kBlockRows, rows.end - n);
      block(n, count, tiles, first_part, scratch, results);
      for (int m = 0; m < kM; ++m) {
        float* const values = results + m * kBlockRows;
        if (partial) {
          std::copy(values, values + count, partial + m * weight_.n + n);
        } else {
          write(m, n, count, values);
        }
      }
    }
  }

  // results[m][row] for rows [n, n + count)
  void block(int64_t n, int64_t count, Range tiles, bool first_part, float* scratch, float* results) const {
    Floats sums[kBlockRows][kM];
    for (int64_t row = 0; row < count; ++row) load_groups(n + row, scratch + 2 * row * groups_);
    if (scale_sums_) {
      if constexpr (kMayScaleSums) dot_block<true>(n, count, tiles, scratch, sums);
      if constexpr (kWide<true>) {
        const Floats unit = S::broadcast(steps_.unit());
        for (int64_t row = 0; row < count; ++row) {
          for (int m = 0; m < kM; ++m) sums[row][m] = S::mul(sums[row][m], unit);
        }
      }
    } else {
      dot_block<false>(n, count, tiles, scratch, sums);
    }
    for (int64_t row = 0; row < count; ++row) {
      float* const groups = scratch + 2 * row * groups_;
      if (first_part) add_offsets_and_adapter(n + row, groups, scratch + 2 * groups_ * kBlockRows, sums[row]);
      for (int m = 0; m < kM; ++m) results[m * kBlockRows + row] = S::sum(sums[row][m]);
    }
  }

  void add_parts(Range rows, float* values) const {
    for (int m = 0; m < kM; ++m) {
      for (int64_t n = rows.begin; n < rows.end; n += 16) {
        const int64_t count = std::min<int64_t>(16, rows.end - n);
        for (int64_t i = 0; i < count; ++i) {
          values[i] = 0;
          for (int64_t part = 0; part < column_parts_; ++part)
            values[i] += partial_[(part * kM + m) * weight_.n + n + i];
        }
        write(m, n, count, values);
      }
    }
  }

  // y[m, n .. n + count) = values + bias
  void write(int m, int64_t n, int64_t count, float* values) const {
    if (p_.bias) {
      for (int64_t i = 0; i < count; ++i) values[i] += load_one<S>(p_.bias_dtype, p_.bias, n + i);
    }
    from_float<S>(p_.x.dtype, values, count, advance(p_.y, p_.x.dtype, m * weight_.n + n));
  }

  // sums[row][m] = x[m] . D[n + row] for `count` rows over these tiles, spread over the lanes
  template <bool kScaleSums>
  void dot_block(int64_t n, int64_t count, Range tiles, const float* groups, Floats (*sums)[kM]) const {
    constexpr int kR = kRows<kScaleSums>;
    const int64_t most = in_turn<kScaleSums>(tiles.end - tiles.begin);
    Range part = {tiles.begin, tiles.begin};
    do {
      const bool accumulate = part.end > tiles.begin;
      part = {part.end, std::min(part.end + most, tiles.end)};
      int64_t row = 0;
      for (; row + kR <= count; row += kR) {
        dot_rows<kR, kScaleSums>(n + row, part, groups + 2 * row * groups_, sums + row, accumulate);
      }
      for (; row < count; ++row) {
        dot_rows<1, kScaleSums>(n + row, part, groups + 2 * row * groups_, sums + row, accumulate);
      }
    } while (part.end < tiles.end);
  }

  // Tiles of a row after which the next row of the block follows: so few that x stays in the first-level cache, beside
  // codes; all of them where x does anyway, or where four rows in wide steps make the most of what is fetched of it.
  template <bool kScaleSums>
  static int64_t in_turn(int64_t tiles) {
    constexpr int64_t kTileBytes = kM * kTile * sizeof(Element);
    if (kWide<kScaleSums>) return kRowsOfSteps == 1 ? kFirstLevelCache / 2 / kTileBytes : tiles;
    return tiles * kTileBytes <= kFirstLevelCache ? tiles : kSumTiles;
  }

  // sums[r][m] (+)= x[m] . D[n + r] over these tiles
  template <int kR, bool kScaleSums>
  void dot_rows(int64_t n, Range tiles, const float* groups, Floats (*sums)[kM], bool accumulate) const {
    constexpr int64_t kMost = kWide<kScaleSums> ? kSumTilesOfSteps : kSumTiles;
    Range part = {tiles.begin, tiles.begin};
    do {
      accumulate |= part.end > tiles.begin;
      part = {part.end, std::min(part.end + kMost, tiles.end)};
      dot_some_tiles<kR, kScaleSums>(n, part, groups, sums, accumulate);
    } while (part.end < tiles.end);
  }

  // The same for a part of the tiles. It is not inline, so that nothing else competes for its registers.
  template <int kR, bool kScaleSums>
  __attribute__((noinline)) void dot_some_tiles(int64_t n, Range tiles, const float* groups, Floats (*sums)[kM],
                                                bool accumulate) const {
    Floats own[kR][kM];  // in registers
    LOFTQ_UNROLL
    for (int r = 0; r < kR; ++r) {
      LOFTQ_UNROLL
      for (int m = 0; m < kM; ++m) own[r][m] = S::broadcast(0.0f);
    }
    if constexpr (kScaleSums) {
      dot_then_scale<kR>(n, tiles, groups, own);
    } else {
      scale_then_dot<kR>(n, tiles, groups, own);
    }
    LOFTQ_UNROLL
    for (int r = 0; r < kR; ++r) {
      LOFTQ_UNROLL
      for (int m = 0; m < kM; ++m) sums[r][m] = accumulate ? S::add(sums[r][m], own[r][m]) : own[r][m];
    }
  }

  // Scales and offsets of row n in float32, to groups[0 .. groups_) and groups[groups_ ..) that clear_groups() has
  // filled: what lies beyond those of the row stays.
  void load_groups(int64_t n, float* groups) const {
    const int64_t count = row_groups_;
    const DType type = weight_.scale_dtype;
    to_float<S>(type, advance(weight_.scale, type, n * count), count, groups);
    if (weight_.offset) to_float<S>(type, advance(weight_.offset, type, n * count), count, groups + groups_);
  }

  void clear_groups(float* groups) const {
    std::fill(groups, groups + groups_, 0.0f);
    std::fill(groups + groups_, groups + 2 * groups_, weight_.offset ? 0.0f : kNoOffset);
  }

  const uint8_t* codes(int64_t row, int64_t tile) const {
    return weight_.codes + row * row_bytes(weight_.k, kBits) + tile * (kTile * kBits / 8);
  }

  template <int kR>
  static LOFTQ_INLINE void prefetch_step(const uint8_t* bytes, int64_t row_stride) {
    constexpr int64_t kLine = 64;
    LOFTQ_UNROLL
    for (int64_t i = 0; i < kStepColumns * kBits / 8; i += kLine) {
      if constexpr (kFetchFar) {
        __builtin_prefetch(bytes + 8 * row_stride + i, 0, 2);
      } else {
        __builtin_prefetch(bytes + kR * row_stride + i);
      }
    }
  }

  template <int kR>
  LOFTQ_INLINE void dot_then_scale(int64_t n, Range tiles, const float* groups, Floats (&sums)[kR][kM]) const {
    constexpr int64_t kStepBytes = kStepColumns * kBits / 8;
    const Steps steps = steps_;  // a local copy, which no store can change
    const uint8_t* bytes = codes(n, tiles.begin);
    const int64_t row_stride = row_bytes(weight_.k, kBits);
    for (int64_t t = tiles.begin; t < tiles.end; t += Steps::kTiles, bytes += kStepBytes) {
      const int64_t group = group_of(t);
      LOFTQ_UNROLL
      for (int r = 0; r < kR; ++r) {
        const Element* const x = reloaded(x_steps_ + t * kM * kTile);
        const uint8_t* const of_row = bytes + r * row_stride;
        prefetch_step<kR>(of_row, row_stride);
        Floats products[kM];
        LOFTQ_UNROLL
        for (int m = 0; m < kM; ++m) products[m] = S::broadcast(0.0f);
        steps.visit(of_row, tiles.end - t, [&](int position, typename O::Vector w) LOFTQ_LAMBDA {
          LOFTQ_UNROLL
          for (int m = 0; m < kM; ++m) {
            products[m] = O::dot(w, O::load(x + m * kStepColumns + position), products[m]);
          }
        });
        const Floats scale = steps.scales(groups + 2 * r * groups_ + group);
        LOFTQ_UNROLL
        for (int m = 0; m < kM; ++m) sums[r][m] = S::fma(products[m], scale, sums[r][m]);
      }
    }
  }

  template <int kR>
  LOFTQ_INLINE void scale_then_dot(int64_t n, Range tiles, const float* groups, Floats (&sums)[kR][kM]) const {
    const uint8_t* bytes = codes(n, tiles.begin);
    const int64_t row_stride = row_bytes(weight_.k, kBits);
    const bool halves = weight_.group_size == 32;
    for (int64_t t = tiles.begin; t < tiles.end; ++t, bytes += kTile * kBits / 8) {
      const int64_t group = halves ? 2 * t : group_of(t);
      LOFTQ_UNROLL
      for (int r = 0; r < kR; ++r) {
        const Element* const x = reloaded(x_at(0, t));
        __builtin_prefetch(bytes + (kR + r) * row_stride);  // the next rows: no core should wait for memory
        const float* const scale = groups + 2 * r * groups_ + group;
        const auto first = decoder_.group(scale[0], scale[groups_]);
        const auto second = halves ? decoder_.group(scale[1], scale[groups_ + 1]) : first;
        Weights::visit_tile(first, second, bytes + r * row_stride, [&](int column, typename O::Vector w) LOFTQ_LAMBDA {
          LOFTQ_UNROLL
          for (int m = 0; m < kM; ++m) {
            sums[r][m] = O::dot(w, O::load(x + m * kTile + column), sums[r][m]);
          }
        });
      }
    }
  }

  // sums[m] += offset . (sums of x by group) where the tables do without it, + hidden[m] . B[n]; spread over the lanes.
  void add_offsets_and_adapter(int64_t n, const float* groups, float* adapter_row, Floats (&sums)[kM]) const {
    if (scale_sums_ && weight_.offset) add_products(groups + groups_, group_sums_, groups_, sums);
    if (rank_ == 0) return;
    const int64_t rank = p_.lora_B.columns;
    const DType type = p_.lora_B.dtype;
    to_float<S>(type, advance(p_.lora_B.data, type, n * p_.lora_B.stride), rank, adapter_row);
    std::fill(adapter_row + rank, adapter_row + rank_, 0.0f);
    add_products(adapter_row, hidden_, rank_, sums);
  }

  // sums[m] += sum_i a[i] b[m][i], count a multiple of 16
  static void add_products(const float* a, const float* b, int64_t count, Floats (&sums)[kM]) {
    for (int64_t i = 0; i < count; i += S::kLanes) {
      const Floats left = S::load(a + i);
      for (int m = 0; m < kM; ++m) sums[m] = S::fma(left, S::load(b + m * count + i), sums[m]);
    }
  }

  const LinearParams& p_;
  const PackedWeight& weight_;
  const Weights decoder_;
  const bool scale_sums_;  // scale the sums once per group, instead of the table in which its codes are looked up
  const int shift_;
  const Steps steps_;
  const int64_t tiles_;
  const int64_t row_groups_;
  const int64_t groups_;  // groups per row and at least one more, padded
  const int64_t rank_;    // the rank, padded; 0 without an adapter
  // [tiles][kM][64]: rows of x side by side would lie a power of two apart, in the same set of the first-level cache.
  Element* x_ = nullptr;
  Element* x_steps_ = nullptr;   // [steps][kM][kStepColumns], in the order that Steps visits them
  float* group_sums_ = nullptr;  // [kM][groups_]
  float* hidden_ = nullptr;      // [kM][rank_]
  float* partial_ = nullptr;     // [column_parts_][kM][n], where columns are divided
  int threads_ = 1;
  int64_t row_parts_ = 1, column_parts_ = 1;
};

template <class O, int kBits, bool kInteger, int kM = kMostSmallRows>
Status small_linear(const LinearParams& p, int threads) {
  if constexpr (kM > 1) {
    if (p.x.rows < kM) return small_linear<O, kBits, kInteger, kM - 1>(p, threads);
  }
  return SmallLinear<O, kBits, kInteger, kM>(p).run(threads);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
