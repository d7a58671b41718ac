// The storage contract: where the b-bit code of row n, column k lives.
//
// K is padded to a multiple of 64. A row's 64-wide tile t holds 64*b/8 bytes; with P = 8/b codes to a byte,
// byte j of the tile holds the codes of columns 64*t + j + i*(64/P), i = 0..P-1, field i at bits [i*b, (i+1)*b).
// Field 0 of consecutive bytes is thus a contiguous run of K, so one shift and mask of a vector of bytes
// yields a contiguous slice of K without moving any lane.
#pragma once

#include "loftq/types.h"

namespace loftq {

constexpr int64_t kTile = 64;  // columns a tile; every group size is a divisor or a multiple of 32

constexpr LOFTQ_HD int64_t padded_k(int64_t k) { return ceil_div(k, kTile) * kTile; }

constexpr LOFTQ_HD int64_t row_bytes(int64_t k, int bits) { return padded_k(k) * bits / 8; }

constexpr LOFTQ_HD int64_t num_groups(int64_t k, int64_t group_size) {
  return group_size < 0 ? (k > 0 ? 1 : 0) : ceil_div(k, group_size);
}

struct CodeAddress {
  int64_t byte;  // within the row
  int shift;     // of the field inside that byte
};

constexpr LOFTQ_HD CodeAddress code_address(int64_t column, int bits) {
  const int64_t run = kTile * bits / 8;  // = 64 / P: bytes a tile, and columns a field
  const int64_t in_tile = column % kTile;
  return {column / kTile * run + in_tile % run, static_cast<int>(in_tile / run) * bits};
}

constexpr LOFTQ_HD int load_code(const uint8_t* row, int64_t column, int bits) {
  const CodeAddress at = code_address(column, bits);
  return (row[at.byte] >> at.shift) & ((1 << bits) - 1);
}

// Codes, one a byte, to or from this layout.
struct PackParams {
  const uint8_t* codes;  // [n, k] contiguous, each below 2^bits
  int64_t n;
  int64_t k;
  int bits;         // 2, 4 or 8
  uint8_t* packed;  // [n, row_bytes(k, bits)]; fields beyond k become 0
};

struct UnpackParams {
  const uint8_t* packed;  // [n, row_bytes(k, bits)]
  int64_t n;
  int64_t k;
  int bits;
  uint8_t* codes;  // [n, k] contiguous
};

}  // namespace loftq
