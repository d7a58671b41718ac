// The storage contract: where the b-bit code of row n, column k lives.
//
// K is padded to a multiple of 64. A row's 64-wide tile t holds 64*b/8 bytes; with P = 8/b codes per byte,
// byte j of the tile holds the codes of columns 64*t + j + i*(64/P), i = 0..P-1, field i at bits [i*b, (i+1)*b).
// Field 0 of consecutive bytes is thus a contiguous run of K, so one shift and mask of a vector of bytes
// yields a contiguous slice of K without moving any lane.
#pragma once

#include "loftq/types.h"

namespace loftq {
inline namespace LOFTQ_VERSION {

inline constexpr int64_t kTile = 64;  // columns per tile

// The group sizes and the code widths that the contract has: the one statement of them in C++, which every entry point,
// the bindings and the tests read. A test compares it with the one in Python.
inline constexpr int64_t kWholeRow = -1;  // the group size that makes one group of the whole row
inline constexpr int64_t kGroupSizes[] = {32, 64, 128, 256, kWholeRow};
inline constexpr int kCodeBits[] = {2, 4, 8};

constexpr bool is_group_size(int64_t group_size) {
  for (int64_t known : kGroupSizes) {
    if (group_size == known) return true;
  }
  return false;
}

constexpr bool is_code_bits(int64_t bits) {
  for (int known : kCodeBits) {
    if (bits == known) return true;
  }
  return false;
}

// What is wrong with a group size, or with the shape and width of codes; nullptr if nothing is.
constexpr Status check_group_size(int64_t group_size) {
  return is_group_size(group_size) ? nullptr : "group_size must be 32, 64, 128, 256 or -1";
}

// More elements than an address space holds: no offset within a matrix of at most so many overflows an int64.
inline constexpr int64_t kMostElements = int64_t{1} << 56;

constexpr bool fits(int64_t rows, int64_t columns) { return columns == 0 || rows <= kMostElements / columns; }

constexpr Status check_codes(int64_t n, int64_t k, int bits) {
  if (n < 0 || k < 0) return "n and k must not be negative";
  if (n > kMostElements || k > kMostElements || !fits(n, k)) return "n and k are too large: n * k must be at most 2^56";
  return is_code_bits(bits) ? nullptr : "bits must be 2, 4 or 8";
}

// Bits per code with a code book of so many entries; 0 where no code book has that size.
constexpr int bits_of_codebook(int64_t entries) {
  for (int bits : kCodeBits) {
    if (entries == int64_t{1} << bits) return bits;
  }
  return 0;
}

constexpr LOFTQ_HD int64_t padded_k(int64_t k) { return ceil_div(k, kTile) * kTile; }

constexpr LOFTQ_HD int64_t row_bytes(int64_t k, int bits) { return padded_k(k) * bits / 8; }

// Columns per group; the last group of a row may have fewer.
constexpr LOFTQ_HD int64_t group_width(int64_t k, int64_t group_size) {
  return group_size == kWholeRow ? k : group_size;
}

constexpr LOFTQ_HD int64_t num_groups(int64_t k, int64_t group_size) {
  return k > 0 ? ceil_div(k, group_width(k, group_size)) : 0;
}

struct CodeAddress {
  int64_t byte;  // within the row
  int shift;     // of the field inside that byte
};

constexpr LOFTQ_HD CodeAddress code_address(int64_t column, int bits) {
  const int64_t run = kTile * bits / 8;  // = 64 / P: bytes per tile, and columns per field
  const int64_t in_tile = column % kTile;
  return {column / kTile * run + in_tile % run, static_cast<int>(in_tile / run) * bits};
}

constexpr LOFTQ_HD int load_code(const uint8_t* row, int64_t column, int bits) {
  const CodeAddress at = code_address(column, bits);
  return (row[at.byte] >> at.shift) & ((1 << bits) - 1);
}

// Conversion of codes between one code per byte and this layout.
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

}  // namespace LOFTQ_VERSION
}  // namespace loftq
