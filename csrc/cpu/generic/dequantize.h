// Codes to dense weights.
#pragma once

#include "cpu/generic/rows.h"

namespace loftq {
inline namespace LOFTQ_VERSION {
namespace {

template <class S, int kBits, bool kInteger>
void dequantize_rows_as(const DequantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const Decoder<S, kBits, kInteger> codebook(p.codebook);
  const int64_t groups = num_groups(p.k, p.group_size);
  const int shift = group_shift(p.group_size);
  float* const scale = scratch;
  float* const offset = scratch + groups;
  for (int64_t g = 0; g < groups; ++g) offset[g] = kNoOffset;

  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* bytes = p.codes + row * row_bytes(p.k, kBits);
    to_float<S>(p.scale_dtype, advance(p.scale, p.scale_dtype, row * groups), groups, scale);
    if (p.offset) to_float<S>(p.scale_dtype, advance(p.offset, p.scale_dtype, row * groups), groups, offset);
    const auto decoder = [&](int64_t column) {
      const int64_t group = column < p.k ? column >> shift : groups - 1;
      return Decoder<S, kBits, kInteger>(codebook, scale[group], offset[group]);
    };

    for (int64_t column = 0; column < p.k; column += kTile, bytes += kTile * kBits / 8) {
      const int64_t count = p.k - column < kTile ? p.k - column : kTile;
      void* const out = advance(p.out, p.out_dtype, row * p.k + column);
      const auto first = decoder(column);
      const auto second = p.group_size == 32 ? decoder(column + 32) : first;
      if (count == kTile && p.out_dtype == DType::kFloat32) {
        decode_tile<S, kBits>(first, second, bytes, static_cast<float*>(out));
        continue;
      }
      alignas(64) float decoded[kTile];
      decode_tile<S, kBits>(first, second, bytes, decoded);
      from_float<S>(p.out_dtype, decoded, count, out);
    }
  }
}

template <class S>
void dequantize_rows(const DequantizeParams& p, int64_t begin, int64_t end, float* scratch) {
  const bool integer = is_integer_codebook(p.codebook, p.bits);
  if (p.bits == 2) return dequantize_rows_as<S, 2, false>(p, begin, end, scratch);
  if (p.bits == 4) return dequantize_rows_as<S, 4, false>(p, begin, end, scratch);
  return integer ? dequantize_rows_as<S, 8, true>(p, begin, end, scratch)
                 : dequantize_rows_as<S, 8, false>(p, begin, end, scratch);
}

}  // namespace
}  // namespace LOFTQ_VERSION
}  // namespace loftq
