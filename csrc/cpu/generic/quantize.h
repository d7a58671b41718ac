// Turns weights into codes, scales and residual, in one pass over memory. loftq/quantize.h states the rule.
#pragma once

#include <cmath>

#include "cpu/generic/rows.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

constexpr float kSmallestNormal = 0x1p-126f;
constexpr int kSearchSteps = 25;

struct Group {
  float scale = 0.0f;        // as stored
  float offset = kNoOffset;  // as stored
  float inverse = 0.0f;      // 1 / max(scale, kSmallestNormal)
};

// What the scale of a group follows from.
struct Range {
  float base;  // scale before the search
  float low;   // kMinMax alone: its minimum
  float span;  //                its maximum - minimum
};

// ---- one group: float32 weights w[0 .. count), readable up to a whole vector

template <class S>
inline float absmax(const float* w, int64_t count) {
  // Compares as integers, because the maximum of float32 may drop a NaN. As integers, magnitudes sort below Inf, and
  // Inf below NaN.
  auto highest = S::zero();
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) highest = S::max(highest, S::magnitude_bits(S::load(w + i)));
  int32_t result = S::highest(highest);
  for (; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(bits_of(w[i]) & 0x7fffffffu);
    if (bits > result) result = bits;
  }
  return float_of(static_cast<uint32_t>(result));
}

template <class S>
inline void min_max(const float* w, int64_t count, float* low, float* high) {
  auto lowest = S::broadcast(w[0]);
  auto highest = lowest;
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    const auto v = S::load(w + i);
    lowest = S::min(lowest, v);
    highest = S::max(highest, v);
  }
  *low = S::lowest(lowest);
  *high = S::highest(highest);
  for (; i < count; ++i) {
    if (w[i] < *low) *low = w[i];
    if (w[i] > *high) *high = w[i];
  }
  *low += 0.0f;  // which of -0 and +0 is found depends on the order of comparison: both become +0
  *high += 0.0f;
}

template <class S>
float mean_std_scale(const float* w, int64_t count) {
  const double mean = sum_columns<S>(count, [&](int64_t i) { return S::widen(S::load(w + i)); }) / count;
  const auto center = S::broadcast(mean);
  const double squares = sum_columns<S>(count, [&](int64_t i) {
    const auto deviation = S::sub(S::widen(S::load(w + i)), center);
    return S::mul(deviation, deviation);
  });
  return static_cast<float>(mean + 2.5 * std::sqrt(squares / (count - 1)));  // NaN for a single weight
}

// ---- rows

template <class S, int kBits, bool kInteger>
class Quantizer {
 public:
  explicit Quantizer(const QuantizeParams& params)
      : p_(params),
        groups_(num_groups(params.k, params.group_size)),
        midpoints_(params.codebook, kBits),
        nearest_(midpoints_),
        decoder_(params.codebook) {}
  Quantizer(const Quantizer&) = delete;  // nearest_ may point into midpoints_

  void run(int64_t begin, int64_t end, float* scratch) const {
    const int64_t span = span_columns(p_.k, p_.group_size);
    for (int64_t row = begin; row < end; ++row) {
      Sums<S> norm2;
      for (int64_t column = 0; column < p_.k; column += span) {
        const int64_t count = p_.k - column < span ? p_.k - column : span;
        quantize_span(row, column, count, scratch, scratch + span, norm2);
      }
      if (p_.residual_norm2) p_.residual_norm2[row] = norm2.total();
    }
  }

 private:
  using Nearest = typename NearestOf<S, kBits, kInteger>::type;
  using Decode = Decoder<S, kBits, kInteger>;
  using Floats = typename S::Floats;

  // Columns [column, column + count): whole groups and whole tiles, but for the end of the row.
  // dense, shifted: scratch of count rounded up to whole tiles.
  void quantize_span(int64_t row, int64_t column, int64_t count, float* dense, float* shifted, Sums<S>& norm2) const {
    const float* const weight = as_float(row, column, count, dense);
    const float* target = weight;
    if (p_.low_rank) {
      subtract(weight, advance(p_.low_rank, p_.residual_dtype, row * p_.k + column), count, shifted);
      target = shifted;
    }
    uint8_t* bytes = p_.codes + row * row_bytes(p_.k, kBits) + column * kBits / 8;
    const int64_t width = group_width(p_.k, p_.group_size);  // for a whole row it is k, and so is count
    const Nearest nearest = nearest_;                        // a copy in registers, which no store of bytes can change
    Group half[2];                                           // of columns 0..31 and 32..63 of the tile
    for (int64_t tile = 0; tile < count; tile += kTile, bytes += kTile * kBits / 8) {
      const auto choose = [&](int64_t at) {
        return choose_group(row, column + at, target + at, count - at < width ? count - at : width);
      };
      if (tile % width == 0) half[0] = half[1] = choose(tile);
      if (width == 32 && tile + 32 < count) half[1] = choose(tile + 32);
      encode_tile(nearest, half, target + tile, bytes);
      if (tile + kTile > count) clear_fields(count - tile, bytes);
      if (p_.residual) subtract_decoded(half, bytes, weight + tile, row, column + tile, norm2);
    }
  }

  // The weights of a span in float32, zeros after them to the end of the last tile; in place where that is what they
  // are.
  const float* as_float(int64_t row, int64_t column, int64_t count, float* dense) const {
    const void* source = advance(p_.weight, p_.weight_dtype, row * p_.weight_stride + column);
    const int64_t padded = padded_k(count);
    if (p_.weight_dtype == DType::kFloat32 && count == padded) return static_cast<const float*>(source);
    to_float<S>(p_.weight_dtype, source, count, dense);
    for (int64_t i = count; i < padded; ++i) dense[i] = 0.0f;
    return dense;
  }

  // out <- weight - low_rank, zeros to the end of the last tile.
  void subtract(const float* weight, const void* low_rank, int64_t count, float* out) const {
    to_float<S>(p_.residual_dtype, low_rank, count, out);
    int64_t i = 0;
    for (; i + S::kLanes <= count; i += S::kLanes) S::store(out + i, S::sub(S::load(weight + i), S::load(out + i)));
    for (; i < count; ++i) out[i] = weight[i] - out[i];
    for (; i < padded_k(count); ++i) out[i] = 0.0f;
  }

  // Chooses and stores the scale and offset of the group that begins at this column.
  Group choose_group(int64_t row, int64_t column, const float* w, int64_t count) const {
    const Range range = range_of(w, count);
    const Group group = p_.scale_search ? search(range, w, count) : stored(range, 1.0f);
    const int64_t index = row * groups_ + column / group_width(p_.k, p_.group_size);
    store_rounded(group.scale, advance(p_.scale, p_.scale_dtype, index));
    if (p_.offset) store_rounded(group.offset, advance(p_.offset, p_.scale_dtype, index));
    return group;
  }

  Range range_of(const float* w, int64_t count) const {
    const float largest = absmax<S>(w, count);
    Range range = {largest / p_.codebook[(1 << kBits) - 1], 0.0f, 0.0f};
    if (bits_of(largest) >= 0x7f800000u) return {largest, 0.0f, 0.0f};  // Inf or NaN: so is the scale
    if (p_.scale_rule == ScaleRule::kMinMax) {
      float high;
      min_max<S>(w, count, &range.low, &high);
      range.span = high - range.low;
      range.base = range.span / static_cast<float>((1 << kBits) - 1);
    } else if (p_.scale_rule == ScaleRule::kMeanStd) {
      const float scale = mean_std_scale<S>(w, count);
      if (scale > 0.0f) range.base = scale;
    }
    return range;
  }

  // The group as it is stored for one factor of the search.
  Group stored(const Range& range, float factor) const {
    Group group;
    group.scale = rounded(factor * range.base);
    if (p_.offset) {
      const float low = range.low + (1.0f - factor) * 0.5f * range.span;
      group.offset = rounded(low + static_cast<float>(1 << (kBits - 1)) * group.scale);
    }
    group.inverse = 1.0f / (group.scale < kSmallestNormal ? kSmallestNormal : group.scale);
    return group;
  }

  Group search(const Range& range, const float* w, int64_t count) const {
    Group best = stored(range, 1.0f);
    double least = squared_error(best, w, count);
    for (int step = 1; step < kSearchSteps; ++step) {
      const Group candidate = stored(range, 1.0f - static_cast<float>(step) / 32);
      const double error = squared_error(candidate, w, count);
      if (!(error < least)) continue;
      least = error;
      best = candidate;
    }
    return best;
  }

  double squared_error(const Group& group, const float* w, int64_t count) const {
    const Nearest nearest = nearest_;
    const Decode decode(decoder_, group.scale, group.offset);
    return sum_columns<S>(count, [&](int64_t i) {
      const Floats v = S::load(w + i);
      const auto difference = S::widen(S::sub(v, decode(nearest(normalized(v, group)))));
      return S::mul(difference, difference);
    });
  }

  static Floats normalized(Floats w, const Group& group) {
    return S::mul(S::sub(w, S::broadcast(group.offset)), S::broadcast(group.inverse));
  }

  static void encode_tile(const Nearest& nearest, const Group (&half)[2], const float* w, uint8_t* bytes) {
    constexpr int kRun = kTile * kBits / 8;
    for (int j = 0; j < kRun; j += S::kLanes) {
      auto byte = S::zero();
      for (int i = 0; i < 8 / kBits; ++i) {
        const int column = i * kRun + j;
        byte = S::or_shifted_left(byte, nearest(normalized(S::load(w + column), half[column / 32])), i * kBits);
      }
      S::store_bytes(bytes + j, byte);
    }
  }

  // Zeroes the codes of a tile from column `count` on.
  static void clear_fields(int64_t count, uint8_t* bytes) {
    for (int64_t column = count; column < kTile; ++column) {
      const CodeAddress at = code_address(column, kBits);
      bytes[at.byte] &= static_cast<uint8_t>(~(((1 << kBits) - 1) << at.shift));
    }
  }

  // Residual of one tile: weight - dequantized.
  void subtract_decoded(const Group (&half)[2], const uint8_t* bytes, const float* weight, int64_t row, int64_t column,
                        Sums<S>& norm2) const {
    alignas(64) float difference[kTile];
    const Decode first(decoder_, half[0].scale, half[0].offset);
    const Decode second(decoder_, half[1].scale, half[1].offset);
    decode_tile<S, kBits>(first, second, bytes, difference);
    const int64_t count = p_.k - column < kTile ? p_.k - column : kTile;
    for (int i = 0; i < kTile; i += S::kLanes) {
      S::store(difference + i, S::sub(S::load(weight + i), S::load(difference + i)));
    }
    for (int64_t i = count; i < kTile; ++i) difference[i] = 0.0f;
    for (int i = 0; i < kTile; i += S::kLanes) {
      const auto wide = S::widen(S::load(difference + i));
      norm2.add(i % 32 / S::kLanes, S::mul(wide, wide));
    }
    from_float<S>(p_.residual_dtype, difference, count, advance(p_.residual, p_.residual_dtype, row * p_.k + column));
  }

  float rounded(float value) const {
    switch (p_.scale_dtype) {
      case DType::kFloat16:
        return S::from_half(S::to_half(value));
      case DType::kBFloat16:
        return bfloat_to_float(float_to_bfloat(value));
      default:
        return value;
    }
  }

  void store_rounded(float value, void* out) const {
    const uint16_t word = p_.scale_dtype == DType::kFloat16 ? S::to_half(value) : float_to_bfloat(value);
    if (p_.scale_dtype == DType::kFloat32) {
      std::memcpy(out, &value, sizeof value);
    } else {
      std::memcpy(out, &word, sizeof word);
    }
  }

  const QuantizeParams p_;
  const int64_t groups_;
  const Midpoints midpoints_;
  const Nearest nearest_;
  const Decode decoder_;
};

template <class S>
void quantize_rows(const QuantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const bool integer = is_integer_codebook(p.codebook, p.bits);
  if (p.bits == 2) return Quantizer<S, 2, false>(p).run(begin, end, scratch);
  if (p.bits == 4 && integer) return Quantizer<S, 4, true>(p).run(begin, end, scratch);
  if (p.bits == 4) return Quantizer<S, 4, false>(p).run(begin, end, scratch);
  if (integer) return Quantizer<S, 8, true>(p).run(begin, end, scratch);
  Quantizer<S, 8, false>(p).run(begin, end, scratch);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
