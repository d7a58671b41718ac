// The products of loftq/linear.h. Few rows of x are served by linear_small.h. For more rows the weight is decoded once
// into panels that stay in the caches and feed register tiles.
#pragma once

#include <algorithm>

#include "cpu/generic/linear_small.h"
#include "cpu/generic/panels.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr int64_t kChunkRows = 512;  // rows of x per chunk: bounds the memory; each chunk decodes the weight anew

// A grid of parts over work that can be split in two directions: the first direction as far as it goes, whole panels if
// that gives every thread some, the second only for threads that would have nothing else.
struct Grid {
  int64_t first, second;

  Grid(int threads, int64_t panels, int64_t most_first, int64_t most_second)
      : first(std::min(std::max<int64_t>(parts_for(threads, panels), threads), most_first)),
        second(std::max<int64_t>(1, std::min(threads / first, most_second))) {}

  int64_t parts() const { return first * second; }
};

// c[0..rows)[0..blocks * kLanes) (+)= left panel x right panel
template <class O>
void multiply_panels(int64_t rows, int64_t blocks, const typename O::Element* left, const typename O::Element* right,
                     int64_t block_stride, int64_t steps, float* c, int64_t c_stride, bool accumulate) {
  const int64_t groups = ceil_div(blocks, O::kVectors);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = blocks * g / groups, end = blocks * (g + 1) / groups;
    const int vectors = static_cast<int>(end - begin), tile_rows = O::rows(vectors);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int count = static_cast<int>(std::min<int64_t>(tile_rows, rows - r));
      for (int64_t step = 0; step < steps; step += O::kSumSteps) {
        O::multiply(count, vectors, left + r * kPanelStride<O> + step * O::kStep,
                    right + begin * block_stride + step * O::kWidth, block_stride,
                    std::min<int64_t>(O::kSumSteps, steps - step), c + r * c_stride + begin * O::kLanes, c_stride,
                    accumulate || step > 0);
      }
    }
  }
}

// Steps that `columns` columns take, in whole units of what a register tile multiplies; panels are zero beyond.
template <class O>
constexpr int64_t steps_of(int64_t columns) {
  return ceil_div(columns, O::kDepth) * (O::kDepth / O::kStep);
}

// c = rows [row, row + rows) of `source`, `columns` wide, times a right panel whose blocks of kLanes outputs are
// block_stride apart.
template <class O, class Rows>
void multiply_rows(const Rows& source, int64_t row, int64_t rows, int64_t columns, int64_t blocks,
                   const typename O::Element* right, int64_t block_stride, typename O::Element* left, float* c,
                   int64_t c_stride) {
  constexpr int64_t kTiles = kPanelColumns<O> / kTile;
  const int64_t tiles = ceil_div(columns, kTile);
  for (int64_t tile = 0; tile < tiles; tile += kTiles) {
    const int64_t count = std::min(kTiles, tiles - tile);
    const bool last = tile + count == tiles;
    source.prefetch(last ? row + rows : row, rows, last ? 0 : tile + count, std::min(kTiles, tiles));
    source.fill(row, rows, tile, count, left, kPanelStride<O>);
    multiply_panels<O>(rows, blocks, left, right + tile * kTile * O::kLanes, block_stride,
                       steps_of<O>(std::min(count * kTile, columns - tile * kTile)), c, c_stride, tile > 0);
  }
}

// ---- y = x D^T + scaling (x A^T) B^T + bias

template <class O, class Rows>
class Linear {
  using S = typename O::Simd;
  using Element = typename O::Element;

 public:
  Linear(const LinearParams& p, const Rows& weight)
      : p_(p),
        weight_(weight),
        tiles_(padded_k(p.weight.k) / kTile),
        rank_tiles_(p.lora_A.data ? padded_k(p.lora_A.rows) / kTile : 0),
        block_stride_((tiles_ + rank_tiles_) * kTile * O::kLanes),
        blocks_(ceil_div(std::min(kChunkRows, p.x.rows), O::kLanes)),
        c_stride_(blocks_ * O::kLanes + 16) {}

  Status run(int threads) {
    const int64_t left_size = O::kPanelRows * kPanelStride<O>, c_size = kResultRows * c_stride_;
    const Scratch<Element> x(blocks_ * block_stride_);
    const Scratch<Element> left(threads * left_size);
    const Scratch<float> c(threads * c_size);
    if (!x.data() || !left.data() || !c.data()) return kOutOfMemory;
    x_ = x.data();
    threads_ = threads;
    const int64_t chunks = ceil_div(p_.x.rows, kChunkRows);
    parallel_phases(
        threads, kPhases * chunks, [&](int64_t phase) { return parts_of_phase(phase); },
        [&](int64_t phase, int64_t part, int slot) {
          [[maybe_unused]] const typename O::Session session;
          run_part(phase, part, left.data() + slot * left_size, c.data() + slot * c_size);
        });
    return nullptr;
  }

 private:
  static constexpr int64_t kPhases = 3;  // of every chunk of rows of x: its panel, its product with A, the result

  // What a phase works on.
  struct Chunk {
    int64_t first, rows, blocks;
  };

  Chunk chunk_of(int64_t phase) const {
    const int64_t first = phase / kPhases * kChunkRows, rows = std::min(kChunkRows, p_.x.rows - first);
    return {first, rows, ceil_div(rows, O::kLanes)};
  }

  Grid projections(const Chunk& chunk) const {
    return Grid(threads_, chunk.blocks, chunk.blocks, ceil_div(p_.lora_A.rows, O::kLanes));
  }

  Grid results(const Chunk& chunk) const {
    return Grid(threads_, p_.weight.n / O::kPanelRows, ceil_div(p_.weight.n, 16), chunk.blocks);
  }

  int64_t parts_of_phase(int64_t phase) const {
    const Chunk chunk = chunk_of(phase);
    if (phase % kPhases == 0) return parts_for(threads_, chunk.blocks);
    if (phase % kPhases == 1) return rank_tiles_ > 0 ? projections(chunk).parts() : 0;
    return results(chunk).parts();
  }

  void run_part(int64_t phase, int64_t part, Element* left, float* c) const {
    const Chunk chunk = chunk_of(phase);
    if (phase % kPhases == 0) return fill_x(chunk, part_of(chunk.blocks, 1, part, parts_of_phase(phase)));
    if (phase % kPhases == 1) {
      const Grid grid = projections(chunk);
      return project(part_of(chunk.blocks, 1, part / grid.second, grid.first),
                     part_of(rank_tiles_ * kTile, O::kLanes, part % grid.second, grid.second), left, c);
    }
    const Grid grid = results(chunk);
    const int64_t unit = grid.first * O::kPanelRows <= p_.weight.n ? O::kPanelRows : 16;
    const Range columns = part_of(p_.weight.n, unit, part / grid.second, grid.first);
    const Range blocks = part_of(chunk.blocks, 1, part % grid.second, grid.second);
    for (int64_t n = columns.begin; n < columns.end; n += O::kPanelRows) {
      panel(chunk.first, chunk.rows, n, std::min<int64_t>(O::kPanelRows, columns.end - n), blocks, left, c);
    }
  }

  void fill_x(const Chunk& chunk, Range blocks) const {
    Matrix x = p_.x;
    x.data = advance(x.data, x.dtype, chunk.first * x.stride);
    x.rows = chunk.rows;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      fill_right_transposed<O>(x, b * O::kLanes, tiles_, x_ + b * block_stride_);
    }
  }

  // Appends scaling x A^T to the right panel of x; zero beyond the rank.
  void project(Range blocks, Range ranks, Element* left, float* c) const {
    const DenseRows<O> adapter(p_.lora_A);
    const int64_t count = blocks.end - blocks.begin;
    for (int64_t r = ranks.begin; r < ranks.end; r += O::kPanelRows) {
      const int64_t rows = std::min<int64_t>(O::kPanelRows, ranks.end - r);
      const int64_t real = std::max<int64_t>(0, std::min(rows, p_.lora_A.rows - r));
      multiply_rows<O>(adapter, r, real, p_.weight.k, count, x_ + blocks.begin * block_stride_, block_stride_, left, c,
                       c_stride_);
      for (int64_t i = real; i < rows; ++i) std::fill(c + i * c_stride_, c + i * c_stride_ + count * O::kLanes, 0.0f);
      for (int64_t b = 0; b < count; ++b) {
        Element* const out = x_ + (blocks.begin + b) * block_stride_ + (tiles_ * kTile + r) * O::kLanes;
        for (int64_t i = 0; i < rows; i += O::kStep) {
          interleave_sums(c + i * c_stride_ + b * O::kLanes, out + i * O::kLanes);
        }
      }
    }
  }

  void interleave_sums(float* sums, Element* out) const {
    alignas(64) Element rows[O::kStep][O::kLanes];
    for (int i = 0; i < O::kStep; ++i) {
      float* const row = sums + i * c_stride_;
      S::store(row, S::mul(S::load(row), S::broadcast(p_.scaling)));
      O::convert(DType::kFloat32, row, O::kLanes, rows[i]);
    }
    O::interleave(rows[0], O::kLanes, out);
  }

  // y[m .. m + rows) of `blocks`, columns [n, n + count)
  void panel(int64_t m, int64_t rows, int64_t n, int64_t count, Range blocks, Element* left, float* c) const {
    const int64_t block_count = blocks.end - blocks.begin;
    const Element* const x = x_ + blocks.begin * block_stride_;
    if (rank_tiles_ > 0) {  // [D | B] times [x | scaling x A^T]
      const DenseRows<O> adapter(p_.lora_B);
      const SideBySide<O, Rows, DenseRows<O>> weight(weight_, tiles_, adapter);
      multiply_rows<O>(weight, n, count, tiles_ * kTile + p_.lora_A.rows, block_count, x, block_stride_, left, c,
                       c_stride_);
    } else {
      multiply_rows<O>(weight_, n, count, p_.weight.k, block_count, x, block_stride_, left, c, c_stride_);
    }
    alignas(64) float bias[kResultRows] = {};
    if (p_.bias) to_float<S>(p_.bias_dtype, advance(p_.bias, p_.bias_dtype, n), count, bias);
    for (int64_t b = 0; b < block_count; ++b) {
      const int64_t first = (blocks.begin + b) * O::kLanes, lanes = std::min<int64_t>(O::kLanes, rows - first);
      for (int64_t i = 0; i < count; i += O::kLanes) {
        alignas(64) float values[O::kLanes][O::kLanes];  // transposed: each is one row of y
        S::transpose(c + i * c_stride_ + b * O::kLanes, c_stride_, values[0], O::kLanes);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const auto row = S::add(S::load(values[lane]), S::load(bias + i));
          void* const out = advance(p_.y, p_.x.dtype, (m + first + lane) * p_.weight.n + n + i);
          if (count - i >= O::kLanes) {
            O::store_result(p_.x.dtype, row, out);
          } else {
            S::store(values[lane], row);
            from_float<S>(p_.x.dtype, values[lane], count - i, out);
          }
        }
      }
    }
  }

  static constexpr int64_t kResultRows = ceil_div(O::kPanelRows, O::kLanes) * O::kLanes;  // whole blocks to transpose

  const LinearParams& p_;
  const Rows& weight_;
  const int64_t tiles_, rank_tiles_, block_stride_;
  const int64_t blocks_;    // blocks of kLanes rows of x in a chunk
  const int64_t c_stride_;  // not a power of two, like kPanelStride
  int threads_ = 1;
  Element* x_ = nullptr;  // right panel [blocks_][(k padded + rank padded) / kStep][kWidth]
};

// ---- grad_x = grad_y D + scaling (grad_y B) A

template <class O, class Rows>
class LinearGradInput {
  using S = typename O::Simd;
  using Element = typename O::Element;

  static constexpr int64_t kRightRows = 128;  // rows of the weight that are decoded at a time,
  static constexpr int64_t kRightTiles = 4;   // and tiles of each: whole cache lines of codes at 2 bits
  static constexpr int64_t kRightStride = kRightRows * O::kLanes;
  static constexpr int64_t kCStride = kRightTiles * kTile + 16;

 public:
  LinearGradInput(const LinearParams& p, const Rows& weight)
      : p_(p),
        weight_(weight),
        n_tiles_(padded_k(p.weight.n) / kTile),
        k_tiles_(padded_k(p.weight.k) / kTile),
        rank_tiles_(p.lora_A.data ? padded_k(p.lora_A.rows) / kTile : 0),
        rows_(ceil_div(std::min(kChunkRows, p.x.rows), kTileRows) * kTileRows) {}

  Status run(int threads) {
    const int64_t right_size = kRightTiles * kTile / O::kLanes * kRightStride, c_size = rows_ * kCStride;
    const Scratch<Element> grad(left_size(n_tiles_)), hidden(left_size(rank_tiles_) + 1);
    const Scratch<Element> right(threads * right_size);
    const Scratch<float> c(threads * c_size);
    if (!grad.data() || !hidden.data() || !right.data() || !c.data()) return kOutOfMemory;
    grad_ = grad.data();
    hidden_ = hidden.data();
    threads_ = threads;
    const int64_t chunks = ceil_div(p_.x.rows, kChunkRows);
    parallel_phases(
        threads, kPhases * chunks, [&](int64_t phase) { return parts_of_phase(phase); },
        [&](int64_t phase, int64_t part, int slot) {
          [[maybe_unused]] const typename O::Session session;
          run_part(phase, part, right.data() + slot * right_size, c.data() + slot * c_size);
        });
    return nullptr;
  }

 private:
  static constexpr int64_t kPhases = 2;  // of every chunk of rows of grad_y: its panels with hidden, the result
  static constexpr int64_t kTileRows = O::rows(O::kVectors);
  static constexpr int64_t kPanelTiles = kPanelColumns<O> / kTile;

  int64_t left_size(int64_t tiles) const { return ceil_div(tiles, kPanelTiles) * rows_ * kPanelStride<O>; }

  // What a phase works on.
  struct Chunk {
    int64_t first, rows, row_tiles;
  };

  Chunk chunk_of(int64_t phase) const {
    const int64_t first = phase / kPhases * kChunkRows, rows = std::min(kChunkRows, p_.x.rows - first);
    return {first, rows, ceil_div(rows, kTileRows)};
  }

  Grid results(const Chunk& chunk) const { return Grid(threads_, k_tiles_ / kRightTiles, k_tiles_, chunk.row_tiles); }

  int64_t parts_of_phase(int64_t phase) const {
    const Chunk chunk = chunk_of(phase);
    return phase % kPhases == 0 ? parts_for(threads_, chunk.row_tiles) : results(chunk).parts();
  }

  void run_part(int64_t phase, int64_t part, Element* right, float* c) const {
    const Chunk chunk = chunk_of(phase);
    if (phase % kPhases == 0) {
      return fill_grad(chunk, part_of(chunk.rows, kTileRows, part, parts_of_phase(phase)), right, c);
    }
    const Grid grid = results(chunk);
    const int64_t unit = grid.first * kRightTiles <= k_tiles_ ? kRightTiles : 1;
    const Range tiles = part_of(k_tiles_, unit, part / grid.second, grid.first);
    const Range rows = part_of(chunk.rows, kTileRows, part % grid.second, grid.second);
    for (int64_t tile = tiles.begin; tile < tiles.end; tile += kRightTiles) {
      result(chunk, rows, tile, std::min(kRightTiles, tiles.end - tile), right, c);
    }
  }

  void fill_grad(const Chunk& chunk, Range rows, Element* right, float* c) const {
    Matrix grad = p_.x;
    grad.data = advance(grad.data, grad.dtype, chunk.first * grad.stride);
    grad.rows = chunk.rows;
    fill_left_panels(DenseRows<O>(grad), rows, n_tiles_, grad_);
    if (rank_tiles_ > 0) project(rows, right, c);
  }

  // These rows of grad_x, columns of the tiles [tile, tile + count)
  void result(const Chunk& chunk, Range rows, int64_t tile, int64_t count, Element* right, float* c) const {
    multiply(weight_, grad_, rows, tile, count, right, c, false);
    if (rank_tiles_ > 0) multiply(DenseRows<O>(p_.lora_A), hidden_, rows, tile, count, right, c, true);
    const int64_t column = tile * kTile, columns = std::min(count * kTile, p_.weight.k - column);
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      from_float<S>(p_.x.dtype, c + r * kCStride, columns,
                    advance(p_.y, p_.x.dtype, (chunk.first + r) * p_.weight.k + column));
    }
  }

  // [panel][row][kPanelStride], zero beyond the columns of the source
  template <class Source>
  void fill_left_panels(const Source& source, Range rows, int64_t tiles, Element* out) const {
    for (int64_t tile = 0; tile < tiles; tile += kPanelTiles, out += rows_ * kPanelStride<O>) {
      source.fill(rows.begin, rows.end - rows.begin, tile, std::min(kPanelTiles, tiles - tile),
                  out + rows.begin * kPanelStride<O>, kPanelStride<O>);
    }
  }

  // hidden = scaling grad_y B, as left panels
  void project(Range rows, Element* right, float* c) const {
    const DenseRows<O> adapter(p_.lora_B);
    for (int64_t tile = 0; tile < rank_tiles_; tile += kRightTiles) {
      const int64_t count = std::min(kRightTiles, rank_tiles_ - tile);
      multiply(adapter, grad_, rows, tile, count, right, c, false);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        float* const values = c + r * kCStride;
        for (int64_t i = 0; i < count * kTile; i += S::kLanes) {
          S::store(values + i, S::mul(S::load(values + i), S::broadcast(p_.scaling)));
        }
      }
      const Matrix scaled = {c, DType::kFloat32, rows_, count * kTile, kCStride};
      Element* const out = hidden_ + tile / kPanelTiles * rows_ * kPanelStride<O> + tile % kPanelTiles * kTile;
      DenseRows<O>(scaled).fill(rows.begin, rows.end - rows.begin, 0, count, out + rows.begin * kPanelStride<O>,
                                kPanelStride<O>);
    }
  }

  // c[rows][tiles * 64] (+)= left panels [.., source rows] x source [rows, tiles [tile, tile + tiles)]
  template <class Source>
  void multiply(const Source& source, const Element* left, Range rows, int64_t tile, int64_t tiles, Element* right,
                float* c, bool accumulate) const {
    const int64_t source_rows = padded_k(source.rows());
    for (int64_t row = 0; row < source_rows; row += kRightRows) {
      const int64_t count = std::min(kRightRows, source_rows - row);
      fill_right<O>(source, row, count, tile, tiles, kRightStride, right);
      const int64_t panel = row / kPanelColumns<O>, column = row % kPanelColumns<O>;
      multiply_panels<O>(rows.end - rows.begin, tiles * kTile / O::kLanes,
                         left + (panel * rows_ + rows.begin) * kPanelStride<O> + column, right, kRightStride,
                         steps_of<O>(std::min(count, source.rows() - row)), c + rows.begin * kCStride, kCStride,
                         accumulate || row > 0);
    }
  }

  const LinearParams& p_;
  const Rows& weight_;
  const int64_t n_tiles_, k_tiles_, rank_tiles_;
  const int64_t rows_;  // rows of grad_y in a chunk, padded to whole register tiles
  int threads_ = 1;
  Element* grad_ = nullptr;    // left panels
  Element* hidden_ = nullptr;  // left panels
};

// ---- by format

template <class O, int kBits, bool kInteger>
Status linear_as(const LinearParams& p, int threads) {
  if constexpr (O::kFewRows) {
    if (p.x.rows <= kMostSmallRows) return small_linear<O, kBits, kInteger>(p, threads);
  }
  const PackedRows<O, kBits, kInteger> weight(p.weight);
  return Linear<O, PackedRows<O, kBits, kInteger>>(p, weight).run(threads);
}

template <class O>
Status linear(const LinearParams& p, int threads) {
  if (p.weight.bits == 2) return linear_as<O, 2, false>(p, threads);
  if (p.weight.bits == 4) return linear_as<O, 4, false>(p, threads);
  return is_integer_codebook(p.weight.codebook, 8) ? linear_as<O, 8, true>(p, threads)
                                                   : linear_as<O, 8, false>(p, threads);
}

template <class O, int kBits, bool kInteger>
Status linear_grad_input_as(const LinearParams& p, int threads) {
  const PackedRows<O, kBits, kInteger> weight(p.weight);
  return LinearGradInput<O, PackedRows<O, kBits, kInteger>>(p, weight).run(threads);
}

template <class O>
Status linear_grad_input(const LinearParams& p, int threads) {
  if (p.weight.bits == 2) return linear_grad_input_as<O, 2, false>(p, threads);
  if (p.weight.bits == 4) return linear_grad_input_as<O, 4, false>(p, threads);
  return is_integer_codebook(p.weight.codebook, 8) ? linear_grad_input_as<O, 8, true>(p, threads)
                                                   : linear_grad_input_as<O, 8, false>(p, threads);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
